"""Memory that does not suffice: recognised whoever says so, told in bytes, and made do with where the recipe allows it.

How rows are cut into micro-batches changes a result by rounding, and by which noise of a dropout meets which row, but never
what is learnt from: so work that does not fit can be done once more, from its beginning, in smaller parts.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from align.batches import micro_batches
from align.errors import StageFailed, lacks_memory
from align.machine import available_bytes
from align.models.logps import is_padded
from align.recipe.settings import TrainingSettings
from align.units import UNITS, in_units

T = TypeVar("T")
Cut = Callable[
    [Sequence[int]], list[list[int]]
]  # lengths of rows -> indices of those that go through the model together

ASKED = re.compile(r"allocate ([\d.]+) ?(bytes|[KMGTPE]iB)")


def out_of_memory(error: BaseException, where: str, hint: str) -> StageFailed:
    """Our error for one that `lacks_memory`: where it happened, how much was asked for, how much there is, what to do."""
    asked, free = _asked(error), _free_bytes()
    amounts = [f"{asked} were asked for" if asked else "", f"{in_units(free)} are free" if free is not None else ""]
    known = ", ".join(filter(None, amounts))
    return StageFailed(f"out of memory {where}{f' ({known})' if known else ''}", hint)


class Budget:
    """Most tokens that go through a model at once. Work that does not fit makes it smaller where it `shrinks`, for good.

    say: is told of each change, in a sentence.
    """

    def __init__(self, tokens: int, *, shrinks: bool = False, say: Callable[[str], object] = lambda _: None) -> None:
        self.tokens, self.shrinks, self.say = tokens, shrinks, say

    @classmethod
    def of(cls, settings: TrainingSettings, say: Callable[[str], object] = lambda _: None) -> Budget:
        """As a stage's settings say."""
        return cls(settings.batch_tokens, shrinks=settings.fit == "auto", say=say)

    def fitted(
        self,
        model: nn.Module,
        lengths: Sequence[int],
        work: Callable[[Cut], T],
        restart: Callable[[], object] = lambda: None,
    ) -> T:
        """What `work` makes of rows of these lengths, given how they are to be cut.

        restart: undoes what work that failed has done. Raises StageFailed where even single rows do not fit, or the budget
        does not shrink.
        """
        while True:
            cut = partial(micro_batches, budget=self.tokens, padded=is_padded(model))
            try:
                return work(cut)
            except (RuntimeError, MemoryError) as error:
                if not lacks_memory(error):
                    raise
                failure = out_of_memory(error, f"with batch_tokens: {self.tokens}", self._hint)
                if not self.shrinks or all(len(group) == 1 for group in cut(lengths)):
                    raise failure from error
            _release()  # only now: the error held on to what the work had made so far
            before = self.tokens
            while micro_batches(lengths, self.tokens, padded=is_padded(model)) == cut(lengths):
                self.tokens //= 2
            self.say(
                f"warning: {failure.message}; on with {self.tokens} instead of {before} tokens at once (fit: auto)"
            )
            restart()

    @property
    def _hint(self) -> str:
        if self.shrinks:
            return "A single row is too much: set gradient_checkpointing: true, lower max_length, or train an adapter."
        return "Lower batch_tokens (the result stays the same), or set fit: auto, or gradient_checkpointing: true."


def _asked(error: BaseException) -> str:
    found = ASKED.search(str(error))
    return in_units(float(found[1]) * 1024 ** UNITS.index(found[2])) if found else ""


def _free_bytes() -> int | None:
    """Of the accelerator, where there is one, else of this machine; None: it does not say."""
    return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else available_bytes()


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
