"""A critic as a judge of pairs that people have judged: how often it agrees, whether the order sways it, how sure it is."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

from align.constitution import Constitution
from align.critique.critics import Contest, Critic
from align.data.examples import Messages, Preference
from align.errors import AlignError
from align.evaluation.intervals import mean, wilson
from align.evaluation.numbers import as_metrics, calibration, expected_calibration_error

SUREST = 1 - 1e-6  # a critic that is surer counts as this sure, so that one mistake does not cost infinitely much


def agreement(
    critic: Critic, constitution: Constitution, pairs: Sequence[Preference], *, panel: int, seed: int
) -> dict[str, Any]:
    """Numbers of a critic on pairs whose better reply is known, over principles drawn by (seed, row), in both orders.

    accuracy: share of pairs in which the mean over principles and orders favours the chosen reply, ties half. first: share
    of single questions answered with the reply that stands first, 0.5 where the order does not matter. consistent: share
    of questions whose answer is the same reply in both orders. loss: nats per pair. ece, calibration: of its confidence.
    accuracy.<principle>: the same as accuracy under one principle. Raises AlignError when no pair could be asked.
    """
    groups = [
        [
            Contest(pair.prompt, _text(pair.chosen), _text(pair.rejected), principle, pair.expected)
            for principle in constitution.draw(random.Random(f"{seed} {row} panel"), panel)
        ]
        for row, pair in enumerate(pairs)
    ]
    contests = [contest for group in groups for contest in group]
    both = critic.choices([*contests, *(contest.swapped() for contest in contests)])
    asked = list(zip(contests, both[: len(contests)], both[len(contests) :], strict=True))
    known = [(contest, first, second) for contest, first, second in asked if first is not None and second is not None]
    if not known:
        raise AlignError("no pair fits into the context of the critic", "Give shorter pairs, or another critic.")
    chances = _by_pair(groups, asked)
    margins = [_margin(chance) for chance in chances]
    picks = [pick for _, first, second in known for pick in (first, second)]
    numbers = {
        "accuracy": _share(chances),
        "first": _share(picks),
        "consistent": wilson(sum((first > 0.5) == (second < 0.5) for _, first, second in known), len(known)),
        "loss": mean([math.log1p(math.exp(-margin)) for margin in margins], seed=seed),
        "ece": expected_calibration_error(margins, seed=seed),
    }
    for principle in constitution.principles:
        under = [0.5 + (first - second) / 2 for contest, first, second in known if contest.principle is principle]
        if under:
            numbers[f"accuracy.{principle.id}"] = _share(under)
    return {**as_metrics(numbers), "calibration": calibration(margins), "too_long": len(pairs) - len(chances)}


def _by_pair(
    groups: Sequence[Sequence[Contest]], asked: Sequence[tuple[Contest, float | None, float | None]]
) -> list[float]:
    """Probability that the chosen reply is better, of each pair that could be asked in both orders."""
    answers = iter(asked)
    chances = []
    for group in groups:
        found = [(first, second) for _, first, second in (next(answers) for _ in group)]
        values = [0.5 + (first - second) / 2 for first, second in found if first is not None and second is not None]
        if values:
            chances.append(sum(values) / len(values))
    return chances


def _share(chances: Sequence[float]) -> Any:
    return wilson(sum(0.5 if chance == 0.5 else float(chance > 0.5) for chance in chances), len(chances))


def _margin(chance: float) -> float:
    """Log-odds."""
    bounded = min(max(chance, 1 - SUREST), SUREST)
    return math.log(bounded / (1 - bounded))


def _text(reply: Messages) -> str:
    return "\n".join(message.content for message in reply)
