"""The loop: the same result however a step is cut up, exact resume, and a stop for every number that is not finite."""

from __future__ import annotations

import signal
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from align.chat.encoded import Encoded
from align.errors import Interrupted, StageFailed
from align.models.loading import load_policy
from align.models.source import source_of
from align.progress import Progress
from align.recipe.settings import AdapterSettings, SftSettings
from align.stages.objectives import AnswerLoss
from align.state import complete_states
from align.steps import measure
from align.stopping import signals_handled
from align.streams import RowStream
from align.trainer import Task, train
from tests.ppo_kit import Listener


def settings(**changes) -> SftSettings:
    plain = {"kind": "sft", "data": "x", "batch_size": 4, "epochs": 2.0, "learning_rate": 1e-3, "precision": "float32"}
    return SftSettings.model_validate(plain | changes)


def rows(count: int = 10) -> list[Encoded]:
    """Rows of different lengths whose second half is trained."""
    generator = torch.Generator().manual_seed(0)
    lengths = [6 + 5 * (number % 5) for number in range(count)]
    ids = [torch.randint(3, 280, (length,), generator=generator).tolist() for length in lengths]
    return [Encoded(row, [place >= len(row) // 2 for place in range(len(row))]) for row in ids]


def task(folder: Path, state: Path, some: list[Encoded] | None = None, **changes) -> Task:
    model = load_policy(source_of(folder), trainable=True, precision="float32")
    return Task(model, AnswerLoss(), some or rows(), [], settings(**changes), 0, state)


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


class StopsAfter(Progress):
    """Sends a signal to this process after a step."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    @contextmanager
    def bar(self, title: str, total: float):
        progress, done = self, 0

        class Bar:
            def advance(self, amount: float = 1, *, tokens: int = 0, note: str = "") -> None:
                nonlocal done
                done += amount
                if amount and done == progress.step:
                    signal.raise_signal(progress.number)

        yield Bar()


def test_a_step_cut_into_micro_batches_gives_the_same_weights(tiny_llama: Path, tmp_path: Path) -> None:
    whole, cut = task(tiny_llama, tmp_path / "a"), task(tiny_llama, tmp_path / "b", batch_tokens=16)
    train(whole, Progress())
    train(cut, Progress())
    start = weights(load_policy(source_of(tiny_llama)))
    moved = (weights(whole.model) - start).norm()
    assert moved > 0.1
    assert (weights(whole.model) - weights(cut.model)).norm() / moved < 1e-3


@pytest.mark.parametrize("step", [1, 3, 4])
def test_resumed_equals_uninterrupted_to_the_bit(tiny_llama: Path, tmp_path: Path, step: int) -> None:
    never, stopped = task(tiny_llama, tmp_path / "never"), task(tiny_llama, tmp_path / "state")
    train(never, Progress())
    with signals_handled(), pytest.raises(Interrupted) as stop:
        train(stopped, StopsAfter(step, signal.SIGTERM))
    assert stop.value.exit_code == 143
    assert not torch.equal(weights(stopped.model), weights(never.model))
    with signals_handled():
        again = task(tiny_llama, tmp_path / "state")
        train(again, Progress())
    assert torch.equal(weights(again.model), weights(never.model))


class Crashes(Listener):
    """Ends the training after a step as a bug would."""

    step = -1  # none

    @contextmanager
    def bar(self, title: str, total: float):
        listener, done = self, 0

        class Bar:
            def advance(self, amount: float = 1, *, tokens: int = 0, note: str = "") -> None:
                nonlocal done
                done += amount
                if title == "training" and done == listener.step:
                    raise RuntimeError("a bug")

        yield Bar()


def test_a_resumed_log_goes_on_from_the_step_of_the_state(tiny_llama: Path, tmp_path: Path) -> None:
    """What was logged after the state that a crash left is forgotten, and no step stands there twice."""
    heard, changes = Crashes(), {"save_steps": 2, "log_steps": 1}
    heard.step = 4
    with pytest.raises(RuntimeError, match="a bug"):
        train(task(tiny_llama, tmp_path, **changes), heard)
    steps = [step for step, values in heard.log if "train.loss" in values]
    assert steps == [1, 2, 3]
    heard.step = -1
    train(task(tiny_llama, tmp_path, **changes), heard)
    assert [step for step, values in heard.log if "train.loss" in values] == [1, 2, 3, 4, 5]
    train(task(tiny_llama, tmp_path / "anew", **changes), heard)
    assert [step for step, values in heard.log if "train.loss" in values] == [1, 2, 3, 4, 5]


def test_a_state_without_its_mark_is_not_resumed_from(tiny_llama: Path, tmp_path: Path) -> None:
    with signals_handled(), pytest.raises(Interrupted):
        train(task(tiny_llama, tmp_path), StopsAfter(2, signal.SIGINT))
    (state,) = complete_states(tmp_path)
    (state / "complete.json").unlink()
    assert complete_states(tmp_path) == []


def test_eight_rows_can_be_learnt_by_heart(tiny_llama: Path, tmp_path: Path) -> None:
    learnt = task(tiny_llama, tmp_path, rows(8), epochs=100.0, learning_rate=1e-2, batch_size=8)
    before = measure(learnt.model, learnt.objective, learnt.rows, learnt.settings)["loss"]
    train(learnt, Progress())
    assert before > 5
    assert measure(learnt.model, learnt.objective, learnt.rows, learnt.settings)["loss"] < 0.1


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_rows(tiny_llama: Path, tmp_path: Path) -> None:
    broken = task(tiny_llama, tmp_path)
    with torch.no_grad():
        next(broken.model.parameters()).mul_(1e38)
    with pytest.raises(StageFailed, match=r"at step 1, on training rows \[\d+, \d+, \d+, \d+\]"):
        train(broken, Progress())
    assert complete_states(tmp_path) == []


def test_each_epoch_has_every_row_once_and_batches_cross_its_seam() -> None:
    stream = RowStream(10, settings(epochs=3.0, batch_size=4), seed=1)
    batches = list(stream)
    flat = [row for batch in batches for row in batch]
    assert len(batches) == len(stream) == settings(epochs=3.0).steps(10) == 8
    assert [sorted(flat[start : start + 10]) for start in (0, 10, 20)] == [list(range(10))] * 3
    assert flat[:10] != flat[10:20]
    assert flat == [row for batch in RowStream(10, settings(epochs=3.0), seed=1) for row in batch]
    assert flat != [row for batch in RowStream(10, settings(epochs=3.0), seed=2) for row in batch]


@pytest.mark.parametrize("adapter", [None, AdapterSettings(rank=4, dropout=0.5)], ids=["model", "adapter"])
def test_measuring_leaves_the_mode_and_the_weights(
    tiny_gpt2: Path, tmp_path: Path, adapter: AdapterSettings | None
) -> None:
    """Held-out rows are measured without the dropout that the model trains with."""
    model = load_policy(source_of(tiny_gpt2), adapter=adapter, trainable=True, precision="float32", dropout=not adapter)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.1)
    some = replace(task(tiny_gpt2, tmp_path), model=model)
    before = weights(model).clone()
    noisy = [float(some.objective(model, some.rows)[0].detach()) for _ in range(2)]
    assert noisy[0] != noisy[1]
    first = measure(model, some.objective, some.rows, some.settings)
    assert model.training
    assert first == measure(model, some.objective, some.rows, some.settings)
    assert torch.equal(before, weights(model))
    with torch.no_grad():
        quiet = float(some.objective(model.eval(), some.rows)[0]) / some.objective.weight(some.rows)
    assert first["loss"] == pytest.approx(quiet, rel=1e-6)


@pytest.mark.parametrize(("count", "epochs", "size", "steps"), [(10, 0.03, 4, 1), (30, 0.1, 1, 3), (41, 0.4, 16, 1)])
def test_parts_of_an_epoch_give_as_many_batches_as_they_say(count: int, epochs: float, size: int, steps: int) -> None:
    stream = RowStream(count, settings(epochs=epochs, batch_size=size), seed=1)
    assert len(list(stream)) == len(stream) == steps
