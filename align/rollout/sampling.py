"""One step of decoding: logits to the next token and its log-probability. No model and no loop in here.

A row draws its tokens from uniform numbers of its own, made from (seed, row): the same row gets the same answer
whatever shares its batch. The inverse of the cumulative distribution is found in two steps, among blocks of tokens and
then within one block: a tenth of the time of softmax and torch.multinomial.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

SMALLEST, LARGEST = 2.0**-24, 1 - 2.0**-24  # the open interval (0, 1) in float32
BLOCK_TOKENS = 256  # near the root of a vocabulary, so that both searches are short


def uniforms(seed: int, rows: Sequence[int], steps: int) -> Tensor:
    """Uniform numbers in (0, 1), shape (len(rows), steps); those of a row depend on (seed, row) alone."""
    drawn = np.stack([np.random.default_rng((seed, row)).random(steps, dtype=np.float32) for row in rows])
    return torch.from_numpy(drawn).clamp_(SMALLEST, LARGEST)


def choose(
    logits: Tensor, drawn: Tensor | None, *, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Next tokens (B,) and their log-probabilities (B,) under softmax(logits / temperature), before any cut.

    logits: (B, V). drawn: uniform numbers (B,), or None for the likeliest token (where temperature must be 1).
    top_k: only the k likeliest tokens, 0 for all. top_p: only the likeliest that together reach this share, 1 for all.
    A token of probability 0 is never drawn.
    """
    scaled = logits.float() if temperature == 1 else logits.float() / temperature
    highest = scaled.amax(dim=-1, keepdim=True)
    weights = _weights(scaled, highest)
    blocks = weights.sum(dim=-1)
    total = blocks.sum(dim=-1)
    if drawn is None:
        tokens = scaled.argmax(dim=-1)
    elif top_k or top_p < 1:
        weights = _weights(_cut(scaled, top_k, top_p), highest)
        tokens = _inverse(weights, weights.sum(dim=-1), drawn)
    else:
        tokens = _inverse(weights, blocks, drawn)
    return tokens, scaled.gather(1, tokens[:, None]).squeeze(1) - highest.squeeze(1) - total.log()


def _weights(scaled: Tensor, highest: Tensor) -> Tensor:
    """exp(scaled - highest) in blocks of tokens, (B, blocks, BLOCK_TOKENS), the last one filled up with zeros."""
    rows, vocabulary = scaled.shape
    blocks = -(-vocabulary // BLOCK_TOKENS)
    weights = scaled.new_empty(rows, blocks * BLOCK_TOKENS)
    weights[:, vocabulary:] = 0
    torch.exp(torch.sub(scaled, highest, out=weights[:, :vocabulary]), out=weights[:, :vocabulary])
    return weights.view(rows, blocks, BLOCK_TOKENS)


def _inverse(weights: Tensor, blocks: Tensor, drawn: Tensor) -> Tensor:
    """Tokens (B,) at which the running sum of the weights reaches the share `drawn` (B,) of their total."""
    target = drawn.to(blocks.device) * blocks.sum(dim=-1)
    block, rest = _first_reaching(blocks, target)
    inside, _ = _first_reaching(weights[torch.arange(len(block), device=block.device), block], rest)
    return block * BLOCK_TOKENS + inside


def _first_reaching(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Index (B,) of the first weight above 0 at which the running sum is at least `target`, and what lies beyond the
    sum before it, at least a trace. Rounding, and the order in which a GPU adds, cannot lead to a weight of 0."""
    sums = weights.cumsum(dim=-1)
    reached = sums.masked_fill(weights == 0, 0)
    target = torch.minimum(target, reached.amax(dim=-1))
    index = (reached >= target[:, None]).byte().argmax(dim=-1, keepdim=True)
    before = (sums - weights).gather(1, index).squeeze(1)
    return index.squeeze(1), (target - before).clamp_min(torch.finfo(weights.dtype).tiny)


def _cut(scaled: Tensor, top_k: int, top_p: float) -> Tensor:
    if 0 < top_k < scaled.shape[-1]:
        least = scaled.topk(top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    if top_p < 1:
        ordered, order = scaled.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        beyond = torch.empty_like(before, dtype=torch.bool).scatter_(1, order, before >= top_p)
        scaled = scaled.masked_fill(beyond, -torch.inf)
    return scaled
