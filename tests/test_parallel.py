"""How a step's rows are shared out, and how a process finds its place among others."""

from __future__ import annotations

import os
import random
from functools import partial

import pytest

from align.batches import micro_batches
from align.errors import AlignError
from align.parallel import crew as crew_module
from align.parallel.crew import crew
from align.parallel.shares import groups_of_all, shares


def test_every_row_has_one_process_and_no_process_has_much_more_than_another() -> None:
    chance = random.Random(0)
    for _ in range(200):
        lengths = [chance.choice([3, 9, 40, 200, 1000]) for _ in range(chance.randrange(0, 30))]
        processes = chance.randrange(1, 9)
        parts = shares(lengths, processes)
        assert sorted(index for part in parts for index in part) == list(range(len(lengths)))
        tokens = [sum(lengths[index] for index in part) for part in parts]
        assert max(tokens) - min(tokens) <= max(lengths, default=0)
        assert parts == shares(list(lengths), processes)


def test_worked_by_hand() -> None:
    assert shares([5, 1, 4, 3, 3], 2) == [[0, 4], [1, 2, 3]]  # 5 + 3 and 4 + 3 + 1
    assert shares([7], 3) == [[0], [], []]


def test_micro_batches_of_a_share_name_rows_of_the_step() -> None:
    lengths = [10, 60, 20, 30, 50, 40]
    found = groups_of_all(lengths, 2, partial(micro_batches, budget=60))
    assert sorted(row for groups in found for group in groups for row in group) == [0, 1, 2, 3, 4, 5]
    assert all(len(group) * max(lengths[row] for row in group) <= 60 for groups in found for group in groups)


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Variables that a launcher sets, gone again after the test."""
    monkeypatch.setattr(crew_module, "_crew", None)
    before = dict(os.environ)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "4,6"}.items():
        monkeypatch.setenv(name, value)
    yield monkeypatch
    os.environ.clear()
    os.environ.update(before)


def test_a_place_is_read_once_and_hidden(place: pytest.MonkeyPatch) -> None:
    place.setenv("ACCELERATE_USE_FSDP", "true")
    place.setenv("OMPI_COMM_WORLD_SIZE", "8")
    member = crew()
    assert member is not None
    assert (member.rank, member.size, member.strategy, member.leads) == (5, 8, "fsdp", False)
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_USE_FSDP", "OMPI_COMM_WORLD_SIZE"} & set(os.environ)
    assert crew() is member


@pytest.mark.parametrize(("visible", "seen"), [("4,6", "6"), ("3", "3"), ("", "1"), ("4", "4")])
def test_a_process_sees_one_accelerator(place: pytest.MonkeyPatch, visible: str, seen: str) -> None:
    place.setenv("CUDA_VISIBLE_DEVICES", visible)
    crew()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


def test_one_process_under_a_launcher_is_alone(place: pytest.MonkeyPatch) -> None:
    place.setenv("WORLD_SIZE", "1")
    assert crew() is None
    assert os.environ["RANK"] == "5"


def test_deepspeed_is_refused_in_words(place: pytest.MonkeyPatch) -> None:
    place.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(AlignError, match="under DeepSpeed"):
        crew()
