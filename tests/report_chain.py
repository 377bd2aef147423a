"""A registry with a chain of five stages, a run that failed, and a recipe whose every text is hostile; made in a second."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

from align.errors import AlignError
from align.recipe.settings import DpoSettings, PpoSettings, SftSettings
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
    """parent: (name, id). given: data, settings, metrics, samples, steps, form, recipe, rewards (name -> id), rows."""
    data, steps = given.get("data", []), given.get("steps", 300)
    recipe = given.get("recipe", "harbour")
    run = registry.begin_run(
        recipe=recipe, stage=stage, kind=kind, key=f"key-{stage}", seed=0,
        settings={
            "settings": {"kind": kind, **given.get("settings", {})}, "versions": VERSIONS,
        },
        inputs={
            "parent": parent[0], "parent_id": parent[1], "data": {use.name: use.id for use in data},
            "rewards": given.get("rewards", {}),
        },
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
        for step, row in given.get("rows", {}).items():
            run.log_metrics(step, row)
        (run.artifact / "model.safetensors").write_text(stage + recipe)
        return run.finish_checkpoint(
            name=f"{recipe}/{stage}", kind=given.get("form", "model"), data=data, parents=[parent[1], *given.get("rewards", {}).values()],
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


PROOF = [
    {"check": "KL to the reference is 0", "value": 3.1e-8, "limit": 1e-6, "holds": True},
    {"check": "the ratio is 1 in the first minibatch", "value": 4.8e-7, "limit": 1e-4, "holds": True},
    {"check": "rewards equal those of align score", "value": 0.0, "limit": 1e-5, "holds": True},
    {"check": "no reward sits on a pad token", "value": 0, "limit": 0, "holds": True},
    {"check": "values are finite", "value": 0, "limit": 0, "holds": True},
]
GUARDS = [
    {"round": n, "guard": "kl", "value": n - 2.8, "limit": 30.0, "said": f"KL is {n - 2.8:.1f} nats per response"}
    for n in range(33, 38)
] + [{"round": 36, "guard": "length", "value": 0.84, "limit": 0.8, "said": "reward follows length"}]
PPO = {
    "before.judge.score": estimate(0.78, 0.03), "after.judge.score": estimate(0.88, 0.025),
    "before.reward": estimate(0.21, 0.12), "after.reward": estimate(1.74, 0.11), "change.reward": estimate(1.53, 0.13),
    "after.kl": estimate(0.31, 0.04), "after.kl_sequence": estimate(6.4, 0.7),
    "before.length": estimate(21.2, 1.1), "after.length": estimate(24.9, 1.0),
    "before.finished": estimate(0.97, 0.02), "after.finished": estimate(0.99, 0.01),
    "before.distinct": 0.71, "after.distinct": 0.55, "before.reference_perplexity": estimate(3.1, 0.2),
    "after.reference_perplexity": estimate(4.4, 0.3),
    "before.watch.second": estimate(0.3, 0.05), "after.watch.second": estimate(0.79, 0.04),
    "proof": PROOF, "guards": GUARDS, "stopped_by": "kl", "rounds": 38, "estimator": "gae",
}  # fmt: skip
LONG_ANSWER = "She keeps the key by the door, and the door by the pier. " * 8
PPO_SAMPLES = [
    sample | {"before_reward": -0.4, "after_reward": 1.9, "over_time": [
        {"round": 0, "text": sample["before"], "reward": -0.4},
        {"round": 12, "text": LONG_ANSWER, "reward": 0.35},
        {"round": 25, "text": "Mara keeps it. Knock first.", "reward": 1.2},
        {"round": 38, "text": sample["after"], "reward": 1.9},
    ]} for sample in SAMPLES
]  # fmt: skip


def ppo_rows(rounds: int = 38, steps: int = 16) -> dict[int, dict[str, float]]:
    """What a ppo run logs, by optimiser step: a reward that rises and saturates, a KL that does not."""
    found: dict[int, dict[str, float]] = {}
    for number in range(rounds):
        learnt, noise = 1 - math.exp(-number / 14), math.sin(number * 12.9898) * math.cos(number * 4.1)
        kl = 34 * (number / rounds) ** 2 + abs(noise) / 2
        row = {
            "number": number, "reward": 0.2 + 1.6 * learnt + 0.12 * noise, "reward_std": 0.9 - 0.3 * learnt,
            "reward.reward": 0.2 + 1.4 * learnt, "reward.length": 0.2 * learnt - 0.1, "watch.second": 0.3 + learnt / 2,
            "kl": kl, "kl_token": kl / 22, "entropy": 2.1 - 0.9 * learnt + 0.05 * noise, "length": 21 + 4 * learnt + noise,
            "finished": 0.96 + 0.03 * learnt, "kl_coefficient": 0.05 * (1 + number / 40), "mismatch": 1e-7,
            "value_explained": 1 - math.exp(-number / 5) * 1.6, "repetition": 0.02, "length_correlation": 0.1 + learnt / 2,
        }  # fmt: skip
        for step in range(number * steps + 1, number * steps + steps + 1):
            swing = 0.02 * math.sin(step * 7.7)
            found[step] = {
                "train.policy_loss": -0.02 + swing, "train.value_loss": 0.4 - 0.3 * learnt + swing, "train.grad_norm": 1.0,
                "train.clip_fraction": 0.08 + swing, "train.value_clip_fraction": 0.15 - 0.1 * learnt + swing / 2,
                "train.round_kl": 0.01 + swing / 4, "train.loss": 0.1 + swing, "train.learning_rate": 1e-5,
            }  # fmt: skip
        found[number * steps + steps] |= {f"round.{name}": value for name, value in row.items()}
        if number % 9 == 0 or number == rounds - 1:
            measured = {"reward": row["reward"] - 0.05, "kl": kl, "judge_score": 0.78 + 0.1 * learnt}
            measured |= {"length": row["length"], "watch.second": 0.28 + learnt / 2}
            found[number * steps + steps] |= {f"eval.{name}": value for name, value in measured.items()}
    return found


def add_policy(registry: Registry, **given: Any) -> CheckpointRecord:
    """Stage `policy` of recipe `harbour`: ppo from its adapter for the reward of its reward model."""
    start, reward = (registry.checkpoint(f"harbour/{name}") for name in ("adapter", "reward"))
    pairs = next(use for use in reward.data if use.name == "preferences")
    settings = PpoSettings(
        kind="ppo", prompts="preferences", reward=["reward", {"kind": "length", "target_tokens": 24}],
        watch=["second"], kl_target=6.0, guards={"stop_on": ["kl"]},
    ).model_dump(mode="json", by_alias=True)  # fmt: skip
    given = {
        "metrics": PPO,
        "samples": PPO_SAMPLES,
        "settings": settings,
        "rows": ppo_rows(),
        "steps": 0,
        "data": [pairs],
    } | given
    return add_stage(
        registry, "policy", "ppo", (start.name, start.id), rewards={"reward": reward.id}, form="adapter", **given
    )


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
