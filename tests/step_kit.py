"""Steps that go wrong on purpose: losses, gradients and memory, and a listener that keeps what is said of them."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from align.models.loading import load_policy
from align.models.source import source_of
from align.progress import Progress
from align.stages.objectives import AnswerLoss
from align.trainer import Task
from tests.test_trainer import task

MORE_THAN_ANY_MACHINE = 2**50  # bytes


def noisy(folder: Path, state: Path, **changes: Any) -> Task:
    """A task whose model drops out as its config says."""
    model = load_policy(source_of(folder), trainable=True, precision="float32", dropout=True)
    assert any(module.p for module in model.modules() if isinstance(module, nn.Dropout))
    return replace(task(folder, state, **changes), model=model)


class Odd(AnswerLoss):
    """An objective whose loss, or only its gradient, is multiplied in some steps. Goes on counting when resumed."""

    def __init__(self, loss: Mapping[int, float] | None = None, gradient: Mapping[int, float] | None = None) -> None:
        self.loss, self.gradient = loss or {}, gradient or {}
        self.step = self.calls = 0

    def prepared(self, model: nn.Module, rows: Sequence[Any]) -> Sequence[Any]:
        self.step += 1
        return rows

    def __call__(self, model: nn.Module, rows: Sequence[Any]) -> tuple[Tensor, dict[str, float]]:
        self.calls += 1
        loss, numbers = super().__call__(model, rows)
        loss = loss * self.loss.get(self.step, 1.0)
        if self.step in self.gradient:
            loss.register_hook(lambda gradient: gradient * self.gradient[self.step])
        return loss, {**numbers, "seen": float(loss.detach())}

    def save(self, folder: Path) -> None:
        (folder / "odd.json").write_text(json.dumps(self.step))

    def load(self, folder: Path) -> None:
        self.step = json.loads((folder / "odd.json").read_text())


class Cramped(AnswerLoss):
    """An objective that asks for memory that no machine has when more than `room` tokens go through the model at once."""

    def __init__(self, room: int) -> None:
        self.room, self.failed = room, 0

    def __call__(self, model: nn.Module, rows: Sequence[Any]) -> tuple[Tensor, dict[str, float]]:
        loss, numbers = super().__call__(model, rows)  # dropout has drawn its noise by now
        if sum(map(self.tokens, rows)) > self.room:
            self.failed += 1
            if loss.requires_grad:
                loss.backward()  # and some gradients are there
            torch.empty(MORE_THAN_ANY_MACHINE, dtype=torch.uint8)
        return loss, numbers


class Heard(Progress):
    """Keeps notes and metrics, and sends a signal after a step. stop: (step, signal)."""

    def __init__(self, stop: tuple[int, int] | None = None) -> None:
        self.stop = stop
        self.notes: list[str] = []
        self.values: dict[str, dict[int, float]] = {}

    def note(self, text: str) -> None:
        self.notes.append(text)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.values.setdefault(name, {})[step] = value

    @contextmanager
    def bar(self, title: str, total: float) -> Iterator[Any]:
        heard, done = self, 0.0

        class Bar:
            def advance(self, amount: float = 1, *, tokens: int = 0, note: str = "") -> None:
                nonlocal done
                done += amount
                if title == "training" and amount and heard.stop and done == heard.stop[0]:
                    signal.raise_signal(heard.stop[1])

        yield Bar()
