"""A step that cannot be made: numbers that are not finite and memory that is not there end the run with what to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from align.errors import StageFailed
from align.progress import Progress
from align.state import complete_states
from align.trainer import train
from tests.test_trainer import task, weights


def test_a_gradient_that_is_not_finite_stops_the_run_with_the_weights_as_they_were(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """The loss is finite, and only its gradient is not."""
    broken = task(tiny_llama, tmp_path)
    parameter = next(iter(broken.model.parameters()))
    parameter.register_hook(lambda gradient: gradient * float("inf"))
    before = weights(broken.model).clone()
    with pytest.raises(StageFailed, match=r"the gradient norm is (nan|inf) at step 1, on training rows \[") as failure:
        train(broken, Progress())
    assert "learning_rate" in failure.value.hint
    assert failure.value.exit_code == 1
    assert torch.equal(weights(broken.model), before)
    assert complete_states(tmp_path) == []


def test_a_run_that_fails_later_keeps_its_states_and_names_the_rows(tiny_llama: Path, tmp_path: Path) -> None:
    broken = task(tiny_llama, tmp_path, save_steps=1)
    objective, calls = type(broken.objective).__call__, 0

    def fails_in_the_third_step(self: Any, model: Any, rows: Any) -> Any:
        nonlocal calls
        calls += 1
        loss, numbers = objective(self, model, rows)
        return (loss * float("nan") if calls == 3 else loss), numbers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(broken.objective), "__call__", fails_in_the_third_step)
        with pytest.raises(StageFailed, match="the loss is nan at step 3, on training rows"):
            train(broken, Progress())
    assert [state.name for state in complete_states(tmp_path)] == ["checkpoint-1", "checkpoint-2"]


def test_too_little_memory_is_said_with_the_setting_to_lower(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = task(tiny_llama, tmp_path)

    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has ...")

    monkeypatch.setattr(type(large.objective), "__call__", no_memory)
    with pytest.raises(StageFailed, match=r"out of memory .*Tried to allocate 20\.00 MiB") as failure:
        train(large, Progress())
    assert "Lower batch_tokens" in failure.value.hint
