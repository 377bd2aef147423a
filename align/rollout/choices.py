"""What a model thinks of given next tokens, after many prompts at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from align.batches import micro_batches
from align.models.fused import fused
from align.models.head import next_token_logps
from align.models.logps import is_padded
from align.rollout import refill
from align.rollout.generation import TOKENS_AT_ONCE
from align.rollout.inference import evaluating
from align.rollout.prefixes import shared_prefixes
from align.rollout.rows import Row
from align.rollout.scoring import TOKENS_AT_ONCE as READ_AT_ONCE

WORTHWHILE = 0.3  # share of all tokens that common beginnings must save, since what is left is padded


def choice_logps(model: nn.Module, prompts: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]) -> Tensor:
    """Log-probability (N, K), float32, on the CPU, of each of K `tokens` (N of K) as the next one after each prompt."""
    rows = [Row(number, prompt, 1) for number, prompt in enumerate(prompts)]
    wanted = torch.tensor(tokens, dtype=torch.long).view(len(rows), len(tokens[0]) if tokens else 0)
    with evaluating(model), fused(model):
        if refill.suits(model) and _saved(rows) >= WORTHWHILE * sum(map(len, prompts)):
            return _after_shared_beginnings(model, rows, wanted)
        found = torch.zeros(wanted.shape)
        order = sorted(range(len(prompts)), key=lambda number: list(prompts[number]))  # like beginnings side by side
        for cut in micro_batches([len(prompts[number]) for number in order], READ_AT_ONCE, padded=is_padded(model)):
            group = [order[place] for place in cut]
            some = [prompts[place] for place in group]
            found[group] = next_token_logps(model, some, wanted[group]).cpu()
    return found


def _saved(rows: Sequence[Row]) -> int:
    """Tokens that need not be read again."""
    prefixes = shared_prefixes(rows)
    distinct = {id(prefix): len(prefix.ids) for prefix in prefixes.values()}
    return sum(len(prefix.ids) for prefix in prefixes.values()) - sum(distinct.values())


def _after_shared_beginnings(model: nn.Module, rows: Sequence[Row], wanted: Tensor) -> Tensor:
    found = torch.zeros(wanted.shape)

    def read(some: Sequence[Row], logits: Tensor) -> None:
        places = [row.index for row in some]
        logps = logits.float().log_softmax(-1)
        found[places] = logps.gather(1, wanted[places].to(logps.device)).cpu()
        for row in some:
            row.ids.append(0)  # one token is all that a row gets, so nothing is decoded

    refill.decode(model, rows, TOKENS_AT_ONCE, read, lambda _: None)
    return found
