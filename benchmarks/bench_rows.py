"""What bench.py compares: the rows of the table, who takes part in each, and the targets. No torch here: the process that
starts the others has to stay small, because Linux counts its memory in theirs until they are under way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

OURS, BARE, LIMIT = "align", "bare loop", "matrix limit"
DEFAULT, BEST, UNPACKED, PLAIN = (
    "TRL 1.16, default", "TRL 1.16, at its best", "TRL 1.16, no checkpointing", "transformers.Trainer",
)  # fmt: skip
AS_INSTALLED = "TRL 1.16, default with its bfloat16 autocast"
PPO_PEER = "TRL 1.12.0, allocator tuned"
GENERATE, LOOP = "transformers generate", "plain generate loop"
FOUR, TRUNK, ADAPTERS = "align, four models", "align, value head on the policy's trunk", "align, adapters on one base"
HELP, LISTS, TRL_HELP = "align --help", "listings", "trl sft --help"

Measure = Literal["speed", "speed with reference", "memory", "seconds", "overhead", "share"]
HIGHER_IS_BETTER = {"speed", "speed with reference", "share"}


@dataclass(frozen=True)
class Side:
    """One who does a row's work. script: ours or trl; tuned: the allocator is told to keep its memory.

    compared: trains on the same rows in each step, so that its losses must agree with ours. once: in the first turn only.
    """

    name: str
    script: Literal["ours", "trl"]
    options: tuple[str, ...]
    tuned: bool = False
    compared: bool = True
    once: bool = False


@dataclass(frozen=True)
class Goal:
    """What a row is to show. peer: the side that `ours` is held against, '' for a plain number of ours."""

    what: str
    measure: Measure
    peer: str
    target: float
    stretch: float
    ours: str = OURS


@dataclass(frozen=True)
class Row:
    """One comparison. work: what both sides train on, for rows of `sides`; other rows have a script of their own (kind).

    minutes: about how long three turns take on two cores without bfloat16. tolerance: largest relative difference of two
    losses of the same step, by precision; those of pairs rest on sums over a whole reply, whose rounding is larger.
    """

    key: str
    title: str
    kind: Literal["train", "ppo", "rollouts", "critique", "start-up"]
    goals: tuple[Goal, ...]
    minutes: float
    work: Mapping[str, Any]
    sides: tuple[Side, ...] = ()
    tolerance: Mapping[str, float] = field(default_factory=lambda: {"float32": 1e-3, "bfloat16": 2e-3})

    @property
    def family(self) -> str:
        """What stands before the shape."""
        return self.key.rsplit("-", 1)[0]


TRAIN = Side(OURS, "ours", ("train",))
MATRIX = Side(LIMIT, "ours", ("matrix",), compared=False)
TRL_DEFAULT = Side(DEFAULT, "trl", ())
TRL_AS_INSTALLED = Side(AS_INSTALLED, "trl", ("--own-precision", "--steps", "1"), compared=False, once=True)
TRL_UNPACKED = Side(UNPACKED, "trl", ("--no-checkpointing",), tuned=True)
TRL_PACKED = Side(BEST, "trl", ("--no-checkpointing", "--packed"), tuned=True, compared=False)
SFT = {
    "kind": "sft", "batch": 8, "warmup": 8, "steps": 10, "learning_rate": 1e-3, "beta": None, "adapter": False,
    "quantize": None,
}  # fmt: skip
PAIRS = {**SFT, "learning_rate": 1e-4, "warmup": 6, "steps": 4}
PAIR_TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}


def _adapter_row(key: str, title: str, quantize: str | None, minutes: float) -> Row:
    work = {**SFT, "shape": "15m", "adapter": True, "quantize": quantize, "steps": 6, "learning_rate": 3e-3}
    goals = (
        Goal(f"{title} over TRL without checkpointing", "speed", UNPACKED, 2.5, 4),
        Goal(f"{title} over TRL at its best (packed)", "speed", BEST, 2.5, 4),
    )
    return Row(key, title, "train", goals, minutes, work, (TRAIN, TRL_UNPACKED, TRL_PACKED))


ROWS = (
    Row(
        "sft-15m", "SFT 15m", "train",
        (
            Goal("SFT 15m over TRL default", "speed", DEFAULT, 10, 14),
            Goal("SFT 15m over TRL at its best (packed)", "speed", BEST, 4, 5),
            Goal("SFT 15m over transformers.Trainer", "speed", PLAIN, 3.5, 5),
            Goal("SFT 15m, peak memory, of TRL's at its best", "memory", BEST, 0.75, 0.6),
            Goal("SFT 15m, share of the matrix limit", "share", LIMIT, 0.18, 0.25),
        ),
        7, {**SFT, "shape": "15m"},
        (TRAIN, TRL_DEFAULT, TRL_PACKED, Side(PLAIN, "trl", ("--plain",)), TRL_AS_INSTALLED, MATRIX),
    ),
    Row(
        "sft-135m", "SFT 135m", "train",
        (
            Goal("SFT 135m over TRL at its best (packed)", "speed", BEST, 2.5, 4),
            Goal("SFT 135m, share of the matrix limit", "share", LIMIT, 0.3, 0.45),
        ),
        6, {**SFT, "shape": "135m", "warmup": 4, "steps": 4},
        (TRAIN, TRL_PACKED, replace(TRL_UNPACKED, options=("--no-checkpointing", "--steps", "1"), once=True), MATRIX),
    ),
    _adapter_row("lora-15m", "LoRA 15m", None, 3),
    _adapter_row("qlora-15m", "nf4 QLoRA 15m", "nf4", 3),
    Row(
        "dpo-15m", "DPO 15m", "train",
        (
            Goal("DPO 15m over TRL default, our reference pass counted", "speed with reference", DEFAULT, 12, 20),
            Goal("DPO 15m over TRL at its best, references known", "speed", BEST, 6, 10),
        ),
        5, {**PAIRS, "kind": "dpo", "shape": "15m", "beta": 0.1},
        (TRAIN, TRL_DEFAULT, Side(BEST, "trl", ("--no-checkpointing", "--precompute"), tuned=True)),
        PAIR_TOLERANCE,
    ),
    Row(
        "reward-15m", "reward model 15m", "train",
        (Goal("reward model 15m over TRL at its best", "speed", BEST, 4, 6),),
        2, {**PAIRS, "kind": "reward", "shape": "15m"},
        (TRAIN, replace(TRL_UNPACKED, name=BEST)), PAIR_TOLERANCE,
    ),
    Row(
        "overhead-15m", "stage against its bare loop, 15m", "train",
        (Goal("align.trainer.train over its own bare loop", "overhead", BARE, 0.1, 0.05),),
        3, {**SFT, "shape": "15m", "steps": 20},
        (TRAIN, Side(BARE, "ours", ("bare",))),
    ),
    Row(
        "ppo-15m", "PPO 15m, an iteration", "ppo",
        (
            Goal("PPO 15m, four models, over TRL 1.12.0", "speed", PPO_PEER, 3, 4.5, FOUR),
            Goal("PPO 15m, adapters, over TRL 1.12.0", "speed", PPO_PEER, 3, 4.5, ADAPTERS),
            Goal("PPO 15m, value head on the trunk, over TRL 1.12.0", "speed", PPO_PEER, 4.5, 6, TRUNK),
            Goal("PPO 15m, four models, peak memory, of TRL's", "memory", PPO_PEER, 0.45, 0.35, FOUR),
            Goal("PPO 15m, adapters, peak memory, of TRL's", "memory", PPO_PEER, 0.45, 0.35, ADAPTERS),
        ),
        5, {"shape": "15m", "batch": 16, "response": 53, "epochs": 4, "iterations": 2},
    ),
    Row(
        "rollouts-15m", "rollouts 15m, batch 64", "rollouts",
        (Goal("rollouts 15m, batch 64, over generate", "speed", GENERATE, 4.5, 6),),
        3, {"shape": "15m", "batch": 64, "prompts": 128},
    ),
    Row(
        "rollouts-135m", "rollouts 135m, batch 16", "rollouts",
        (Goal("rollouts 135m, batch 16, over generate", "speed", GENERATE, 1.9, 2.5),),
        4, {"shape": "135m", "batch": 16, "prompts": 32},
    ),
    Row(
        "critique-15m", "critique 15m", "critique",
        (Goal("critique 15m, rows, over a plain generate loop", "speed", LOOP, 4, 6),),
        13, {"shape": "15m", "rows": 48},
    ),
    Row(
        "start-up", "start-up", "start-up",
        (
            Goal("align --help, seconds", "seconds", "", 0.3, 0.15, HELP),
            Goal("align runs, checkpoints and data list, seconds (slowest)", "seconds", "", 0.3, 0.15, LISTS),
        ),
        0.5, {},
    ),
)  # fmt: skip


def quick_rows() -> list[Row]:
    """Every row at the smallest shape with a few steps: proves that it works, measures nothing."""
    small: dict[str, Any] = {
        "batch": 4, "warmup": 1, "steps": 3, "prompts": 8, "rows": 4, "response": 8, "epochs": 2, "iterations": 1,
    }  # fmt: skip
    rows: dict[str, Row] = {}
    for row in ROWS:
        shape = row.work.get("shape", "")
        work = {name: small.get(name, value) for name, value in row.work.items()} | ({"shape": "1m"} if shape else {})
        goals = tuple(replace(goal, what=goal.what.replace(shape, "1m")) for goal in row.goals) if shape else row.goals
        sides = tuple(side for side in row.sides if "--own-precision" not in side.options)
        key, title = (text.replace(shape, "1m") if shape else text for text in (row.key, row.title))
        rows.setdefault(key, replace(row, key=key, title=title, goals=goals, work=work, sides=sides, minutes=0.5))
    return list(rows.values())


def chosen_rows(rows: list[Row], only: str) -> list[Row]:
    """Those that `only` names, separated by commas: a key, or all of a family (sft). Empty: all. Raises SystemExit."""
    names = [name for name in only.split(",") if name]
    known = {row.key for row in rows} | {row.family for row in rows}
    if unknown := sorted(set(names) - known):
        raise SystemExit(f"unknown row {unknown[0]!r}; there are {', '.join(row.key for row in rows)}")
    return [row for row in rows if not names or row.key in names or row.family in names]
