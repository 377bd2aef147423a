"""Where rows lie when they go through a model one after the other, and a beginning that several share lies there once.

    rows     [p p p a a]  [p p p b b b]  [c c]
    laid out [p p p a a | b b b | c c]            b's positions go on from p's, and b attends to p and itself

Rows are put in order first, so it does not matter which stood side by side. Left out: beginnings within beginnings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, pairwise

import torch
from torch import Tensor

LEAST_TOKENS = 8  # a shorter beginning costs more to set apart than it saves
LEAST_SHARE = 1 / 8  # of what comes after it: a mask makes a long rest's attention dearer than a causal one


@dataclass(frozen=True, slots=True)
class Block:
    """Rows that begin alike: the first one whole, and of each other what comes after the shared `beginning`, in tokens."""

    first: int
    beginning: int = 0
    rests: tuple[int, ...] = ()


@dataclass(frozen=True)
class Layout:
    """Rows as one sequence of N tokens.

    ids, positions: of each token laid out, N. places: where each token of the rows lies, row after row as they were
    given. blocks: how the sequence is made up.
    """

    ids: list[int]
    positions: list[int]
    places: list[int]
    blocks: list[Block]
    _masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], least: int = LEAST_TOKENS) -> Layout:
        """Each beginning of at least so many tokens once. No row may be empty."""
        ids: list[int] = []
        positions: list[int] = []
        places: list[Sequence[int]] = [()] * len(rows)
        blocks: list[Block] = []
        for group, beginning in shared_beginnings(rows, least):
            start = len(ids)
            for number in group:
                known = 0 if number == group[0] else beginning
                row, at = rows[number], len(ids)
                places[number] = [*range(start, start + known), *range(at, at + len(row) - known)]
                ids += row[known:]
                positions += range(known, len(row))
            lengths = [len(rows[number]) for number in group]
            blocks.append(Block(lengths[0], beginning, tuple(n - beginning for n in lengths[1:] if n > beginning)))
        return cls(ids, positions, list(chain.from_iterable(places)), blocks)

    @cached_property
    def lengths(self) -> list[int]:
        """Of the pieces that the sequence is cut into: of each block the first row, then the rests."""
        return [length for block in self.blocks for length in (block.first, *block.rests)]

    @property
    def shares(self) -> bool:
        """Whether any token of the rows lies at the place of another one's; else the sequence is the rows in order."""
        return len(self.ids) < len(self.places)

    def mask(self, beginning: int, rest: int, width: int | None) -> Tensor | None:
        """What a rest sees of [beginning | rest], (rest, beginning + rest) bool; None: all up to itself, from the start.

        width: of a sliding window, itself included.
        """
        if not beginning and (width is None or rest <= width):
            return None
        key = (beginning, rest, width)
        if key not in self._masks:  # the same in every layer
            here = torch.arange(beginning + rest)
            distance = here[beginning:, None] - here[None]
            self._masks[key] = (distance >= 0) if width is None else (distance >= 0) & (distance < width)
        return self._masks[key]


def shared_beginnings(rows: Sequence[Sequence[int]], least: int = LEAST_TOKENS) -> list[tuple[list[int], int]]:
    """Groups of rows by number with the tokens that all of a group begin with (0 for a row by itself), each row once.

    Within a group the longest row comes first; groups come in the order of their lowest numbers.
    """
    order = sorted(range(len(rows)), key=lambda number: list(rows[number]))  # what begins alike stands side by side
    common = [_common(rows[one], rows[other]) for one, other in pairwise(order)]
    groups: list[tuple[list[int], int]] = []
    group, beginning = order[:1], 0
    for number, before, ahead in zip(order[1:], common, [*common[1:], 0]):
        length = min(before, beginning or before)
        gain = len(group) * length - (len(group) - 1) * beginning
        worth = length >= max(least, LEAST_SHARE * (len(rows[number]) - length))
        if worth and gain > 0 and gain + length > ahead:  # else the row has more of a group with the next one
            group, beginning = [*group, number], length
        else:
            groups.append((group, beginning))
            group, beginning = [number], 0
    groups.append((group, beginning))
    longest_first = (
        (sorted(group, key=lambda n: (-len(rows[n]), n)), beginning) for group, beginning in groups if group
    )
    return sorted(longest_first, key=lambda found: min(found[0]))


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two rows begin with alike."""
    for place, (one, other) in enumerate(zip(first, second)):
        if one != other:
            return place
    return min(len(first), len(second))
