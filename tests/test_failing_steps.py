"""A step that must not be taken ends the run, is left out to the bit, or is made again in float32: as the recipe says."""

from __future__ import annotations

import math
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from align.bad_steps import FEWEST, WINDOW, StepWatch
from align.errors import Interrupted, StageFailed
from align.memory import Budget
from align.progress import Progress
from align.recipe.settings import KtoLoss
from align.signs import signs
from align.stages.objectives import RatedLoss, RatedRow
from align.state import complete_states
from align.stopping import signals_handled
from align.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINED, Task, train
from tests.crew_kit import on_two
from tests.step_kit import Heard, Odd, noisy
from tests.test_launch import CHAIN, curves, run_one_of_two
from tests.test_run import Bench, bench_in
from tests.test_trainer import rows, settings, task, weights

NAN, INFINITE = float("nan"), float("inf")
SKIP = {"bad_steps": "skip", "weight_decay": 0.1}


def odd_task(folder: Path, state: Path, odd: Odd, some: Any = None, **changes: Any) -> Task:
    return replace(task(folder, state, some, **changes), objective=odd)


# Stop ----------------------------------------------------------------------------------------------------------------


def test_a_gradient_that_is_not_finite_stops_the_run_with_the_weights_as_they_were(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """The loss is finite, and only its gradient is not."""
    broken = odd_task(tiny_llama, tmp_path, Odd(gradient={1: INFINITE}))
    before = weights(broken.model).clone()
    with pytest.raises(StageFailed, match=r"the gradient norm is (nan|inf) at step 1, on training rows \[") as failure:
        train(broken, Progress())
    assert "learning_rate" in failure.value.hint
    assert failure.value.exit_code == 1
    assert torch.equal(weights(broken.model), before)
    assert complete_states(tmp_path) == []


def test_a_run_that_fails_later_keeps_its_states_and_names_the_rows(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="the loss is nan at step 3, on training rows"):
        train(odd_task(tiny_llama, tmp_path, Odd(loss={3: NAN}), save_steps=1), Progress())
    assert [state.name for state in complete_states(tmp_path)] == ["checkpoint-1", "checkpoint-2"]


# Skip ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("odd", [{"loss": {3: NAN}}, {"loss": {3: -INFINITE}}, {"gradient": {3: NAN}}, "value model"])
def test_a_skipped_step_leaves_weights_and_moments_to_the_bit_and_counts(
    odd: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    """With weight decay, which would move them without any gradient. The schedule goes on."""
    heard = Heard()
    own = odd == "value model"
    plain = odd_task(
        tiny_llama, tmp_path, Odd(gradient={3: NAN}) if own else Odd(**odd), save_steps=1, max_steps=3, **SKIP
    )
    names = [name for name, _ in plain.model.named_parameters()]
    trained = train(replace(plain, own_rates=dict.fromkeys(names[-1:], 1e-3) if own else {}), heard)
    before, after = complete_states(tmp_path)
    assert (before.name, after.name) == ("checkpoint-2", "checkpoint-3")
    first, last = load_file(before / TRAINED), load_file(after / TRAINED)
    assert all(torch.equal(first[name], last[name]) for name in first)
    moments = [torch.load(state / OPTIMIZER_NAME)["state"] for state in (before, after)]
    assert all(
        torch.equal(moments[0][i][name], value) for i, some in moments[1].items() for name, value in some.items()
    )
    assert torch.load(after / SCHEDULER_NAME)["last_epoch"] == 3
    assert trained.steps == 3
    assert trained.as_metrics() == {"training": {"steps": 3, "skipped_steps": 1}}
    assert heard.values["train.skipped_steps"] == {3: 1.0}
    assert math.isfinite(heard.values["train.loss"][3])
    assert math.isfinite(heard.values["train.seen"][3])
    (note,) = [note for note in heard.notes if "skipped" in note]
    what = "gradient norm of the value model" if own else "gradient norm" if "gradient" in odd else "loss"
    assert f"the {what} is " in note
    assert "at step 3, on training rows [" in note


def test_the_run_goes_on_after_a_skipped_step(tiny_llama: Path, tmp_path: Path) -> None:
    """And ends elsewhere than one that took it."""
    found = []
    for name, odd in (("bad", Odd(loss={2: NAN})), ("good", Odd())):
        ended = odd_task(tiny_llama, tmp_path / name, odd, **SKIP)
        train(ended, Progress())
        found.append(weights(ended.model))
    start = weights(task(tiny_llama, tmp_path).model)
    assert torch.isfinite(found[0]).all()
    assert (found[0] - start).norm() > 0.1
    assert not torch.equal(found[0], found[1])


def test_more_skipped_steps_than_the_recipe_allows_stop_the_run(tiny_llama: Path, tmp_path: Path) -> None:
    odd = Odd(loss={1: NAN, 3: NAN, 4: NAN})
    with pytest.raises(
        StageFailed, match=r"the loss is nan at step 4, on training rows \[.*2 steps before it were skip"
    ):
        train(odd_task(tiny_llama, tmp_path, odd, most_skipped_steps=2, **SKIP), Progress())
    changes: dict[str, Any] = {"most_skipped_steps": 3, "max_steps": 6, "epochs": 3.0, **SKIP}
    enough = odd_task(tiny_llama, tmp_path / "enough", Odd(loss={1: NAN, 3: NAN, 4: NAN}), **changes)
    assert train(enough, Progress()).skipped_steps == 3


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (
            range(1, 6),
            r"5 of 5 steps were skipped .*no step was good. The first: the loss is nan at step 1, on training",
        ),
        (
            (2, 4, 5),
            r"3 of 5 steps were skipped .*more than half of its steps were bad. The first: .* at step 2, on tr",
        ),
    ],
)
def test_a_run_whose_steps_were_mostly_bad_fails_however_many_may_be_skipped(
    bad: Any, words: str, tiny_llama: Path, tmp_path: Path
) -> None:
    """Taken up again at its end, it fails in the same words."""
    for odd in (Odd(loss=dict.fromkeys(bad, NAN)), Odd()):
        with pytest.raises(StageFailed, match=words) as failure:
            train(odd_task(tiny_llama, tmp_path, odd, most_skipped_steps=100, **SKIP), Progress())
        assert "learning_rate" in failure.value.hint


def test_what_was_skipped_leaves_no_loss_and_no_gradient_of_0_in_the_log(tiny_llama: Path, tmp_path: Path) -> None:
    """So there are no signs of a run that had nothing to learn. Step 1 is logged apart, the last one with those before it."""
    heard = Heard()
    odd = Odd(loss={1: NAN, 5: NAN})
    train(odd_task(tiny_llama, tmp_path, odd, max_steps=5, log_steps=2, **SKIP), heard)
    assert sorted(heard.values["train.loss"]) == [2, 4]
    assert sorted(heard.values["train.grad_norm"]) == [2, 4]
    assert heard.values["train.skipped_steps"] == {1: 1.0, 2: 1.0, 4: 1.0, 5: 2.0}
    assert all(heard.values["train.grad_norm"].values())
    assert signs("sft", {}, {name: list(values.items()) for name, values in heard.values.items()}) == {}


class Unmeasured(Odd):
    """Not finite where nothing is learnt."""

    def __call__(self, model: nn.Module, rows: Any) -> Any:
        loss, numbers = super().__call__(model, rows)
        return (loss if torch.is_grad_enabled() else loss * NAN), numbers


def test_a_held_out_number_that_is_not_finite_fails_in_words(tiny_llama: Path, tmp_path: Path) -> None:
    blind = replace(odd_task(tiny_llama, tmp_path, Unmeasured()), held_out=rows(2))
    with pytest.raises(StageFailed, match="the held-out loss is nan after step 1") as failure:
        train(blind, Progress())
    assert failure.value.hint


# Explosions ----------------------------------------------------------------------------------------------------------


def test_a_norm_far_above_the_median_of_the_last_good_steps_is_a_fault() -> None:
    watch = StepWatch(settings(exploding_norm=10.0))
    for number in range(FEWEST):
        assert watch.fault(1.0, {"gradient norm": 1e6}) == ""
        watch.passed({"gradient norm": 1.0 + number % 3})
    assert watch.fault(1.0, {"gradient norm": 20.0}) == ""
    assert watch.fault(1.0, {"gradient norm": 20.1}) == "the gradient norm is 20.1, 10.1 times what is usual"
    assert watch.fault(1.0, {"gradient norm": 1.0, "gradient norm of the value model": 1e6}) == ""
    for _ in range(WINDOW):
        watch.passed({"gradient norm": 5.0})
    assert watch.fault(1.0, {"gradient norm": 50.0}) == ""
    again = StepWatch(settings(exploding_norm=10.0))
    again.restore(watch.state())
    assert "50.1" in again.fault(1.0, {"gradient norm": 50.1})
    assert StepWatch(settings()).fault(1.0, {"gradient norm": 1e30}) == ""


def test_resumed_is_never_stopped_with_skipped_and_exploded_steps(tiny_llama: Path, tmp_path: Path) -> None:
    """The explosion comes two steps after the run was taken up again: only a saved state can know what was usual."""
    odd = {"loss": {3: NAN}, "gradient": {5: 1e4, FEWEST + 4: 1e4}}
    changes: dict[str, Any] = {"max_steps": FEWEST + 6, "epochs": 20.0, "exploding_norm": 100.0, **SKIP}
    never = odd_task(tiny_llama, tmp_path / "never", Odd(**odd), **changes)
    heard = Heard()
    assert train(never, heard).skipped_steps == 2  # step 5 is too early to say what is usual
    assert "times what is usual at step 24" in heard.notes[-1]
    for stop in (2, FEWEST + 2):
        stopped = odd_task(tiny_llama, tmp_path / "state", Odd(**odd), **changes)
        with signals_handled(), pytest.raises(Interrupted):
            train(stopped, Heard(stop=(stop, signal.SIGTERM)))
    again = odd_task(tiny_llama, tmp_path / "state", Odd(**odd), **changes)
    assert train(again, Progress()).skipped_steps == 2
    assert torch.equal(weights(again.model), weights(never.model))


# Retry ---------------------------------------------------------------------------------------------------------------


class OnlyHalf(Odd):
    """Not finite in bfloat16."""

    def __call__(self, model: nn.Module, rows: Any) -> Any:
        loss, numbers = super().__call__(model, rows)
        return (loss * NAN if torch.is_autocast_enabled("cpu") else loss), numbers


def test_steps_made_again_in_float32_are_those_of_a_float32_run(tiny_gpt2: Path, tmp_path: Path) -> None:
    """With dropout, whose noise is that of the first attempt."""
    heard = Heard()
    half = noisy(tiny_gpt2, tmp_path / "half", precision="bfloat16", bad_steps="retry")
    full = noisy(tiny_gpt2, tmp_path / "full", precision="float32")
    assert train(replace(half, objective=OnlyHalf()), heard) == train(full, Progress())
    assert torch.equal(weights(half.model), weights(full.model))
    assert len([note for note in heard.notes if note.endswith("made once more without autocast to bfloat16")]) == 5


class RatedOnlyInFull(RatedLoss):
    """Not finite in bfloat16."""

    def __call__(self, model: nn.Module, rows: Any) -> Any:
        loss, numbers = super().__call__(model, rows)
        return (loss * NAN if torch.is_autocast_enabled("cpu") else loss), numbers


def test_ktos_baseline_is_made_again_in_float32_too(tiny_gpt2: Path, tmp_path: Path) -> None:
    """It is found before the step, in the same arithmetic and with noise of its own."""
    found = []
    for precision in ("bfloat16", "float32"):
        plain = noisy(tiny_gpt2, tmp_path / precision, precision=precision, bad_steps="retry")
        rated = [RatedRow(row, place % 2 == 0, -30.0, row, -40.0) for place, row in enumerate(plain.rows)]
        objective = RatedOnlyInFull(KtoLoss(kind="kto"), beta=0.1, budget=Budget(40))
        train(replace(plain, objective=objective, rows=rated), Progress())
        found.append(weights(plain.model))
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize(("precision", "attempts"), [("bfloat16", 2), ("float32", 1)])
def test_a_step_that_is_bad_in_float32_too_stops_the_run(
    precision: str, attempts: int, tiny_llama: Path, tmp_path: Path
) -> None:
    broken = Odd(loss={1: NAN})
    with pytest.raises(StageFailed, match="the loss is nan at step 1"):
        train(odd_task(tiny_llama, tmp_path, broken, precision=precision, bad_steps="retry"), Progress())
    assert broken.calls == attempts


# Several processes ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_all_processes_leave_out_the_step_that_is_bad_in_one(strategy: str, tiny_llama: Path, tmp_path: Path) -> None:
    bench = bench_in(tmp_path, tiny_llama)
    changes = (*CHAIN, "stages.sft.bad_steps=skip", f"launch.strategy={strategy}")
    led, followed = on_two(tmp_path / "crew", bad_in_the_second_process, bench, changes)
    assert [action for action, _ in led] == ["run"]
    assert followed is None
    found = curves(bench, "sft")
    assert {value for (_, name), value in found.items() if name == "train.skipped_steps"} == {1.0}
    assert all(math.isfinite(value) for value in found.values())
    record = bench.workshop().registry.checkpoint("harbour/sft")
    assert record.metrics["training"]["skipped_steps"] == 1


def bad_in_the_second_process(rank: int, bench: Bench, changes: tuple[str, ...]) -> Any:
    from align.stages.objectives import AnswerLoss

    loss, calls = AnswerLoss.__call__, 0

    def odd(self: AnswerLoss, model: Any, some: Any) -> Any:
        nonlocal calls
        found, numbers = loss(self, model, some)
        calls += torch.is_grad_enabled()
        return (found * NAN if rank == 1 and calls == 2 else found), numbers

    AnswerLoss.__call__ = odd  # type: ignore[method-assign]
    return run_one_of_two(rank, bench, changes, ("sft",))
