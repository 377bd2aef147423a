"""What the stages of a recipe have made so far, which rounds of a loop are not run any more, and which one is kept.

A loop stops after a round that did not lower the violation rate on the held-out prompts. The rate is that of the judge of
`evaluation:`, before and after each round; without a judge it is what the critic found, which it measures before each
round only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from align.recipe.rounds import critique_name, round_name, round_of
from align.recipe.settings import ConstitutionSettings, Recipe
from align.registry.records import CheckpointRecord, StageData

if TYPE_CHECKING:
    from align.origins import Workshop

Made = CheckpointRecord | StageData
JUDGED = "judge.violation_rate"
FOUND = "critic.violation_rate"  # by the critic that also wrote the round's data


class Products:
    """What has been made, by stage, and which stages are skipped; told while a run or a plan goes on."""

    def __init__(self, workshop: Workshop) -> None:
        self.workshop = workshop
        self.checkpoints: dict[str, CheckpointRecord] = {}
        self.data: dict[str, StageData] = {}
        self.skipped: set[str] = set()

    def add(self, name: str, made: Made) -> None:
        """Takes what a stage has made."""
        if isinstance(made, StageData):
            self.data[name] = made
            self.workshop.deliver(name, made)
        else:
            self.checkpoints[name] = made

    def made(self, name: str) -> Made | None:
        """What a stage has made; None: nothing, or not yet."""
        return self.checkpoints.get(name) or self.data.get(name)

    def settled(self, name: str) -> bool:
        """Whether nothing is to be done for a stage any more."""
        return name in self.checkpoints or name in self.data or name in self.skipped


def too_late(recipe: Recipe, name: str, products: Products) -> str:
    """Why a stage of a loop is not run any more; '' where it is, and for every other stage."""
    place = round_of(recipe, name)
    if place is None or place[1] == 1:
        return ""
    loop, number = place
    if round_name(loop, number - 1) in products.skipped:
        return f"round {number - 1} is not run either"
    if name != critique_name(loop, number) and _nothing_to_learn(recipe, loop, number, products):
        return f"the critique of round {number} left nothing to learn from"
    last = products.checkpoints.get(round_name(loop, number - 1))
    if last is None:
        return ""
    before, after = (_value(last.metrics, f"{when}.{JUDGED}") for when in ("before", "after"))
    if before is None and name != critique_name(loop, number):
        before, after = (_found(loop, one, products) for one in (number - 1, number))
    if before is None or after is None or after < before:
        return ""
    return f"round {number - 1} no longer lowered the violation rate ({before:.1%} to {after:.1%})"


def best_round(name: str, stage: ConstitutionSettings, products: Products) -> tuple[int, CheckpointRecord, str]:
    """The round of a finished loop that is kept, and why.

    Of those within a standard error of the lowest held-out violation rate, the one with the best score of the judge: a
    rate that is lower by chance is not worth right answers (Breiman 1984, the rule of one standard error). The first of
    equals. The last round that nobody measured, as the last one is where there is no judge, goes before the others.
    """
    rounds = range(1, stage.rounds + 1)
    ends = {
        number: _end(name, number, products) for number in rounds if round_name(name, number) in products.checkpoints
    }
    measured = {number: end for number, end in ends.items() if end is not None}
    if len(measured) < len(ends):
        number, why = max(ends.keys() - measured.keys()), "the last, measured by nobody"
    else:
        lowest = min(measured.values(), key=lambda end: (end.rate, -end.score))
        close = {one: end for one, end in measured.items() if end.rate <= lowest.rate + lowest.error}
        number = max(close, key=lambda one: (close[one].score, -close[one].rate))
        why = f"violation rate {close[number].rate:.1%}"
        if close[number].rate > lowest.rate:
            why += f", within a standard error of the lowest, {lowest.rate:.1%}, with the better score"
    return number, products.checkpoints[round_name(name, number)], why


class _End(NamedTuple):
    """What a round ended with on the held-out prompts; score: the judge's, error: the rate's standard error."""

    rate: float
    error: float
    score: float


def _end(loop: str, number: int, products: Products) -> _End | None:
    """None: nobody measured it."""
    metrics = products.checkpoints[round_name(loop, number)].metrics
    rate = _value(metrics, f"after.{JUDGED}")
    if rate is None:
        found = _found(loop, number + 1, products)
        return None if found is None else _End(found, 0.0, 0.0)
    answers = metrics[f"after.{JUDGED}"].get("n") or 1
    return _End(rate, (rate * (1 - rate) / answers) ** 0.5, _value(metrics, "after.judge.score") or 0.0)


def _nothing_to_learn(recipe: Recipe, loop: str, number: int, products: Products) -> bool:
    """Whether the critique of a round is done and made no rows for what the round trains."""
    stage, critique = recipe.stages[loop], products.data.get(critique_name(loop, number))
    assert isinstance(stage, ConstitutionSettings), "only such a stage has rounds"
    output = "sft" if stage.train.kind == "sft" else "preferences"
    used = stage.train.kind != "ppo" or stage.trains_reward
    return used and critique is not None and not critique.outputs[output].info["train_rows"]


def _found(loop: str, number: int, products: Products) -> float | None:
    """The violation rate that the critic of a round found before it trained."""
    critique = products.data.get(critique_name(loop, number))
    return _value(critique.info["metrics"], f"before.{FOUND}") if critique else None


def _value(metrics: Mapping[str, Any], name: str) -> float | None:
    number = metrics.get(name)
    return float(number["value"]) if isinstance(number, Mapping) else None
