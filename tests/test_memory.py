"""Too little memory: said in bytes with what to change, or made do with, as a run that had the smaller budget would."""

from __future__ import annotations

import signal
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import align.ppo.collection
import align.ppo.objective
import align.stages.objectives
from align.errors import AlignError, Interrupted, StageFailed, lacks_memory
from align.launch.job import check_launch
from align.memory import Budget
from align.progress import Progress
from align.recipe.settings import KtoLoss
from align.stages.objectives import AnswerLoss, RatedLoss, RatedRow
from align.steps import measure
from align.stopping import signals_handled
from align.trainer import Task, train
from align.units import in_units
from tests.ppo_kit import chat_base
from tests.step_kit import MORE_THAN_ANY_MACHINE, Cramped, Heard, noisy
from tests.test_ppo_stage import run, trained
from tests.test_run import bench_in
from tests.test_trainer import rows, task, weights

ROOM = 32  # tokens; the longest row has 26


def cramped(folder: Path, state: Path, room: int = ROOM, **changes: Any) -> Task:
    return replace(task(folder, state, **changes), objective=Cramped(room))


# Said ----------------------------------------------------------------------------------------------------------------


def test_what_the_cpu_cannot_give_is_said_with_how_much_and_what_to_change(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(
        StageFailed, match=r"out of memory with batch_tokens: 8192 \(1\.0 PiB were asked for, .* free\)"
    ) as failure:
        train(cramped(tiny_llama, tmp_path), Progress())
    assert "Lower batch_tokens" in failure.value.hint
    assert "fit: auto" in failure.value.hint
    assert failure.value.exit_code == 1


def test_what_a_gpu_cannot_give_is_said_too(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = task(tiny_llama, tmp_path)

    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has ...")

    monkeypatch.setattr(type(large.objective), "__call__", no_memory)
    with pytest.raises(StageFailed, match=r"out of memory with batch_tokens: 8192 \(20\.0 MiB were asked for"):
        train(large, Progress())


def test_memory_that_is_short_outside_the_micro_batches_is_said_otherwise(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optimiser's moments, say."""
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_, **__: torch.empty(MORE_THAN_ANY_MACHINE))
    with pytest.raises(StageFailed, match=r"out of memory in training \(4\.0 PiB were asked for") as failure:
        train(task(tiny_llama, tmp_path, fit="auto"), Progress())
    assert "batch_tokens" not in failure.value.hint


def test_nothing_of_a_micro_batch_is_there_when_the_next_one_is_computed(tiny_llama: Path, tmp_path: Path) -> None:
    """The nodes of its graph are small, but lie between the large blocks that it freed."""
    losses: list[weakref.ref[torch.Tensor]] = []

    class Watched(AnswerLoss):
        def __call__(self, model: nn.Module, some: Sequence[Any]) -> Any:
            assert all(loss() is None for loss in losses)
            loss, more = super().__call__(model, some)
            losses.append(weakref.ref(loss))
            return loss, more

    train(replace(task(tiny_llama, tmp_path, batch_tokens=ROOM), objective=Watched()), Progress())
    assert len(losses) > 4


def test_errors_that_are_not_about_memory_are_left_alone(tiny_llama: Path, tmp_path: Path) -> None:
    class Wrong(AnswerLoss):
        def __call__(self, model: nn.Module, some: Sequence[Any]) -> Any:
            raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        train(replace(task(tiny_llama, tmp_path, fit="auto"), objective=Wrong()), Progress())
    assert lacks_memory(MemoryError())
    assert lacks_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert [in_units(count) for count in (5, 1536, 2**30)] == ["5 bytes", "1.5 KiB", "1.0 GiB"]


# Made do with --------------------------------------------------------------------------------------------------------


def test_a_step_that_does_not_fit_is_made_as_a_run_with_the_smaller_budget_makes_it(
    tiny_llama: Path, tmp_path: Path
) -> None:
    heard = Heard()
    large = cramped(tiny_llama, tmp_path / "large", batch_tokens=128, fit="auto", log_steps=1, batch_size=10)
    small = task(tiny_llama, tmp_path / "small", batch_tokens=32, batch_size=10)
    found = train(large, heard)
    train(small, Progress())
    assert torch.equal(weights(large.model), weights(small.model))
    assert found.as_metrics() == {"training": {"steps": 2, "batch_tokens": 32}}
    assert large.objective.failed == 2  # type: ignore[attr-defined]  # 128 and 64 tokens, in the first step alone
    assert heard.notes[-1].endswith("on with 32 instead of 64 tokens at once (fit: auto)")
    assert heard.values["train.batch_tokens"] == {1: 32.0, 2: 32.0}


class Lowers(AnswerLoss):
    """Has the smaller budget from a step on, as a run that was given it there."""

    def __init__(self, step: int, tokens: int, budget: Budget) -> None:
        self.left, self.tokens_then, self.budget = step, tokens, budget

    def prepared(self, model: nn.Module, some: Sequence[Any]) -> Sequence[Any]:
        self.left -= 1
        if self.left == 0:
            self.budget.tokens = self.tokens_then
        return some


class CrampedLater(Cramped):
    """Has room enough before a step."""

    def __init__(self, step: int, room: int) -> None:
        super().__init__(10**6)
        self.left, self.then = step, room

    def prepared(self, model: nn.Module, some: Sequence[Any]) -> Sequence[Any]:
        self.left -= 1
        if self.left == 0:
            self.room = self.then
        return some


def test_with_dropout_it_is_a_run_that_had_the_smaller_budget_from_that_step(tiny_gpt2: Path, tmp_path: Path) -> None:
    large = replace(noisy(tiny_gpt2, tmp_path / "large", batch_tokens=128, fit="auto"), objective=CrampedLater(3, ROOM))
    budget = Budget(128)
    small = noisy(tiny_gpt2, tmp_path / "small", batch_tokens=128)
    assert train(large, Progress()).batch_tokens == 32
    train(replace(small, objective=Lowers(3, 32, budget), budget=budget), Progress())
    assert torch.equal(weights(large.model), weights(small.model))


def test_a_resumed_run_begins_with_the_budget_that_was_found(tiny_gpt2: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"batch_tokens": 128, "fit": "auto"}
    never, first, again = (
        replace(noisy(tiny_gpt2, tmp_path / name, **changes), objective=Cramped(ROOM))
        for name in ("never", "state", "state")
    )
    train(never, Progress())
    with signals_handled(), pytest.raises(Interrupted):
        train(first, Heard(stop=(2, signal.SIGTERM)))
    assert train(again, Progress()).batch_tokens == 32
    assert again.objective.failed == 0  # type: ignore[attr-defined]
    assert torch.equal(weights(again.model), weights(never.model))


def test_a_single_row_that_does_not_fit_stops_the_run(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="out of memory with batch_tokens: ") as failure:
        train(cramped(tiny_llama, tmp_path, room=10, fit="auto"), Progress())
    assert "A single row is too much" in failure.value.hint


def test_held_out_rows_are_measured_in_smaller_parts(tiny_llama: Path, tmp_path: Path) -> None:
    large = cramped(tiny_llama, tmp_path, batch_tokens=128, fit="auto")
    small = task(tiny_llama, tmp_path, batch_tokens=32)
    assert measure(large.model, large.objective, large.rows, large.settings) == measure(
        small.model, small.objective, small.rows, small.settings
    )
    measured = replace(cramped(tiny_llama, tmp_path / "state", room=60, batch_tokens=128, fit="auto"), held_out=rows())
    heard = Heard()
    train(measured, heard)
    assert "eval.loss" in heard.values


def test_ktos_baseline_is_made_in_smaller_parts_too(
    tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its mismatched replies go through a model with dropout before the step does."""
    real = align.stages.objectives.trained_logps
    found = []
    for name, tokens in (("large", 128), ("small", 32)):

        def logps(model: Any, some: Any, room: int = ROOM) -> Any:
            result = real(model, some)
            if sum(len(row.ids) for row in some) > room:
                torch.empty(MORE_THAN_ANY_MACHINE)
            return result

        monkeypatch.setattr(align.stages.objectives, "trained_logps", logps)
        budget = Budget(tokens, shrinks=name == "large")
        rated = [RatedRow(row, place % 2 == 0, -30.0, row, -40.0) for place, row in enumerate(rows())]
        plain = noisy(tiny_gpt2, tmp_path / name, batch_tokens=tokens)
        objective = RatedLoss(KtoLoss(kind="kto"), beta=0.1, budget=budget)
        train(replace(plain, objective=objective, rows=rated, budget=budget), Progress())
        found.append(weights(plain.model))
        assert budget.tokens == 32
    assert torch.equal(found[0], found[1])


def test_a_ppo_round_is_looked_at_and_learnt_from_in_smaller_parts(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The round is not collected anew, and the policy is that of a run with the smaller budget."""
    base = chat_base(tiny_llama, tmp_path / "base")
    run(base, tmp_path / "small", rounds=2, batch_tokens=64)
    for module in (align.ppo.collection, align.ppo.objective):
        real = module.hidden_states  # type: ignore[attr-defined]

        def states(model: Any, some: Any, real: Any = real) -> Any:
            if sum(map(len, some)) > 64:
                torch.empty(MORE_THAN_ANY_MACHINE)
            return real(model, some)

        monkeypatch.setattr(module, "hidden_states", states)
    outcome = run(base, tmp_path / "large", rounds=2, batch_tokens=128, fit="auto")
    assert torch.equal(trained(tmp_path / "large"), trained(tmp_path / "small"))
    assert outcome.metrics["training"]["batch_tokens"] == 64
    assert len(outcome.heard.series("round.number")) == 2


def test_it_is_for_one_process(tiny_llama: Path, tmp_path: Path) -> None:
    """The others would wait for the one whose memory is short."""
    bench = bench_in(tmp_path, tiny_llama)
    workshop = bench.workshop("stages.sft.fit=auto", "launch.processes=2")
    with pytest.raises(AlignError, match="stage 'sft': fit: auto is for one process"):
        check_launch(workshop, ["sft"])
    check_launch(bench.workshop("stages.sft.fit=auto"), ["sft"])


def test_the_result_depends_on_it_as_on_batch_tokens(tiny_llama: Path, tmp_path: Path) -> None:
    """Both are in a stage's cache key, since rounding is a result, too."""
    bench = bench_in(tmp_path, tiny_llama)
    keys = set()
    for changes in ((), ("stages.sft.fit=auto",), ("stages.sft.batch_tokens=64",)):
        workshop = bench.workshop(*changes)
        weights_of_stage = workshop.weights("sft", {})
        assert weights_of_stage is not None
        keys.add(workshop.key("sft", weights_of_stage))
    assert len(keys) == 3
