"""Which optimiser steps must not be taken: a number that is not finite, or a gradient far above what is usual. And which
trainings must not be kept: one whose steps were mostly bad, or whose model gives held-out rows no numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Any

from align.errors import StageFailed
from align.recipe.settings import TrainingSettings

WINDOW = 100  # good steps whose median says what is usual
FEWEST = 20  # good steps before any is called unusual


HINT = "Look at the rows, lower learning_rate, or use precision: float32."


class StepWatch:
    """Judges the steps of one run, and counts those that were left out."""

    def __init__(self, settings: TrainingSettings) -> None:
        self.settings = settings
        self.good = self.skipped = 0
        self._first = ""  # what was wrong with the first step that was skipped
        self._norms: dict[str, list[float]] = {}  # of the last good steps, by name

    def fault(self, loss: float, norms: Mapping[str, float]) -> str:
        """What is wrong with a step, in words; '' where it is good. norms: of its gradients before clipping, by name."""
        for what, value in {"loss": loss, **norms}.items():
            if not math.isfinite(value):
                return f"the {what} is {value}"
        for what, value in norms.items():
            known, limit = self._norms.get(what, []), self.settings.exploding_norm
            usual = median(known) if len(known) >= FEWEST else 0.0
            if limit is not None and usual and value > limit * usual:
                return f"the {what} is {value:.3g}, {value / usual:.3g} times what is usual"
        return ""

    def passed(self, norms: Mapping[str, float]) -> None:
        """A good step: counted, with what it says of the usual."""
        self.good += 1
        if self.settings.exploding_norm is not None:
            for what, value in norms.items():
                self._norms[what] = [*self._norms.get(what, []), value][-WINDOW:]

    def skip(self, said: str) -> None:
        """Counts a step that is left out. said: what is wrong with it. Raises StageFailed where there were too many."""
        most = self.settings.most_skipped_steps
        if self.skipped == most:
            raise StageFailed(
                f"{said}; {most} steps before it were skipped, and no more may be (most_skipped_steps)", HINT
            )
        self.skipped += 1
        self._first = self._first or said

    def require_good_steps(self) -> None:
        """Raises StageFailed for a run whose steps, now that it has ended, were skipped more often than not."""
        if self.skipped > self.good:
            most = "no step was good" if not self.good else "more than half of its steps were bad"
            raise StageFailed(
                f"{self.skipped} of {self.good + self.skipped} steps were skipped (bad_steps: skip), so what was trained is "
                f"not kept: {most}. The first: {self._first}",
                HINT,
            )

    def state(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"good": self.good, "skipped": self.skipped, "first": self._first, "norms": self._norms}

    def restore(self, state: Mapping[str, Any]) -> None:
        """The state that `state` gave."""
        self.good, self.skipped, self._first = state["good"], state["skipped"], state["first"]
        self._norms = dict(state["norms"])


def require_finite(numbers: Mapping[str, float], when: str) -> None:
    """Raises StageFailed where a held-out number is not finite: the model that gave it is of no use. when: for people."""
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise StageFailed(f"the held-out {name} is {value} {when}", HINT)
