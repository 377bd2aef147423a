"""One optimiser step up to its gradients, and the same without learning: the loss of rows, cut into micro-batches.

A step is made of all its rows or not at all. What does not fit into memory is made again in smaller parts where the recipe
says so (memory.py); a step that must not be taken (bad_steps.py) ends the run, is left out, or is made again without
autocast to bfloat16.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from align.bad_steps import StepWatch
from align.errors import StageFailed
from align.generators import generators_now
from align.memory import Budget, Cut
from align.models.hardware import compute_dtype, width_of
from align.objective import Objective
from align.parallel.shards import whole_tensor
from align.parallel.sharing import Sharing
from align.recipe.settings import TrainingSettings


def autocast(model: nn.Module, precision: str) -> torch.autocast:
    """Arithmetic in the precision asked for; weights that train stay float32."""
    return torch.autocast(
        next(model.parameters()).device.type, torch.bfloat16, enabled=_dtype(model, precision) == torch.bfloat16
    )


def measure(
    model: nn.Module,
    objective: Objective,
    rows: Sequence[Any],
    settings: TrainingSettings,
    sharing: Sharing | None = None,
    budget: Budget | None = None,
) -> dict[str, float]:
    """Mean loss and metrics of the objective over `rows`, without training; {} when there are none."""
    if not rows:
        return {}
    sharing, budget = sharing or Sharing(model), budget or Budget.of(settings)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        with autocast(model, settings.precision):
            rows = sharing.through(lambda model: objective.prepared(model, rows))
        lengths = [objective.tokens(row) for row in rows]

        def summed(cut: Cut) -> Counter[str]:
            sums: Counter[str] = Counter()
            for group, counts in sharing.groups(lengths, cut):
                with autocast(model, settings.precision):
                    loss, more = _loss_of(sharing, objective, [rows[i] for i in group])
                if counts:
                    sums.update({"loss": float(loss), **more})
            return sums

        sums = budget.fitted(model, lengths, summed)
    model.train(was_training)
    weight = objective.weight(rows)
    return {name: total / weight for name, total in sharing.merged(sums).items()}


@dataclass(frozen=True)
class Step:
    """What is known of a step whose gradients, clipped, lie in the weights.

    loss: mean over the step. sums: of metrics over our rows, to be divided by weight. norms: before clipping, by name.
    """

    loss: float
    sums: Counter[str]
    weight: float
    tokens: int
    norms: Mapping[str, float]


@dataclass(frozen=True)
class Stepper:
    """Makes the steps of one run. apart: names of parameters whose gradients are clipped apart from the others."""

    sharing: Sharing
    objective: Objective
    settings: TrainingSettings
    budget: Budget
    watch: StepWatch
    apart: frozenset[str]
    say: Callable[[str], object]

    @property
    def model(self) -> nn.Module:
        """What trains."""
        return self.sharing.model

    def make(self, numbers: Sequence[int], given: Sequence[Any], step: int) -> Step | None:
        """Gradients of the rows of a step; None, and no gradients, where there is nothing to learn or the step is left out.

        numbers: of the rows, for people. Raises StageFailed for a bad step where the settings do not say otherwise.
        """
        restart = partial(self._restart, generators_now())
        precision = self.settings.precision
        with autocast(self.model, precision):
            rows = self.sharing.through(lambda model: self.objective.prepared(model, given))
        if not rows:
            return None
        made = self._fitted(rows, precision, restart)
        fault = self._fault(made, step, numbers)
        half = _dtype(self.model, precision) == torch.bfloat16
        if fault and self.settings.bad_steps == "retry" and half:
            self.say(f"warning: {fault}; made once more without autocast to bfloat16")
            restart(rows, "float32")
            made = self._fitted(rows, "float32", restart)
            fault = self._fault(made, step, numbers)
        if fault:
            self.model.zero_grad()
            self._leave_out(fault)
            return None
        self.watch.passed(made.norms)
        return made

    def _fitted(self, rows: Sequence[Any], precision: str, restart: Callable[[Sequence[Any], str], None]) -> Step:
        lengths = [self.objective.tokens(row) for row in rows]
        return self.budget.fitted(
            self.model, lengths, partial(self._tried, rows, lengths, precision), partial(restart, rows, precision)
        )

    def _restart(self, put_back: Callable[[], None], rows: Sequence[Any], precision: str) -> None:
        """Everything as it was when the step began, but for what `prepared` found."""
        put_back()
        self.model.zero_grad()
        with autocast(self.model, precision):
            self.sharing.through(lambda model: self.objective.again(model, rows))

    def _tried(self, rows: Sequence[Any], lengths: Sequence[int], precision: str, cut: Cut) -> Step:
        sharing, objective = self.sharing, self.objective
        weight, sums = objective.weight(rows), Counter[str]()
        total = torch.zeros((), device=next(self.model.parameters()).device)
        for group, counts in sharing.groups(lengths, cut):
            with autocast(self.model, precision):
                loss, more = _loss_of(sharing, objective, [rows[i] for i in group])
            torch.autograd.backward(loss / (weight / sharing.scale) if counts else loss * 0.0)
            if counts:
                total += loss.detach()
                sums.update(more)
            del loss  # its graph, which lies about in the memory that the next one needs
        sharing.add_gradients()
        mean = float(sharing.summed(total) / weight)
        return Step(mean, sums, weight, sum(lengths), self._clipped())

    def _clipped(self) -> dict[str, float]:
        """Scales the gradients down to their largest norm, and tells what it was."""
        named = [(name, weight) for name, weight in self.model.named_parameters() if weight.grad is not None]
        parts = {
            "gradient norm of the value model": [weight for name, weight in named if name in self.apart],
            "gradient norm": [weight for name, weight in named if name not in self.apart],
        }
        limit = self.settings.max_grad_norm
        norms = {what: nn.utils.clip_grad_norm_(weights, limit) for what, weights in parts.items() if weights}
        return {what: float(whole_tensor(norm)) for what, norm in norms.items()}

    def _fault(self, made: Step, step: int, numbers: Sequence[int]) -> str:
        fault = self.watch.fault(made.loss, made.norms)
        return f"{fault} at step {step}, on training rows {sorted(numbers)}" if fault else ""

    def _leave_out(self, fault: str) -> None:
        if self.settings.bad_steps != "skip":
            hint = "Nothing was saved after the last complete state. Lower learning_rate, or use precision: float32."
            raise StageFailed(f"{fault}", hint)
        self.watch.skip(fault)
        self.say(f"warning: {fault}; the step is skipped, the weights stay as they are")


def _loss_of(sharing: Sharing, objective: Objective, rows: Sequence[Any]) -> tuple[Tensor, dict[str, float]]:
    return sharing.through(lambda model: objective(model, rows))


def _dtype(model: nn.Module, precision: str) -> torch.dtype:
    config: Any = model.config
    return compute_dtype(precision, width_of(config))
