"""States that are written in a thread: the same bytes, whole or not there, and never two of them mixed."""

from __future__ import annotations

import errno
import json
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import align.trainer
from align.errors import Interrupted, StageFailed
from align.progress import Progress
from align.registry.artifacts import disk_errors_explained
from align.saves import Saves, copied, waits_for_disk
from align.state import complete_states, damage
from align.stopping import signals_handled
from align.trainer import train
from tests.step_kit import Heard, Odd, noisy
from tests.test_trainer import task, weights

SECONDS = 0.3  # that a slow disk takes; a step of these runs takes a hundredth


@pytest.fixture
def writing(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Begins and ends of slow writes, and the thread that they ran in."""
    told: list[str] = []
    real = align.trainer._write

    def slow(*values: Any) -> None:
        told.append(f"begins in {threading.current_thread().name}")
        time.sleep(SECONDS)
        real(*values)
        told.append("ends")

    monkeypatch.setattr(align.trainer, "_write", slow)
    return told


def aside(folder: Path, state: Path, **changes: Any) -> Any:
    return replace(noisy(folder, state, **changes), save_aside=True)


def hashes(folder: Path) -> dict[str, dict[str, Any]]:
    """Of the tensors of each state; the clocks of the log are in other files."""
    found = {}
    for state in complete_states(folder):
        files = json.loads((state / "complete.json").read_text())["files"]
        found[state.name] = {
            name: files[name] for name in ("trained.safetensors", "optimizer.pt", "rng_state.pth", "loop.json")
        }
    return found


def test_it_is_for_accelerators() -> None:
    assert [waits_for_disk(torch.device(name)) for name in ("cpu", "cuda", "mps")] == [False, True, True]


def test_a_copy_is_of_now_and_keeps_its_form() -> None:
    tensor = torch.zeros(2)
    state = {"state": {0: {"step": tensor, "name": "x"}}, "groups": [{"params": [0], "betas": (0.9, 0.99)}]}
    copy = copied(state)
    tensor += 1
    assert copy == {**state, "state": {0: {"step": copy["state"][0]["step"], "name": "x"}}}
    assert copy["state"][0]["step"].tolist() == [0, 0]


def test_a_state_is_that_of_its_step_though_the_training_has_gone_on(
    tiny_gpt2: Path, tmp_path: Path, writing: list[str]
) -> None:
    """Byte for byte what is written at once; one at a time, in its thread."""
    beside, plain = (
        aside(tiny_gpt2, tmp_path / "beside", save_steps=2),
        noisy(tiny_gpt2, tmp_path / "plain", save_steps=2),
    )
    train(beside, Progress())
    assert writing == ["begins in saved state", "ends"] * 3
    train(plain, Progress())
    assert writing[-2:] == ["begins in MainThread", "ends"]
    assert hashes(tmp_path / "beside") == hashes(tmp_path / "plain")
    assert list(hashes(tmp_path / "plain")) == ["checkpoint-4", "checkpoint-5"]


def test_a_signal_while_the_thread_writes_leaves_both_states_whole(
    tiny_gpt2: Path, tmp_path: Path, writing: list[str]
) -> None:
    never = noisy(tiny_gpt2, tmp_path / "never")
    train(never, Progress())
    with signals_handled(), pytest.raises(Interrupted):
        train(aside(tiny_gpt2, tmp_path / "state", save_steps=2), Heard(stop=(3, signal.SIGTERM)))
    assert writing.count("ends") == 3  # one of them of `never`
    states = complete_states(tmp_path / "state")
    assert [state.name for state in states] == ["checkpoint-2", "checkpoint-3"]
    assert [damage(state) for state in states] == ["", ""]
    again = aside(tiny_gpt2, tmp_path / "state", save_steps=2)
    train(again, Progress())
    assert torch.equal(weights(again.model), weights(never.model))


def test_a_kill_while_the_thread_writes_leaves_the_state_before(
    tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write of step 4 never comes to its mark: as if the process had died there."""
    never = noisy(tiny_gpt2, tmp_path / "never")
    train(never, Progress())
    real = align.trainer.mark_complete
    monkeypatch.setattr(align.trainer, "mark_complete", lambda folder, step: real(folder, step) if step == 2 else None)
    train(
        aside(
            tiny_gpt2,
            tmp_path / "state",
            save_steps=2,
        ),
        Progress(),
    )
    monkeypatch.setattr(align.trainer, "mark_complete", real)
    assert [state.name for state in complete_states(tmp_path / "state")] == ["checkpoint-2"]
    again = aside(tiny_gpt2, tmp_path / "state", save_steps=2)
    train(again, Progress())
    assert torch.equal(weights(again.model), weights(never.model))


def failing_after(count: int, real: Callable[..., None]) -> Callable[..., None]:
    calls = 0

    def write(*values: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > count:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*values)

    return write


@pytest.mark.parametrize("written", [0, 1, 2])
def test_a_disk_that_is_full_fails_the_run_in_the_words_of_a_state_written_at_once(
    written: int, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the step after it, at the next save, or at the end of the training, whichever comes first."""
    real, messages = align.trainer._write, []
    for way in (True, False):
        monkeypatch.setattr(align.trainer, "_write", failing_after(written, real))
        failing = replace(task(tiny_llama, tmp_path / "state", save_steps=2), save_aside=way)
        with pytest.raises(StageFailed) as failure, disk_errors_explained(tmp_path):
            train(failing, Progress())
        messages.append(failure.value.message)
        assert len(complete_states(tmp_path / "state")) == written
        for state in complete_states(tmp_path / "state"):
            (state / "complete.json").unlink()
    assert messages[0] == messages[1]


def test_an_error_of_the_training_waits_for_the_thread_and_is_the_one_that_is_told(
    tiny_gpt2: Path, tmp_path: Path, writing: list[str]
) -> None:
    broken = replace(aside(tiny_gpt2, tmp_path, save_steps=1), objective=Odd(loss={2: float("nan")}))
    with pytest.raises(StageFailed, match="the loss is nan at step 2"):
        train(broken, Progress())
    assert writing == ["begins in saved state", "ends"]
    assert [state.name for state in complete_states(tmp_path)] == ["checkpoint-1"]


def test_a_second_signal_does_not_wait() -> None:
    held, left = threading.Event(), []
    saves = Saves(aside=True)
    saves.begin(lambda: left.append(held.wait(60)))
    with pytest.raises(Interrupted), saves:
        raise Interrupted(signal.SIGINT, "stopped by SIGINT")
    assert left == []
    held.set()
    saves.wait()
    assert left == [True]
