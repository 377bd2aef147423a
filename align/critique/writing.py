"""What it is to answer requests; who does it stands in writers.py. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from align.data.examples import Messages

Options = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Written:
    """A reply; finished: it ended by itself, not at the limit."""

    text: str
    finished: bool


class Writer(Protocol):
    """Answers requests, in their order; None for one that is longer than the model's context allows."""

    def write(
        self, requests: Sequence[Messages], max_new_tokens: int, *, temperature: float = 0.0, seed: int = 0
    ) -> list[Written | None]:
        """A reply to each request."""

    def choose(self, requests: Sequence[Messages], options: Options) -> list[float | None]:
        """Probability of the first option, of the two, as the reply to each request; 0.5 where neither is at hand."""
