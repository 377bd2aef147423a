"""Two answers compared under several principles, in both orders."""

from __future__ import annotations

from collections.abc import Sequence

from align.critique.critics import Contest, Critic


def panel_probabilities(contests: Sequence[Sequence[Contest]], critic: Critic) -> list[float | None]:
    """Probability that the first answer is better, averaged over both orders and over the contests of each group.

    None for a group of which no contest could be asked in both orders.
    """
    flat = [contest for group in contests for contest in group]
    both = critic.choices([*flat, *(contest.swapped() for contest in flat)])
    ahead = (_mean(first, second) for first, second in zip(both[: len(flat)], both[len(flat) :], strict=True))
    found = []
    for group in contests:
        known = [value for value in (next(ahead) for _ in group) if value is not None]
        found.append(sum(known) / len(known) if known else None)
    return found


def _mean(first: float | None, second: float | None) -> float | None:
    """second: of the same pair in the other order."""
    return None if first is None or second is None else 0.5 + (first - second) / 2  # exact where both are equal
