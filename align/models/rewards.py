"""Reward models: one number for a whole text, read at its last real token.

transformers finds that token by looking for the pad id, which is wrong when the pad token is also a real one, so the
place is taken from the attention mask here. Any classifier with a trunk and a `score` head will do.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from align.errors import AlignError
from align.models.source import Source
from align.models.trunk import hidden_states, inner_model

if TYPE_CHECKING:
    from align.batches import Batch


def require_reward(source: Source) -> None:
    """Raises AlignError for a checkpoint without a trained reward head; transformers would make one up."""
    if not source.is_reward:
        raise AlignError(
            f"{source.path}: a language model, not a reward model; it has no trained reward head",
            "Train one (a stage of kind reward), or name a ForSequenceClassification folder with one label.",
        )


def reward_scores(model: nn.Module, batch: Batch) -> Tensor:
    """Rewards, shape (B,), float32: the head's value at the last token that the attention mask shows.

    Rows may be padded on either side. Raises ValueError for a row without tokens.
    """
    classifier: Any = getattr(model, "get_base_model", lambda: model)()
    mask = batch.attention_mask
    if not bool(mask.any(dim=1).all()):
        raise ValueError("a row without tokens has no reward")
    trunk = getattr(classifier, classifier.base_model_prefix)
    places = {}
    if "position_ids" in inspect.signature(trunk.forward).parameters:
        places["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    hidden = trunk(batch.input_ids, attention_mask=mask, use_cache=False, **places).last_hidden_state
    last = mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)
    chosen = hidden[torch.arange(len(last), device=last.device), last]
    with torch.autocast(chosen.device.type, enabled=False):  # a reward in bfloat16 has three digits
        scores: Tensor = classifier.score(chosen.float()).float()
    return scores.squeeze(-1)


def row_rewards(model: nn.Module, rows: Sequence[Sequence[int]]) -> Tensor:
    """Rewards of rows of token ids, (B,), float32: as `reward_scores`, without padding where the architecture allows it.

    Raises ValueError for a row without tokens.
    """
    if not all(rows):
        raise ValueError("a row without tokens has no reward")
    classifier: Any = inner_model(model)
    ends = torch.tensor([len(row) for row in rows], device=next(model.parameters()).device).cumsum(0) - 1
    hidden = hidden_states(model, rows, ends)
    with torch.autocast(hidden.device.type, enabled=False):
        scores: Tensor = classifier.score(hidden.float()).float()
    return scores.squeeze(-1)


def require_head(model: Any, path: str) -> None:
    """Raises AlignError for an architecture whose classifier does not read a decoder's last token."""
    if not isinstance(getattr(model, "score", None), nn.Module):
        raise AlignError(
            f"{path}: {type(model).__name__} has no `score` head on its last token",
            "Use a decoder such as Llama, Qwen, Gemma, Mistral or GPT-2.",
        )


def start_head(model: Any, seed: int) -> None:
    """A new head: normal with deviation 1 / sqrt(width), so that first rewards are of order one (Stiennon 2020)."""
    weight = model.score.weight
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        weight.copy_(noise / weight.shape[1] ** 0.5)
