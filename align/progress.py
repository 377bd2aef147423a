"""What a long step says while it works. Stages speak to this; who listens is decided above them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol


class Bar(Protocol):
    """One progress bar: `advance` counts finished work, `tokens` (where given) feeds the tokens-per-second figure."""

    def advance(self, amount: float = 1, *, tokens: int = 0, note: str = "") -> None:
        """Count `amount` more units as done; `note` stands at the end of the bar (the loss, say)."""


class _SilentBar:
    def advance(self, amount: float = 1, *, tokens: int = 0, note: str = "") -> None:
        pass


class Progress:
    """Says nothing and keeps nothing: the listener for tests, and the one that others refine."""

    def note(self, text: str) -> None:
        """One line for the person who watches."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of one optimiser step, kept with the run."""

    def rewind(self, step: int) -> None:
        """Training goes on after this step (0: from the start); what was said of later ones no longer counts."""

    @contextmanager
    def bar(self, title: str, total: float) -> Iterator[Bar]:
        """A bar for `total` units of work, closed with the block."""
        yield _SilentBar()
