"""Beginnings that several prompts share, such as worked examples, so that they are read once. No model here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from align.rollout.rows import Row

LEAST_TOKENS = 32  # a shorter beginning costs more to set apart than it saves
LEAST_SHARE = 0.75  # of a group's beginning that the next prompt must share, else a group of its own begins with it


@dataclass(slots=True, eq=False)
class Prefix:
    """The first tokens of some prompts; states: keys and values of each layer, (1, heads, T, width), once it is read."""

    ids: Sequence[int]
    states: list[tuple[Tensor, Tensor]] = field(default_factory=list)


def shared_prefixes(rows: Sequence[Row]) -> dict[int, Prefix]:
    """By a row's index, the beginning that its prompt shares with another one's; at least one token of it is left over.

    Prompts are put in order, so that those with a common beginning stand side by side.
    """
    ordered = sorted(rows, key=lambda row: (list(row.prompt), row.index))
    found: dict[int, Prefix] = {}
    group: list[Row] = []
    length = 0
    for row in ordered:
        common = _common(group[-1].prompt, row.prompt) if group else 0
        common = min(common, len(row.prompt) - 1, length or common)
        if group and common >= max(LEAST_TOKENS, LEAST_SHARE * (length or common)):
            group.append(row)
            length = min(common, len(group[0].prompt) - 1)
        else:
            _close(group, length, found)
            group, length = [row], 0
    _close(group, length, found)
    return found


def _close(group: Sequence[Row], length: int, found: dict[int, Prefix]) -> None:
    if len(group) > 1 and length >= LEAST_TOKENS:
        prefix = Prefix(list(group[0].prompt[:length]))
        found.update({row.index: prefix for row in group})


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two prompts begin with alike."""
    for place, (one, other) in enumerate(zip(first, second)):
        if one != other:
            return place
    return min(len(first), len(second))
