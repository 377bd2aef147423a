"""Saved states: trusted only as they were saved, torn or edited ones give way to the one before, and none is left over."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from align.errors import Interrupted
from align.progress import Progress
from align.state import complete_states, mark_complete
from align.stopping import signals_handled
from align.trainer import train
from tests.faults import MOST, Faults, broken, full, killed
from tests.test_trainer import StopsAfter, task, weights


def save(folder: Path, step: int, text: str = "weights") -> Path:
    """What the trainer writes, and its mark."""
    state = folder / f"checkpoint-{step}"
    state.mkdir(parents=True, exist_ok=True)
    (state / "trained.safetensors").write_text(f"{text} {step}")
    (state / "optimizer.pt").write_text(f"moments {step}")
    mark_complete(folder, step)
    return state


def steps(folder: Path) -> list[int]:
    return [int(state.name.rpartition("-")[2]) for state in complete_states(folder)]


def said_of(folder: Path) -> list[str]:
    said: list[str] = []
    complete_states(folder, said.append)
    return said


DAMAGE: dict[str, Callable[[Path], object]] = {
    "trained.safetensors has 4 bytes instead of": lambda state: os.truncate(state / "trained.safetensors", 4),
    "trained.safetensors has changed": lambda state: (state / "trained.safetensors").write_text("weightz 3"),
    "optimizer.pt is missing": lambda state: (state / "optimizer.pt").unlink(),
    "complete.json cannot be read": lambda state: (state / "complete.json").write_text('{"step": 3'),
}


@pytest.mark.parametrize("why", DAMAGE)
def test_a_state_that_is_not_as_it_was_saved_is_not_used_and_its_file_is_named(why: str, tmp_path: Path) -> None:
    states = [save(tmp_path, step) for step in (2, 3)]
    assert steps(tmp_path) == [2, 3]
    assert said_of(tmp_path) == []
    DAMAGE[why](states[1])
    assert steps(tmp_path) == [2]
    assert why in said_of(tmp_path)[0]


def test_the_newest_two_are_kept_and_what_killed_saves_left_goes(tmp_path: Path) -> None:
    half = tmp_path / "checkpoint-1"
    half.mkdir()
    (half / "trained.safetensors").write_text("half")
    for step in (2, 4, 6):
        save(tmp_path, step)
    assert steps(tmp_path) == [4, 6]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-6"]


def test_a_state_saved_once_more_where_a_kill_left_half_of_it_is_whole(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-2").mkdir()
    for name in ("trained.safetensors", "complete.json.aside"):
        (tmp_path / "checkpoint-2" / name).write_text("half")
    save(tmp_path, 2)
    assert steps(tmp_path) == [2]
    assert said_of(tmp_path) == []


@pytest.mark.parametrize("act", [full, broken])
def test_a_save_that_fails_at_any_call_leaves_the_states_before_it(act: Callable[[str], None], tmp_path: Path) -> None:
    for countdown in range(MOST):
        folder = tmp_path / str(countdown)
        save(folder, 1), save(folder, 2)
        faults = Faults(countdown, act)
        with faults.armed():
            try:
                save(folder, 3)
            except OSError:
                assert steps(folder) in ([1, 2], [1, 2, 3], [2, 3])
        if not faults.fired:
            return
        save(folder, 3)
        assert steps(folder) == [2, 3]
        assert len(list(folder.iterdir())) == 2
    raise AssertionError("never came to an end")


@pytest.mark.slow
def test_a_save_killed_at_any_call_leaves_the_states_before_it(tmp_path: Path) -> None:
    for countdown in range(MOST):
        folder = tmp_path / str(countdown)
        save(folder / "state", 1), save(folder / "state", 2)
        if not killed(folder / "home", lambda _: save(folder / "state", 3), countdown):  # noqa: B023 (called at once)
            return
        assert steps(folder / "state") in ([1, 2], [1, 2, 3], [2, 3])
        save(folder / "state", 3)
        assert len(list((folder / "state").iterdir())) == 2
    raise AssertionError("never came to an end")


def test_a_run_whose_newest_state_was_torn_goes_on_from_the_one_before_to_the_same_weights(
    tiny_llama: Path, tmp_path: Path
) -> None:
    never = task(tiny_llama, tmp_path / "never", save_steps=1)
    train(never, Progress())
    with signals_handled(), pytest.raises(Interrupted):
        train(task(tiny_llama, tmp_path / "state", save_steps=1), StopsAfter(3, signal.SIGTERM))
    newest = complete_states(tmp_path / "state")[-1]
    os.truncate(newest / "optimizer.pt", 100)
    again = task(tiny_llama, tmp_path / "state", save_steps=1)
    train(again, Progress())
    assert torch.equal(weights(again.model), weights(never.model))
