"""What it takes to ask a model: to let it write answers, and to read given rows, without gradients."""

from __future__ import annotations

from align.estimate.activations import FLOAT, HALF, working_bytes
from align.estimate.logits import Head
from align.estimate.shape import Shape

DECODED_AT_ONCE = 32_768  # tokens of prompts and replies, as rollout.generation bounds them
READ_AT_ONCE = 8192  # tokens, as rollout.scoring and the prefill of rollout.refill bound them
COLUMN_STEP = 64  # as rollout.cache allocates
LIKE_LENGTH = (
    0.75  # shortest of the prompts that are read at once, as a share of the longest, as rollout.refill groups them
)
LOGIT_COPIES = 3  # of the logits of a step: the model's, their weights, their sums


def writing_bytes(
    shape: Shape, rows: int, prompt: float, new_tokens: int, *, half: bool, mean_prompt: float | None = None
) -> float:
    """Key-value cache of the rows that decode together, with the logits of a step or the reading of prompts.

    prompt: tokens of the longest. mean_prompt: where that is known, padding is no more than LIKE_LENGTH allows.
    """
    longest = prompt + new_tokens
    together = min(rows, max(1, int(DECODED_AT_ONCE // longest)))
    width = HALF if half else FLOAT
    columns = -(-longest // COLUMN_STEP) * COLUMN_STEP
    cache = together * columns * 2 * shape.layers * shape.key_value * width
    logits = together * shape.vocabulary * LOGIT_COPIES * FLOAT
    read = together * min(prompt, prompt if mean_prompt is None else mean_prompt / LIKE_LENGTH)
    return cache + max(logits, working_bytes(shape, min(read, READ_AT_ONCE), width))


def reading_bytes(shape: Shape, tokens: float, predicted: float, *, half: bool) -> float:
    """A forward pass over as many of the tokens as are read at once. predicted: share of them that the head sees."""
    at_once = min(tokens, READ_AT_ONCE)
    block = working_bytes(shape, at_once, HALF if half else FLOAT)
    logits = Head(shape.vocabulary, half, plain=shape.plain_head).working(predicted * at_once)
    return at_once * 2 * FLOAT * shape.hidden + max(block, logits)
