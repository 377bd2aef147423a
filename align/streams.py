"""Which rows each optimiser step of a run learns from: the whole run is one pass over a stream, so that a resumed one goes
on with the very next row."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator

from torch.utils.data import Sampler

from align.batches import epoch_order
from align.recipe.settings import TrainingSettings


class Stream(Sampler[list[int]]):
    """Row numbers of each optimiser step. The same numbers in the same order whenever it is asked."""

    @abstractmethod
    def __len__(self) -> int:
        """Optimiser steps of the run."""


class RowStream(Stream):
    """Row numbers of each optimiser step: one shuffled epoch after the other, cut into batches across their seams."""

    def __init__(self, rows: int, settings: TrainingSettings, seed: int) -> None:
        self.rows, self.seed = rows, seed
        self.batch_size = settings.batch_size
        self.steps = steps_of(rows, settings)
        self.total = min(_rows_of_run(rows, settings), self.steps * settings.batch_size)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        batch: list[int] = []
        for position in range(self.total):
            epoch, offset = divmod(position, self.rows)
            if offset == 0:
                order = epoch_order(self.rows, self.seed, epoch)
            batch.append(order[offset])
            if len(batch) == self.batch_size:
                yield batch
                batch = []
        if batch:
            yield batch


def steps_of(rows: int, settings: TrainingSettings) -> int:
    """Optimiser steps of a run over that many rows."""
    steps = math.ceil(_rows_of_run(rows, settings) / settings.batch_size)
    return min(steps, settings.max_steps or steps)


def _rows_of_run(rows: int, settings: TrainingSettings) -> int:
    """How often a row is seen in a whole run: all epochs together, one row at least."""
    return max(1, round(settings.epochs * rows))
