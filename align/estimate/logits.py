"""Bytes of logits while they are turned into log-probabilities, and of those that wait for the backward pass.

As models.head and models.plain_head compute them; tests/test_estimate.py holds the sums against what autograd keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

from align.estimate.activations import FLOAT, HALF

LOGITS_AT_ONCE, LOGITS_KEPT_BYTES, BLOCK = 2**23, 2**27, 2**18  # as models.head and models.plain_head have them
CHUNKS_AT_ONCE = 5  # copies of a chunk of logits that autograd turns into log-probabilities and back


@dataclass(frozen=True)
class Head:
    """How logits are computed. vocabulary: of them for each token; half: whether in bfloat16; trains: whether the head does.

    plain: whether the head is one matrix, whose gradients are worked out by hand; else autograd keeps float32 logits.
    """

    vocabulary: int
    half: bool
    trains: bool = False
    plain: bool = True

    def kept(self, tokens: float) -> float:
        """Bytes that wait for the backward pass; more than LOGITS_KEPT_BYTES are computed again instead."""
        size = self._waiting(tokens)
        return size if size <= LOGITS_KEPT_BYTES else 0.0

    def working(self, tokens: float) -> float:
        """Bytes that a chunk takes for a moment besides those that are kept."""
        numbers = tokens * self.vocabulary
        if not self.plain:
            return CHUNKS_AT_ONCE * FLOAT * min(numbers, LOGITS_AT_ONCE)
        at_once = LOGITS_KEPT_BYTES / self._width if self.trains else LOGITS_AT_ONCE
        chunk = 0.0 if self.kept(tokens) else self._width * min(numbers, at_once)
        return chunk + (FLOAT * min(numbers, BLOCK) if self.half else 0.0)

    @property
    def _width(self) -> int:
        return HALF if self.half and self.plain else FLOAT

    def _waiting(self, tokens: float) -> float:
        return self._width * tokens * self.vocabulary if self.trains or not self.plain else 0.0
