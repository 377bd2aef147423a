"""A reply in the making, and how a decode loop hands it its next token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(slots=True, eq=False)
class Row:
    """A prompt with its reply so far; `limit` is the most tokens that the reply may get."""

    index: int
    prompt: Sequence[int]
    limit: int
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    finished: bool = False

    @property
    def going(self) -> bool:
        """Whether the reply may get another token."""
        return not self.finished and len(self.ids) < self.limit

    @property
    def longest(self) -> int:
        """Tokens of prompt and reply when the limit is reached."""
        return len(self.prompt) + self.limit


Extend = Callable[[Sequence[Row], Tensor], None]  # gives each row its next token, from logits (rows, V)
OnDone = Callable[[Row], None]  # told of each row, once, when it gets no more tokens
