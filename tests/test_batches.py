"""Padding, micro-batches by a token budget, and the order of an epoch."""

from __future__ import annotations

import subprocess
import sys

import torch
from hypothesis import given
from hypothesis import strategies as st

from align.batches import epoch_order, micro_batches, pad
from align.chat.encoded import Encoded

LENGTHS = st.lists(st.integers(1, 60), max_size=40)


def test_rows_are_padded_on_the_right_and_masked_by_length_not_by_id() -> None:
    rows = [Encoded([5, 0, 7], [False, True, True]), Encoded([0], [False])]  # 0 is the padding id and a real token too
    batch = pad(rows, 0)
    assert batch.input_ids.tolist() == [[5, 0, 7], [0, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.trained.tolist() == [[False, True, True], [False, False, False]]
    assert (batch.input_ids.dtype, batch.attention_mask.dtype, batch.trained.dtype) == (
        torch.long, torch.long, torch.bool,
    )  # fmt: skip


def test_no_rows_are_an_empty_batch_and_to_keeps_the_values() -> None:
    assert pad([], 0).input_ids.shape == (0, 0)
    batch = pad([Encoded([1, 2], [False, True])], 9)
    assert batch.to("cpu").trained.tolist() == batch.trained.tolist()


@given(LENGTHS, st.integers(1, 200))
def test_every_row_is_in_one_micro_batch_and_the_budget_holds(lengths: list[int], budget: int) -> None:
    groups = micro_batches(lengths, budget)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        padded = len(group) * max(lengths[i] for i in group)
        assert padded <= budget or len(group) == 1


def test_a_row_above_the_budget_is_alone_and_the_rest_are_grouped_by_length() -> None:
    assert micro_batches([2, 50, 3, 2, 3], 9) == [[1], [2, 4, 0], [3]]


@given(LENGTHS, st.integers(1, 200))
def test_without_padding_real_tokens_fill_the_budget_and_rows_keep_their_order(lengths: list[int], budget: int) -> None:
    groups = micro_batches(lengths, budget, padded=False)
    assert [index for group in groups for index in group] == list(range(len(lengths)))
    sizes = [sum(lengths[index] for index in group) for group in groups]
    assert all(size <= budget or len(group) == 1 for size, group in zip(sizes, groups, strict=True))
    assert all(size + lengths[after[0]] > budget for size, after in zip(sizes, groups[1:]))  # no group could hold more


def test_without_padding_one_long_row_takes_no_room_from_the_others() -> None:
    assert micro_batches([2, 50, 3, 2, 3], 60, padded=False) == [[0, 1, 2, 3, 4]]
    assert len(micro_batches([2, 50, 3, 2, 3], 60)) == 2
    assert micro_batches([2, 50, 3, 2, 3], 9, padded=False) == [[0], [1], [2, 3, 4]]


def test_padding_is_little_where_lengths_differ() -> None:
    lengths = [1 + (i * 37) % 100 for i in range(200)]
    padded = sum(len(g) * max(lengths[i] for i in g) for g in micro_batches(lengths, 1000))
    assert padded < 1.1 * sum(lengths)


@given(st.integers(0, 50), st.integers(0, 2**63), st.integers(0, 5))
def test_an_epoch_is_a_permutation_that_its_arguments_decide(rows: int, seed: int, epoch: int) -> None:
    order = epoch_order(rows, seed, epoch)
    assert sorted(order) == list(range(rows))
    assert order == epoch_order(rows, seed, epoch)


def test_seeds_and_epochs_differ_and_do_not_collide() -> None:
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400


def test_the_order_is_the_same_in_every_process() -> None:
    code = "from align.batches import epoch_order; import sys; sys.stdout.write(str(epoch_order(8, 3, 1)))"
    child = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONHASHSEED": "1"}, capture_output=True, text=True, check=True
    )
    assert child.stdout == str(epoch_order(8, 3, 1))
