"""One step of decoding: logits to the next token and its log-probability. No model and no loop in here.

A row draws its tokens from uniform numbers of its own, made from (seed, row): the same row gets the same answer
whatever shares its batch. Inverting the cumulative distribution costs a tenth of torch.multinomial.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

SMALLEST, LARGEST = 2.0**-24, 1 - 2.0**-24  # the open interval (0, 1) in float32


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
    """
    scaled = logits.float() / temperature
    if drawn is None:
        tokens = scaled.argmax(dim=-1)
    else:
        cumulative = _cut(scaled, top_k, top_p).softmax(dim=-1).cumsum(dim=-1)
        target = drawn.to(cumulative.device) * cumulative[:, -1]
        tokens = torch.searchsorted(cumulative, target[:, None]).squeeze(1)
    return tokens, scaled.gather(1, tokens[:, None]).squeeze(1) - scaled.logsumexp(dim=-1)


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
