"""Saved states: trusted only as they were saved, torn or edited ones give way to the one before, and none is left over."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from align.errors import Interrupted
from align.progress import Progress
from align.state import FORMAT, complete_states, mark_complete
from align.stopping import signals_handled
from align.trainer import train
from tests.faults import MOST, Faults, broken, full, killed
from tests.resume_cases import CASES, model_of, port_of
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
    "another version of align saved it": lambda state: marked_as(state, format=1),
}
MARKS = (
    "[]",
    "null",
    "3",
    "{}",
    '{"files": null}',
    '{"files": [1]}',
    '{"files": {"a": 1}}',
    '{"files": {"a": [1]}}',
    "[" * 100_000,
)


def marked_as(state: Path, **changed: object) -> None:
    mark = state / "complete.json"
    mark.write_text(json.dumps({**json.loads(mark.read_text()), **changed}))


@pytest.mark.parametrize("why", DAMAGE)
def test_a_state_that_is_not_as_it_was_saved_is_not_used_and_its_file_is_named(why: str, tmp_path: Path) -> None:
    states = [save(tmp_path, step) for step in (2, 3)]
    assert steps(tmp_path) == [2, 3]
    assert said_of(tmp_path) == []
    DAMAGE[why](states[1])
    assert steps(tmp_path) == [2]
    assert why in said_of(tmp_path)[0]


@pytest.mark.parametrize("text", MARKS)
def test_whatever_stands_in_a_mark_the_state_is_not_used_and_that_is_said(text: str, tmp_path: Path) -> None:
    states = [save(tmp_path, step) for step in (2, 3)]
    (states[1] / "complete.json").write_text(text)
    assert steps(tmp_path) == [2]
    assert "complete.json cannot be read" in said_of(tmp_path)[0]


def test_a_folder_for_a_mark_and_a_state_without_a_number_are_no_states(tmp_path: Path) -> None:
    save(tmp_path, 2)
    (tmp_path / "checkpoint-3/complete.json").mkdir(parents=True)
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-2 (copy)")
    assert steps(tmp_path) == [2]


LAYOUT = {
    "files": [
        "loop.json", "optimizer.pt", "ppo.json", "rng_state.pth", "round.json", "round.safetensors", "scheduler.pt",
        "trained.safetensors", "trainer_state.json",
    ],
    "loop.json": {"batch_tokens": [], "watch": ["first", "good", "norms", "skipped"]},
    "ppo.json": {
        "kl": ["horizon", "target", "value"], "moments": ["count", "m2", "mean"],
        "guards": ["active", "exam", "first", "raised"], "proof": [], "journal": ["exams", "rounds", "stopped_by"],
        "round_is_over": [], "kl_of_step": [],
    },
}  # fmt: skip


def layout(value: Mapping[str, Any]) -> dict[str, list[str]]:
    """Names in a file of JSON, and in each part that has names the names of that."""
    return {name: sorted(part) if isinstance(part, dict) else [] for name, part in value.items()}


def test_what_a_state_consists_of_is_that_of_its_format(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever changes this changes FORMAT too: else a state that an older align saved is taken up, and read wrong."""
    case = CASES["ppo-gae"]
    found: dict[str, Any] = {}

    def seen(folder: Path, step: int) -> None:
        state = folder / f"checkpoint-{step}"
        found["files"] = sorted(path.name for path in state.iterdir())
        found.update({name: layout(json.loads((state / name).read_text())) for name in ("loop.json", "ppo.json")})
        mark_complete(folder, step)

    monkeypatch.setattr("align.trainer.mark_complete", seen)
    port_of(case, tmp_path / "port", model_of(case, request)).run()
    assert (FORMAT, found) == (2, LAYOUT)


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
