"""From hidden states to log-probabilities, a chunk of tokens at a time, so that memory does not grow with the vocabulary
times the length: above a bound the backward pass computes each chunk's logits again, one matrix product more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from align.errors import AlignError
from align.models.trunk import hidden_states, inner_model

LOGITS_AT_ONCE = 2**23  # numbers: 32 MB in float32
LOGITS_KEPT = 2**25  # numbers that may wait for the backward pass: 128 MB in float32
AGREEMENT = 2e-2  # largest difference, in logits, of two ways to compute the same in bfloat16


def target_logps(
    model: nn.Module, hidden: Tensor, targets: Tensor, *, temperature: float = 1.0, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities (M,) of `targets` under softmax(logits / temperature), float32, and entropies (M,) where asked.

    hidden: (M, H), the states that predict the targets.
    """
    vocabulary = int(inner_model(model).get_output_embeddings().weight.shape[0])
    again = torch.is_grad_enabled() and len(hidden) * vocabulary > LOGITS_KEPT
    parts = []
    for states, wanted in zip(_chunks(hidden, vocabulary), _chunks(targets, vocabulary), strict=True):
        if again:
            parts.append(
                checkpoint(
                    _chunk, model, states, wanted, temperature, entropy, use_reentrant=False, preserve_rng_state=False
                )
            )
        else:
            parts.append(_chunk(model, states, wanted, temperature, entropy))
    if not parts:
        return hidden.new_zeros(0, dtype=torch.float32), hidden.new_zeros(0, dtype=torch.float32) if entropy else None
    logps = torch.cat([part[0] for part in parts])
    return logps, torch.cat([part[1] for part in parts]) if entropy else None


def next_token_logps(model: nn.Module, rows: Sequence[Sequence[int]], targets: Tensor) -> Tensor:
    """Log-probabilities (N, K), float32, of `targets` (N, K) as the next token after each of N rows."""
    ends = torch.tensor([len(row) for row in rows], device=next(model.parameters()).device).cumsum(0) - 1
    states = hidden_states(model, rows, ends)
    vocabulary = int(inner_model(model).get_output_embeddings().weight.shape[0])
    parts = zip(_chunks(states, vocabulary), _chunks(targets.to(states.device), vocabulary), strict=True)
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
    model: nn.Module, hidden: Tensor, targets: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor]:
    logits = _logits(model, hidden).float()
    if temperature != 1:
        logits = logits / temperature
    total = logits.logsumexp(-1)
    logps = logits.gather(1, targets[:, None]).squeeze(1) - total
    if not entropy:
        return logps, logps
    return logps, total - ((logits - total[:, None]).exp() * logits).sum(-1)


def _logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """The head's logits with what some architectures do to them: Granite and Cohere scale, Gemma caps."""
    inner: Any = inner_model(model)
    config: Any = inner.config.get_text_config()
    logits: Tensor = inner.get_output_embeddings()(hidden)
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    logits = logits * scale if scale != 1 else logits
    cap = getattr(config, "final_logit_softcapping", None)
    return torch.tanh(logits / cap) * cap if cap else logits


def _chunks(tensor: Tensor, vocabulary: int) -> tuple[Tensor, ...]:
    return torch.split(tensor, max(1, LOGITS_AT_ONCE // vocabulary)) if len(tensor) else ()
