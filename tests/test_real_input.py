"""The whole chain on real data and a small pretrained model: what the documents claim, held to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.origins import Workshop
from align.progress import Progress
from align.recipe.file import load_recipe
from align.registry import Registry
from align.run import run_recipe

RECIPE = Path(__file__).parents[1] / "benchmarks" / "real-input.yaml"
PATHS = {
    "model": "models/stories260K",
    "data.instructions.path": "data/instruct/instructions.jsonl",
    "data.tone.path": "data/preference/tone.jsonl",
    "data.harmless.path": "data/preference/hh_harmless_1300.jsonl.gz",
}


def value(metrics: dict, name: str) -> float:
    return metrics[name]["value"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_stage_learns_from_real_data_and_only_what_changed_runs_again(shared: Path, tmp_path: Path) -> None:
    settings = [f"{key}={shared / path}" for key, path in PATHS.items()]

    def chain(*more: str) -> dict:
        workshop = Workshop(load_recipe(RECIPE, [*settings, *more]), RECIPE.parent, Registry.open(tmp_path))
        return {done.planned.name: done for done in run_recipe(workshop, Progress())}

    done = chain()
    metrics = {name: entry.checkpoint.metrics for name, entry in done.items()}
    assert value(metrics["sft"], "after.loss") < value(metrics["sft"], "before.loss") - 1.5
    assert value(metrics["reward"], "after.accuracy") >= 0.85
    assert 0 <= metrics["harmless"]["after.accuracy"]["low"] < metrics["harmless"]["after.accuracy"]["high"] <= 1
    assert metrics["aligned"]["change.accuracy"]["low"] > 0
    assert value(metrics["aligned"], "after.margin") > 0
    assert value(metrics["aligned"], "after.kl_sequence") > 0
    assert metrics["merged"]["merge.holds"] is True
    again = chain("stages.aligned.beta=0.2")
    actions = {name: entry.planned.action for name, entry in again.items()}
    assert [name for name, action in actions.items() if action == "run"] == ["aligned", "merged"]
