"""The preference half: several answers to one prompt, compared under principles, with soft labels (Bai 2022, section 4.1)."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

from align.constitution import Constitution
from align.critique.critics import Contest, Critic
from align.critique.panel import panel_probabilities
from align.critique.rows import Comparison, Row


def compare(
    rows: Sequence[Row],
    critic: Critic,
    constitution: Constitution,
    *,
    panel: int,
    most_confident: float,
    seed: int,
) -> None:
    """Compares all pairs of different answers to each prompt.

    panel: principles under which each pair is compared, drawn by (seed, the row's index); probabilities are averaged over
    them and both orders, and kept within [1 - most_confident, most_confident].
    """
    groups: list[list[Contest]] = []
    pairs: list[tuple[Row, int, int]] = []
    for row in rows:
        principles = constitution.draw(random.Random(f"{seed} {row.index} panel"), panel)
        for first, second in itertools.combinations(range(len(row.answers)), 2):
            one, other = row.answers[first], row.answers[second]
            if one and other and one != other:
                pairs.append((row, first, second))
                groups.append([Contest(row.prompt, one, other, principle, row.expected) for principle in principles])
    for (row, first, second), group, probability in zip(
        pairs, groups, panel_probabilities(groups, critic), strict=True
    ):
        bounded = None if probability is None else min(max(probability, 1 - most_confident), most_confident)
        row.comparisons.append(Comparison(first, second, bounded, tuple(contest.principle.id for contest in group)))
