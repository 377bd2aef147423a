"""A registry with a loop of two rounds, a critique stage whose critic is another checkpoint, and a mixture with its rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from align.registry import CheckpointRecord, DataUse, Registry
from align.registry.run import NewData
from tests.report_chain import VERSIONS, add_data, add_stage, estimate

BASE = ("base", "5e" * 32)
COUNTS = {
    "prompts": 100, "revised": 60, "apart": {"nothing_found": 30, "leaked": 7, "worse": 2}, "comparisons": 50, "undecided": 4,
    "principles": {"calm": {"asked": 99, "found": 45, "revised": 40}, "plain": {"asked": 99, "found": 25, "revised": 20}},
}  # fmt: skip
METRICS = {
    "before.critic.violation_rate": estimate(0.41, 0.05), "before.words": estimate(9.5, 0.5), "after.words": estimate(7.9, 0.5),
    "before.distinct": 0.37, "after.distinct": 0.24, "after.critic.preferred": estimate(0.9, 0.05),
    "before.judge.violation_rate": estimate(0.44, 0.05), "after.judge.violation_rate": estimate(0.11, 0.04),
    "before.judge.violation.calm": estimate(0.3, 0.05), "after.judge.violation.calm": estimate(0.05, 0.02),
    "before.judge.violation.kind": estimate(0.2, 0.05), "after.judge.violation.kind": estimate(0.2, 0.05),
    "before.critic.precision": estimate(0.47, 0.08, 137), "before.critic.recall": estimate(0.61, 0.09, 106),
    "before.critic.accuracy": estimate(0.937, 0.01, 1794),
}  # fmt: skip
SAMPLES = [
    {"prompt": "Where is the key?", "answer": "By the pump, you oaf.", "final": "By the pump.", "fault": "", "preferred": 0.875,
     "steps": [{"principle": "plain", "critique": "No.", "revision": None, "fault": ""},
               {"principle": "calm", "critique": "It insults.", "revision": "By the pump.", "fault": ""}],
     "before_verdict": {"correct": True, "refused": False, "violations": ["calm"], "score": 0.5},
     "after_verdict": {"correct": True, "refused": False, "violations": [], "score": 1.0}},
    {"prompt": "Who rings?", "answer": "Mara.", "final": "Mara.", "fault": "leaked", "preferred": None,
     "steps": [{"principle": "calm", "critique": "Yes.", "revision": "Critique: Mara.", "fault": "leaked"}]},
]  # fmt: skip


def judged(before: float, after: float) -> dict[str, Any]:
    found = {f"{when}.judge.violation_rate": estimate(v, 0.03) for when, v in (("before", before), ("after", after))}
    return found | {"before.judge.correct": estimate(0.5, 0.05), "after.judge.correct": estimate(0.52, 0.05)}


def add_critique(
    registry: Registry, stage: str, parent: CheckpointRecord, prompts: DataUse, **given: Any
) -> dict[str, DataUse]:
    """given: counts, metrics, samples, settings, critic (checkpoint), recipe, rounds. Returns its outputs by name."""
    recipe = given.get("recipe", "loop")
    critic = {"critic": given["critic"].name, "critic_id": given["critic"].id} if "critic" in given else {}
    run = registry.begin_run(
        recipe=recipe, stage=stage, kind="critique", key=f"key-{stage}", seed=0,
        settings={
            "settings": {"kind": "critique", "critic": {"kind": "self"}, **given.get("settings", {})},
            "recipe": {"stages": {stage.partition(".")[0]: {"rounds": given.get("rounds", 3)}}},
        },
        inputs={"parent": parent.name, "parent_id": parent.id, "data": {prompts.name: prompts.id}, **critic},
    )  # fmt: skip
    told = {
        "name": f"{recipe}/{stage}", "kind": "critique", "template_sha256": "ab" * 32, "versions": VERSIONS,
        "counts": given.get("counts", COUNTS), "metrics": given.get("metrics", METRICS),
        "samples": given.get("samples", SAMPLES), "ingredients": {"constitution": "cd" * 32},
    }  # fmt: skip
    new = []
    with run:
        for output in ("sft", "preferences"):
            folder = run.artifact / output
            folder.mkdir()
            (folder / "train.jsonl").write_text(json.dumps({"text": f"{recipe} {stage} {output}"}))
            info = {"train_rows": 60, "test_rows": 20, "format": "made", "stage": told}
            new.append(NewData(f"{recipe}/{stage}.{output}", f"key-{recipe}-{stage}-{output}", folder, info))
        records = run.finish_data(new)
    return {
        output: DataUse(f"{stage}.{output}", record.id, 60) for output, record in zip(("sft", "preferences"), records)
    }


def add_round(
    registry: Registry, number: int, parent: CheckpointRecord, prompts: DataUse, *rates: float
) -> CheckpointRecord:
    made = add_critique(registry, f"aligned.{number}.critique", parent, prompts)
    return add_stage(
        registry, f"aligned.{number}", "sft", (parent.name, parent.id), data=[made["sft"]], metrics=judged(*rates),
        steps=2, recipe="loop",
    )  # fmt: skip


def looped_registry(folder: Path) -> Registry:
    """base -> sft -> a loop of two rounds of three, the first kept -> more, on a mixture with rows of a critique stage."""
    found = Registry.open(folder / "home")
    lessons, prompts = add_data(found, folder, "lessons"), add_data(found, folder, "questions", train_rows=100)
    sft = add_stage(found, "sft", "sft", BASE, data=[lessons], metrics=judged(0.5, 0.4), steps=2, recipe="loop")
    one = add_round(found, 1, sft, prompts, 0.4, 0.1)
    add_round(found, 2, one, prompts, 0.1, 0.12)
    found.name_again(one, "loop/aligned")
    revised = add_critique(
        found, "revised", one, prompts, critic=sft, settings={"critic": {"kind": "checkpoint", "from": "sft"}}
    )
    mix = add_data(found, folder, "mix", train_rows=500)
    part = DataUse("revised.sft", revised["sft"].id, 44)
    add_stage(
        found,
        "more",
        "sft",
        ("loop/aligned", one.id),
        data=[mix, part],
        metrics=judged(0.1, 0.05),
        steps=2,
        recipe="loop",
    )
    return found
