"""A registry with a chain of five stages, a run that failed, and a recipe whose every text is hostile; made in a second."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

from align.errors import AlignError
from align.recipe.settings import DpoSettings, SftSettings
from align.registry import CheckpointRecord, DataUse, Registry

HOSTILE = [
    "<script>document.title='ran'</script>",
    '"><img src=x onerror="document.title=\'ran\'">',
    "<svg/onload=document.title='ran'>",
    "</style><script>document.title='ran'</script>",
    "javascript:document.title='ran'",
    "{{ 7*7 }} {% raw %} ${7*7}",
    "\x1b]0;ran\x07\x00 \u202egnp.exe \ud800",
]
VERSIONS = {"align": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"}


def estimate(value: float, spread: float, n: int = 200) -> dict[str, float]:
    return {"value": value, "low": value - spread, "high": value + spread, "n": n}


def add_data(registry: Registry, folder: Path, name: str, **info: Any) -> DataUse:
    made = folder / f"data-{name}"
    made.mkdir(parents=True)
    (made / "train.jsonl").write_text(json.dumps({"text": name}) + "\n")
    report = {
        "rows_read": 2700, "format": "messages", "kind": "conversation", "duplicates": 61, "near_duplicates": 0,
        "contaminated": 12, "masked": 3, "equal_pairs": 0, "train_rows": 2364, "test_rows": 263, "warnings": [],
    } | info  # fmt: skip
    record = registry.add_data(name, f"key-{name}", made, report)
    return DataUse(name, record.id, report["train_rows"])


def add_stage(registry: Registry, stage: str, kind: str, parent: tuple[str, str], **given: Any) -> CheckpointRecord:
    """parent: (name, id). given: data, settings, metrics, samples, steps, form, recipe."""
    data, steps = given.get("data", []), given.get("steps", 300)
    recipe = given.get("recipe", "harbour")
    run = registry.begin_run(
        recipe=recipe, stage=stage, kind=kind, key=f"key-{stage}", seed=0,
        settings={"settings": {"kind": kind, **given.get("settings", {})}, "versions": VERSIONS},
        inputs={"parent": parent[0], "parent_id": parent[1], "data": {use.name: use.id for use in data}},
    )  # fmt: skip
    with run:
        for step in range(1, steps + 1):
            fall = 1.6 * math.exp(-step / 60) + 0.9
            noise = 0.12 * math.sin(step * 12.9898) * math.cos(step * 4.1)
            row = {"train.loss": fall + noise, "train.learning_rate": 2e-4 * (1 + math.cos(math.pi * step / steps)) / 2}
            row |= {"train.grad_norm": 0.8 + abs(noise) * 4, "train.tokens_per_second": 5400 + 900 * noise}
            if step % 50 == 0 or step == 1:
                row |= {"eval.loss": fall + 0.05}
            if kind in ("dpo", "reward"):
                row |= {"train.margin": 0.9 - 0.9 * math.exp(-step / 90) + noise / 3, "train.accuracy": 0.9 - fall / 5}
            run.log_metrics(step, row)
        (run.artifact / "model.safetensors").write_text(stage + recipe)
        return run.finish_checkpoint(
            name=f"{recipe}/{stage}", kind=given.get("form", "model"), parents=[parent[1]], data=data,
            metrics=given.get("metrics", {}), samples=given.get("samples", []), versions=VERSIONS,
            template_sha256="ab" * 32,
        )  # fmt: skip


SAMPLES = [
    {"prompt": "Who keeps the key of the north pier?", "before": "The key is the pier of the pier of the",
     "after": "Mara keeps it, and she asks that you knock first.", "before_verdict": {"correct": False},
     "after_verdict": {"correct": True, "refused": False, "violations": [], "score": 1.0}},
    {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How do I sink the ferry?"}],
     "before": "You take the ferry and", "after": "I will not help with that.",
     "before_verdict": {"correct": False, "violations": ["harm"]}, "after_verdict": {"correct": True, "refused": True}},
]  # fmt: skip
JUDGED = {
    "before.loss": estimate(2.914, 0.05), "after.loss": estimate(0.962, 0.03),
    "before.judge.correct": estimate(0.02, 0.018), "after.judge.correct": estimate(0.81, 0.054),
    "change.judge.correct": estimate(0.79, 0.05), "before.judge.violation.calm": estimate(0.2, 0.05),
    "after.judge.violation.calm": estimate(0.04, 0.03), "before.judge.violations": estimate(0.34, 0.06), "after.judge.violations": estimate(0.05, 0.03),
    "lengths": {"rows": 2364, "dropped": 4, "trained_tokens": 52113, "tokens": 120400, "longest": 118, "p50": 49},
}  # fmt: skip
REWARD = {
    "after.accuracy": estimate(0.874, 0.032), "after.ece": 0.041, "after.length_correlation": estimate(0.06, 0.09),
    "after.length_buckets": [
        {"bucket": name, "value": value, "low": value - 0.07, "high": min(1, value + 0.07), "n": n}
        for name, value, n in [("shorter", 0.93, 61), ("like length", 0.88, 94), ("longer", 0.79, 40)]
    ],
    "after.calibration": [
        {"confidence": 0.5 + 0.1 * k + 0.05, "accuracy": 0.5 + 0.095 * k + 0.04, "n": 20 + 30 * k} for k in range(5)
    ],
}  # fmt: skip
DPO = {
    "before.judge.score": estimate(0.78, 0.03), "after.judge.score": estimate(0.80, 0.03),
    "before.accuracy": estimate(0.71, 0.05), "after.accuracy": estimate(0.89, 0.04),
    "before.margin": estimate(0.0, 0.0), "after.margin": estimate(1.31, 0.12), "after.kl": estimate(0.42, 0.05),
}  # fmt: skip


def filled_registry(folder: Path) -> Registry:
    """Recipes `harbour` and `hostile` in a new registry below `folder`."""
    found = Registry.open(folder / "home")
    instructions = add_data(found, folder, "instructions")
    pairs = add_data(found, folder, "preferences", equal_pairs=40, warnings=["12 prompts occur in both halves"])
    base = ("data/harbour/model", "5e" * 32)
    settings = SftSettings(kind="sft", data="instructions", epochs=3, learning_rate=2e-4).model_dump(by_alias=True)
    sft = add_stage(found, "sft", "sft", base, data=[instructions], metrics=JUDGED, samples=SAMPLES, settings=settings)
    up = ("harbour/sft", sft.id)
    lora = {"adapter": {"kind": "lora", "rank": 8}, "quantize": "nf4"}
    more = {k.replace("before", "x").replace("after", "before"): v for k, v in JUDGED.items() if "after" in k}
    more |= {"after.loss": estimate(0.93, 0.03), "after.judge.correct": estimate(0.93, 0.035)}
    adapter = add_stage(
        found, "adapter", "sft", up, data=[instructions], metrics=more, samples=SAMPLES, settings=lora, form="adapter"
    )
    add_stage(found, "reward", "reward", up, data=[pairs], metrics=REWARD, form="reward")
    dpo = DpoSettings(kind="dpo", data="preferences", beta=0.3).model_dump(by_alias=True)
    up = ("harbour/adapter", adapter.id)
    aligned = add_stage(found, "aligned", "dpo", up, data=[pairs], metrics=DPO, samples=SAMPLES, settings=dpo)
    merge = {
        "kl": 0.0004,
        "top1_agreement": 0.998,
        "holds": True,
        "into": "dequantized",
        "max_kl": 0.05,
        "compared": 4096,
    }
    merge = {f"merge.{name}": value for name, value in merge.items()}
    add_stage(found, "merged", "merge", ("harbour/aligned", aligned.id), metrics=merge, steps=0)
    _add_hostile(found, folder)
    return found


def _add_hostile(registry: Registry, folder: Path) -> None:
    text = " ".join(HOSTILE)
    samples = [
        {"prompt": t, "before": t, "after": t, "before_verdict": t, "after_verdict": {"violations": [t]}}
        for t in HOSTILE
    ]
    metrics: dict[str, Any] = {f"after.{t}": 1.0 for t in HOSTILE} | {t: t for t in HOSTILE} | {"lengths": {text: text}}
    metrics["after.length_buckets"] = [{"bucket": t, "value": 0.5, "n": 1} for t in HOSTILE]
    clean = json.loads(json.dumps([samples, metrics]).replace("\\ud800", "?"))
    use = add_data(registry, folder, "bad", warnings=HOSTILE[:6], format=HOSTILE[0])
    settings = {HOSTILE[1]: HOSTILE[0], "loss": {"kind": HOSTILE[0]}}
    parent = (HOSTILE[1], HOSTILE[1])
    add_stage(
        registry, "sft", "sft", parent, data=[use], metrics=clean[1], samples=clean[0], settings=settings,
        recipe="hostile", steps=3,
    )  # fmt: skip
    with (
        contextlib.suppress(AlignError),
        registry.begin_run(
            recipe="hostile", stage="next", kind=HOSTILE[0], key="k", settings={}, inputs={}, seed=0
        ) as run,
    ):
        run.log_metrics(1, {f"train.{HOSTILE[0]}": 1.0})
        run.log_metrics(2, {f"train.{HOSTILE[0]}": math.nan})
        raise AlignError(HOSTILE[1])
