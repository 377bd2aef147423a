"""Which rows each optimiser step of a run learns from: the whole run is one pass over a stream, so that a resumed one goes
on with the very next row."""

from __future__ import annotations

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
        self.steps, self.total = settings.steps(rows), settings.rows_seen(rows)

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
