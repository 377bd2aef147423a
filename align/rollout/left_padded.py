"""The decode loop for any causal model: groups padded on the left, with attention mask and position ids to match.

For what `refill` does not suit: sliding windows, recurrent states, other attention than SDPA. A row leaves its group
when it has finished, and no other takes its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from align.batches import micro_batches
from align.rollout.cache import decoding_cache
from align.rollout.inference import device_of, innermost, taken_by
from align.rollout.rows import Extend, OnDone, Row


def decode(model: nn.Module, rows: Sequence[Row], tokens_at_once: int, extend: Extend, on_done: OnDone) -> None:
    """Give every row its reply. tokens_at_once: prompts and replies of one group, padding included."""
    for group in micro_batches([row.longest for row in rows], tokens_at_once):
        _decode_group(model, [rows[place] for place in group], extend, on_done)


def left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and position ids, each (B, T); the first real token of every row has position 0."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.zeros((len(prompts), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    positions = (mask.cumsum(dim=1) - 1).clamp_(min=0)
    return ids.to(device), mask.to(device), positions.to(device)


def _decode_group(model: nn.Module, rows: list[Row], extend: Extend, on_done: OnDone) -> None:
    ids, mask, positions = left_padded([row.prompt for row in rows], device_of(model))
    memory = decoding_cache(innermost(model).config, ids.shape[1] + max(row.limit for row in rows))
    while rows:
        extend(rows, _forward(model, ids, mask, positions, memory))
        going = [place for place, row in enumerate(rows) if row.going]
        for row in rows:
            if not row.going:
                on_done(row)
        if len(going) < len(rows):
            keep = torch.tensor(going, device=ids.device, dtype=torch.long)
            memory.reorder_cache(keep)  # unlike batch_select_indices, it is there for recurrent caches too
            mask, positions = mask[keep], positions[keep]
            rows = [rows[place] for place in going]
        ids, positions = torch.tensor([row.ids[-1:] for row in rows], device=ids.device), positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones((len(rows), 1))], dim=1)


def _forward(model: nn.Module, ids: Tensor, mask: Tensor, positions: Tensor, memory: DynamicCache) -> Tensor:
    """Logits of the last place, (B, V); `memory` has seen `ids` after it."""
    options: dict[str, Any] = {"position_ids": positions, "logits_to_keep": 1, "cache_params": memory}
    taken = taken_by(model, options)
    if "cache_params" in taken:  # a state-space model: all of its past is in its state, and masked there
        mask = mask[:, -ids.shape[1] :]
    else:
        taken["past_key_values"] = memory
    output = model(input_ids=ids, attention_mask=mask, use_cache=True, **taken)
    return cast(Tensor, output.logits[:, -1])
