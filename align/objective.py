"""What an algorithm is to the loop: a loss summed over rows, and what its sum is divided by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
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

    def prepared(self, model: nn.Module, rows: Sequence[Any]) -> Sequence[Any]:
        """Called first, with all rows of an optimiser step: the rows that it trains on; none: the step changes nothing."""
        return rows

    def again(self, model: nn.Module, rows: Sequence[Any]) -> None:  # noqa: B027
        """The step is made once more, with the `rows` that `prepared` gave: forgets what it has counted so far."""

    @property
    def finished(self) -> bool:
        """Whether training should end after this step, before its planned end."""
        return False

    def save(self, folder: Path) -> None:  # noqa: B027 (most objectives have no state)
        """Writes what the objective needs besides the model to go on from here."""

    def load(self, folder: Path) -> None:  # noqa: B027
        """Reads what `save` wrote."""
