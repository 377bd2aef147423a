"""Rows through a model's trunk without padding: one row after the other, each attending to itself alone.

All matrix products see the real tokens and nothing else, and what rows begin with alike only once (layout.py). Attention
goes document by document; transformers lets a function of ours stand in for its own. Where an architecture does not let
it (its layers keep a state, or the model is on an accelerator, where many small kernels are slow), the rows are padded
and the padding is taken out again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from align.models.layout import Layout

NAME = "align_documents"
WITH_SINKS = {"gpt_oss"}  # attention with learnt sinks, which SDPA does not have
WHOLE_LAYERS = {"full_attention", "sliding_attention"}  # layer types that hold no state besides keys and values


def hidden_states(model: nn.Module, rows: Sequence[Sequence[int]], at: Tensor | None = None) -> Tensor:
    """The trunk's last hidden state of every token of every row, (N, H), rows one after the other.

    model: a causal language model or a classifier, adapters and all. A row must not be empty. at: places (M,) among the N
    where only those are wanted, (M, H). A beginning that rows share is computed once, and the gradients of all of them
    go through it. So where dropout is active they share its mask there: each row's expectation stays what it was, and
    what differs between rows differs less by chance.
    """
    trunk = trunk_of(model)
    hidden: Tensor
    if not needs_no_padding(model):
        hidden = _padded(trunk, rows, next(model.parameters()).device)
        return hidden if at is None else hidden.index_select(0, at)
    layout = Layout.of(rows)
    trunk.config._attn_implementation = NAME  # for good: checkpointed layers run once more in the backward pass
    output = trunk(
        input_ids=torch.tensor([layout.ids]),
        position_ids=torch.tensor([layout.positions]),
        attention_mask=torch.ones((1, 1, 1, 1), dtype=torch.bool),  # four dimensions: transformers makes none itself
        use_cache=False,
        documents=layout,
    )
    hidden = output.last_hidden_state[0]
    if layout.shares:
        places = torch.tensor(layout.places)
        at = places if at is None else places[at]
    return hidden if at is None else hidden.index_select(0, at)


def needs_no_padding(model: nn.Module) -> bool:
    """Whether rows go through this model's trunk one after the other: a batch costs its tokens, not rows x longest."""
    return next(model.parameters()).device.type == "cpu" and attends_by_document(model)


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
    documents: Layout | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document; transformers' own SDPA where no documents are given.

    query: (1, heads, N, D), key and value alike. Returns (1, N, heads, D). In float32 whatever comes: in bfloat16 SDPA is
    slower than that on a CPU.
    """
    if documents is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more)  # type: ignore[no-any-return]
    how = {"scale": more.get("scaling"), "enable_gqa": query.shape[1] != key.shape[1]}
    width = more.get("sliding_window") or None
    parts = (torch.split(tensor.float(), documents.lengths, dim=2) for tensor in (query, key, value))
    pieces = zip(*parts, strict=True)  # one split: a slice for each piece would make the backward pass slower
    outputs = []
    for block in documents.blocks:
        q, k, v = next(pieces)
        outputs.append(_attend(q, k, v, documents.mask(0, block.first, width), how))
        first_k, first_v = k[:, :, : block.beginning], v[:, :, : block.beginning]
        for rest in block.rests:
            q, k, v = next(pieces)
            mask = documents.mask(block.beginning, rest, width)
            outputs.append(_attend(q, torch.cat([first_k, k], dim=2), torch.cat([first_v, v], dim=2), mask, how))
    return torch.cat(outputs, dim=2).to(query.dtype).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, document_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, how: Mapping[str, Any]) -> Tensor:
    with torch.autocast(
        q.device.type, enabled=False
    ):  # else it is bfloat16 after all, and keeps a kernel for each length
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, **how)


def _padded(trunk: Any, rows: Sequence[Sequence[int]], place: torch.device) -> Tensor:
    longest = max(len(row) for row in rows)
    ids = torch.zeros((len(rows), longest), dtype=torch.long)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    output = trunk(input_ids=ids.to(place), attention_mask=mask.to(place), use_cache=False)
    return cast(Tensor, output.last_hidden_state[mask.bool().to(place)])
