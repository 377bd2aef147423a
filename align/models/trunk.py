"""Rows through a model's trunk without padding: one row after the other, each attending to itself alone.

All matrix products see the real tokens and nothing else. Attention goes document by document; transformers lets a
function of ours stand in for its own. Where an architecture does not let it (its layers keep a state, or the model is on
an accelerator, where many small kernels are slow), the rows are padded and the padding is taken out again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "align_documents"
WITH_SINKS = {"gpt_oss"}  # attention with learnt sinks, which SDPA does not have
WHOLE_LAYERS = {"full_attention", "sliding_attention"}  # layer types that hold no state besides keys and values


def hidden_states(model: nn.Module, rows: Sequence[Sequence[int]]) -> Tensor:
    """The trunk's last hidden state of every token of every row, (N, H), rows one after the other.

    model: a causal language model or a classifier, adapters and all. A row must not be empty.
    """
    trunk = trunk_of(model)
    lengths = [len(row) for row in rows]
    place = next(model.parameters()).device
    if place.type != "cpu" or not attends_by_document(model):
        return _padded(trunk, rows, place)
    ids = torch.tensor([[token for row in rows for token in row]], device=place)
    positions = torch.cat([torch.arange(length) for length in lengths])[None].to(place)
    trunk.config._attn_implementation = NAME  # for good: checkpointed layers run once more in the backward pass
    no_mask = torch.ones(
        (1, 1, 1, 1), dtype=torch.bool, device=place
    )  # four dimensions: transformers makes none itself
    output = trunk(input_ids=ids, position_ids=positions, attention_mask=no_mask, use_cache=False, documents=lengths)
    return cast(Tensor, output.last_hidden_state[0])


def trunk_of(model: nn.Module) -> Any:
    """The layers below the head, in whatever adapters wrapped them."""
    inner: Any = inner_model(model)
    return getattr(inner, inner.base_model_prefix)


def inner_model(model: nn.Module) -> Any:
    """transformers' model below peft's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def attends_by_document(model: nn.Module) -> bool:
    """Whether this architecture's attention can be replaced by ours, and ours is the same."""
    inner: Any = inner_model(model)
    config: Any = inner.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    plain = getattr(config, "attn_logit_softcapping", None) is None and config.model_type not in WITH_SINKS
    return bool(getattr(inner, "_supports_attention_backend", False)) and layers <= WHOLE_LAYERS and plain


def document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    documents: Sequence[int] | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document; transformers' own SDPA where no documents are given.

    query: (1, heads, N, D), key and value alike; documents: their lengths, N together. Returns (1, N, heads, D).
    """
    if documents is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more)  # type: ignore[no-any-return]
    outputs = []
    parts = (torch.split(tensor, list(documents), dim=2) for tensor in (query, key, value))
    width = more.get("sliding_window")
    for q, k, v in zip(*parts, strict=True):
        length = q.shape[2]
        window = _window(length, width, q.device) if width and length > width else None
        outputs.append(
            F.scaled_dot_product_attention(  # in float32: in bfloat16 it is slower than that on a CPU
                q.float(), k.float(), v.float(), window, is_causal=window is None, scale=more.get("scaling"),
                enable_gqa=q.shape[1] != k.shape[1],
            )
        )  # fmt: skip
    return torch.cat(outputs, dim=2).to(query.dtype).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, document_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def _window(length: int, width: int, place: torch.device) -> Tensor:
    """Which tokens see which, (length, length) bool: themselves and the width - 1 before them."""
    here = torch.arange(length, device=place)
    distance = here[:, None] - here[None]
    return (distance >= 0) & (distance < width)


def _padded(trunk: Any, rows: Sequence[Sequence[int]], place: torch.device) -> Tensor:
    longest = max(len(row) for row in rows)
    ids = torch.zeros((len(rows), longest), dtype=torch.long)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    output = trunk(input_ids=ids.to(place), attention_mask=mask.to(place), use_cache=False)
    return cast(Tensor, output.last_hidden_state[mask.bool().to(place)])
