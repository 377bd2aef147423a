"""Encoded rows -> padded tensors, and which rows go together: order of an epoch, micro-batches of like length.

Left out: packing of several rows into one (it needs document masks), and any loss.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from align.chat.encoded import Encoded


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded rows, (B, T) each. attention_mask: 1 for real tokens (long); trained: labels (bool), never padding."""

    input_ids: Tensor
    attention_mask: Tensor
    trained: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.trained.to(device))


def pad(rows: Sequence[Encoded], pad_id: int) -> Batch:
    """Rows side by side, padded on the right to the longest. Masks come from lengths: pad_id may be any id."""
    shape = (len(rows), max((len(row.ids) for row in rows), default=0))
    input_ids = torch.full(shape, pad_id, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    trained = torch.zeros(shape, dtype=torch.bool)
    for index, row in enumerate(rows):
        length = len(row.ids)
        input_ids[index, :length] = torch.tensor(row.ids, dtype=torch.long)
        attention_mask[index, :length] = 1
        trained[index, :length] = torch.tensor(row.trained, dtype=torch.bool)
    return Batch(input_ids, attention_mask, trained)


def micro_batches(lengths: Sequence[int], budget: int, *, padded: bool = True) -> list[list[int]]:
    """Indices of rows in groups that are within `budget` tokens. Each index occurs exactly once.

    padded: a group's size is rows x longest. Rows of like length stand together, so little is padding, longest group
    first; equal lengths keep their order. Else its size is the tokens of its rows, and all keep their order. A row that
    is longer than the budget is a group of its own.
    """
    return _of_like_length(lengths, budget) if padded else _in_order(lengths, budget)


def _in_order(lengths: Sequence[int], budget: int) -> list[list[int]]:
    groups: list[list[int]] = []
    left = 0
    for index, length in enumerate(lengths):
        if groups and length <= left:
            groups[-1].append(index)
        else:
            groups.append([index])
            left = budget
        left -= length
    return groups


def _of_like_length(lengths: Sequence[int], budget: int) -> list[list[int]]:
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def epoch_order(rows: int, seed: int, epoch: int) -> list[int]:
    """A permutation of range(rows) that depends on nothing but the three arguments."""
    order = list(range(rows))
    random.Random(f"{seed}/{epoch}").shuffle(order)  # seeding by text is stable across runs and Python versions
    return order
