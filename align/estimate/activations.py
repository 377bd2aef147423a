"""What a model keeps of each token until the backward pass, and what a forward pass takes without one.

Counted from what autograd saves in models.trunk; tests/test_estimate.py holds the sums against it.
"""

from __future__ import annotations

from dataclasses import dataclass

from align.estimate.shape import Shape

FLOAT, HALF = 4, 2  # bytes


@dataclass(frozen=True)
class Arithmetic:
    """How a model computes. half: products in bfloat16; rank: of the adapters that train, None: all weights do.

    quantize: of the frozen base.
    """

    half: bool
    rank: int | None = None
    quantize: str | None = None

    @property
    def width(self) -> int:
        """Bytes of a number that a matrix product gives."""
        return HALF if self.half else FLOAT


def block_bytes(shape: Shape, how: Arithmetic) -> int:
    """Bytes that one block keeps of one token."""
    return _norms(shape, how) + _attention(shape, how) + 4 * how.width * shape.intermediate + _adapters(shape, how)


def _norms(shape: Shape, how: Arithmetic) -> int:
    """Two norms: their inputs in float32, and (where their weights train) those divided by their size; and what goes on
    into five matrices, of which a bfloat16 product keeps a copy each."""
    inputs = FLOAT * 2 * shape.hidden
    divided = 0 if how.rank is not None else inputs
    outputs = HALF * 5 * shape.hidden if how.half else FLOAT * 2 * shape.hidden
    return inputs + divided + outputs + 2 * FLOAT


def _attention(shape: Shape, how: Arithmetic) -> int:
    """Queries, keys, values and result, in float32 (models.trunk; on a GPU less), the result once more for the matrix after
    it, and a number for each head."""
    seen = FLOAT * (2 * shape.attention + 2 * shape.key_value)
    return seen + how.width * shape.attention + FLOAT * shape.attention // shape.head


def _adapters(shape: Shape, how: Arithmetic) -> int:
    """What stands between an adapter's two matrices; an 8-bit layer keeps its input in bfloat16 besides the adapter's copy."""
    if how.rank is None:
        return 0
    inputs = how.width * (2 * shape.hidden + shape.attention + shape.intermediate)
    return how.width * how.rank * len(shape.matrices) + (inputs if how.half and how.quantize == "int8" else 0)


def trunk_bytes(shape: Shape, how: Arithmetic, tokens: float, *, checkpointing: bool) -> float:
    """Bytes that all blocks keep of so many tokens. checkpointing: of each block its input, and of one block all."""
    ends = tokens * FLOAT * (3 * shape.hidden + 2 * shape.head)  # the last norm, and the rotations of the positions
    block = tokens * block_bytes(shape, how)
    if not checkpointing:
        return ends + shape.layers * block
    stream = HALF if how.half and how.rank is not None else FLOAT  # a frozen base hands on its own precision
    return ends + tokens * stream * shape.hidden * shape.layers + block


def copied_keys(shape: Shape, tokens: float, *, checkpointing: bool) -> float:
    """Bytes of keys and values that are laid out once more for the second replies of pairs, each behind the prompt that it
    shares with the first: half of the pairs' tokens."""
    blocks = 1 if checkpointing else shape.layers
    return blocks * 2 * FLOAT * shape.key_value * tokens / 2


def working_bytes(shape: Shape, tokens: float, width: int) -> float:
    """Bytes that a block takes for a moment, besides what is kept: its widest layer, forwards or backwards."""
    return tokens * (FLOAT * 3 * shape.hidden + width * 3 * shape.intermediate)
