"""What an algorithm is to the loop: a loss summed over rows, and what its sum is divided by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


class Objective(ABC):
    """What a stage asks of a model. Sums, not means: the loop divides by the weight of the whole optimiser step.

    Metrics are divided by the weight too, so a metric is summed in the same unit (tokens, or pairs).
    """

    @abstractmethod
    def weight(self, rows: Sequence[Any]) -> float:
        """What the summed loss of these rows is divided by: trained tokens, or pairs."""

    @abstractmethod
    def tokens(self, row: Any) -> int:
        """How many tokens of this row go through the model."""

    @abstractmethod
    def __call__(self, model: nn.Module, rows: Sequence[Any]) -> tuple[Tensor, dict[str, float]]:
        """Summed loss (scalar, with a graph) and summed metrics of these rows."""

    def before_step(self, model: nn.Module, rows: Sequence[Any]) -> None:  # noqa: B027 (most objectives need nothing)
        """Called once with all rows of an optimiser step, for what the whole step has to know; nothing by default."""
