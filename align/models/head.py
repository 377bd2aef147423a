"""From hidden states to log-probabilities, a chunk of tokens at a time, so that memory does not grow with the vocabulary
times the length: above a bound the backward pass computes each chunk's logits again, one matrix product more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from align.errors import AlignError
from align.models.plain_head import PlainLogps, compute_weight, is_plain, plain_logps
from align.models.trunk import hidden_states, inner_model

LOGITS_AT_ONCE = 2**23  # numbers: 32 MB in float32
LOGITS_KEPT_BYTES = 2**27  # that may wait for the backward pass
AGREEMENT = 2e-2  # largest difference, in logits, of two ways to compute the same in bfloat16

Chunk = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # states and targets -> log-probabilities and entropies


def target_logps(
    model: nn.Module, hidden: Tensor, targets: Tensor, *, temperature: float = 1.0, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities (M,) of `targets` under softmax(logits / temperature), float32, and entropies (M,) where asked.

    hidden: (M, H), the states that predict the targets.
    """
    if not len(hidden):
        nothing = hidden.new_zeros(0, dtype=torch.float32)
        return nothing, nothing if entropy else None
    work, rows, kept_bytes = _way(model, len(hidden), temperature, entropy)
    again = torch.is_grad_enabled() and len(hidden) * _vocabulary(model) * kept_bytes > LOGITS_KEPT_BYTES
    parts = [
        checkpoint(work, states, wanted, use_reentrant=False, preserve_rng_state=False)
        if again
        else work(states, wanted)
        for states, wanted in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True)
    ]
    logps = torch.cat([part[0] for part in parts])
    return logps, torch.cat([part[1] for part in parts]) if entropy else None


def _way(model: nn.Module, tokens: int, temperature: float, entropy: bool) -> tuple[Chunk, int, int]:
    """How log-probabilities are computed, of how many tokens at once, and the bytes of a logit that wait for the backward
    pass. Where none wait, all chunks are computed in one place: else small results would come to lie in the gap that the
    last chunk left, and the next would need a new one."""
    head: Any = inner_model(model).get_output_embeddings()
    learns, vocabulary = torch.is_grad_enabled(), _vocabulary(model)
    rows = max(1, LOGITS_AT_ONCE // vocabulary)
    if not is_plain(head) or _done_to_logits(model) != (1.0, None) or (entropy and learns):
        return partial(_chunk, model, temperature, entropy), rows, 4
    matrix = compute_weight(head.weight)
    if learns and head.weight.requires_grad:
        at_once = max(1, LOGITS_KEPT_BYTES // matrix.itemsize // vocabulary)
        return partial(_plain_with_gradients, head.weight, matrix, temperature, None), at_once, matrix.itemsize
    space = matrix.new_empty((min(rows, tokens), vocabulary))
    if learns:
        return partial(_plain_with_gradients, head.weight, matrix, temperature, space), rows, 0
    return partial(_plain, matrix, temperature, entropy, space), rows, 0


def next_token_logps(model: nn.Module, rows: Sequence[Sequence[int]], targets: Tensor) -> Tensor:
    """Log-probabilities (N, K), float32, of `targets` (N, K) as the next token after each of N rows."""
    ends = torch.tensor([len(row) for row in rows], device=next(model.parameters()).device).cumsum(0) - 1
    states = hidden_states(model, rows, ends)
    rows_at_once = max(1, LOGITS_AT_ONCE // _vocabulary(model))
    parts = zip(torch.split(states, rows_at_once), torch.split(targets.to(states.device), rows_at_once), strict=True)
    found = [_logits(model, some).float().log_softmax(-1).gather(1, wanted) for some, wanted in parts]
    return torch.cat(found) if found else states.new_zeros(targets.shape, dtype=torch.float32)


def check_head(model: nn.Module) -> None:
    """Raises AlignError for an architecture that does more between trunk and logits than is known here."""
    probe = [1, 2, 3]
    with torch.no_grad():
        ours = _logits(model, hidden_states(model, [probe])).float()
        place = next(model.parameters()).device
        theirs = inner_model(model)(input_ids=torch.tensor([probe], device=place), use_cache=False).logits[0].float()
    off = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1))
    if off > AGREEMENT:
        raise AlignError(
            f"{type(inner_model(model)).__name__}: its logits are not its head on its last hidden state (off by {off:.2g})",
            "This architecture cannot be trained by ppo yet; Llama, Qwen, Gemma, Mistral, Phi and GPT-2 can.",
        )


def _chunk(
    model: nn.Module, temperature: float, entropy: bool, hidden: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    logits = _logits(model, hidden).float()
    if temperature != 1:
        logits = logits / temperature
    total = logits.logsumexp(-1)
    logps = logits.gather(1, targets[:, None]).squeeze(1) - total
    if not entropy:
        return logps, logps
    return logps, total - ((logits - total[:, None]).exp() * logits).sum(-1)


def _plain(
    matrix: Tensor, temperature: float, entropy: bool, space: Tensor, states: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    return plain_logps(states, matrix, targets, temperature, space, entropy=entropy)


def _plain_with_gradients(
    weight: Tensor, matrix: Tensor, temperature: float, space: Tensor | None, states: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    logps: Tensor = PlainLogps.apply(states, weight, matrix, targets, temperature, space)  # type: ignore[no-untyped-call]
    return logps, logps


def _logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """The head's logits with what some architectures do to them."""
    logits: Tensor = inner_model(model).get_output_embeddings()(hidden)
    scale, cap = _done_to_logits(model)
    logits = logits * scale if scale != 1 else logits
    return torch.tanh(logits / cap) * cap if cap else logits


def _done_to_logits(model: nn.Module) -> tuple[float, float | None]:
    """Factor and cap: Granite and Cohere scale, Gemma caps."""
    config: Any = inner_model(model).config.get_text_config()
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return scale, getattr(config, "final_logit_softcapping", None)


def _vocabulary(model: nn.Module) -> int:
    return int(inner_model(model).get_output_embeddings().weight.shape[0])
