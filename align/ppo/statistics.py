"""Numbers about one round of responses: what the log and the guards look at. Padding is in none of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from align.advantages import explained_variance, masked_mean
from align.ppo.round import Round
from align.rollout.generation import Reply

GRAM = 4  # tokens; a response that says the same four again repeats itself


def round_numbers(
    found: Round, mask: Tensor, entropies: Tensor, behaviour: Tensor, replies: Sequence[Reply], totals: Sequence[float]
) -> dict[str, float]:
    """Reward, KL to the reference (nats per response and per token), entropy (nats per token), length, and signs of trouble.

    A length does not count the stop token. entropies, behaviour: entropy at each token, and the engine's own
    log-probability of it, (B, R).
    """
    ratios = (found.old_logps - found.reference_logps) * mask
    lengths = mask.sum(1).double() - torch.tensor([float(reply.finished) for reply in replies])
    return {
        "reward": float(np.mean(totals)),
        "reward_std": float(np.std(totals)),
        "kl": float(ratios.sum() / len(mask)),
        "kl_token": float(masked_mean(ratios, mask)),
        "entropy": float(masked_mean(entropies, mask)),
        "length": float(lengths.mean()),
        "finished": sum(reply.finished for reply in replies) / len(replies),
        "repetition": float(np.mean([repetition(response) for response in found.responses])),
        "length_correlation": _correlation(totals, lengths.tolist()),
        "mismatch": float(masked_mean((behaviour - found.old_logps).abs(), mask)),
        "value_explained": explained_variance(found.values, found.returns, mask),
    }


def repetition(tokens: Sequence[int]) -> float:
    """Share of a response's runs of four tokens that it had before; 0 for a shorter one."""
    grams = [tuple(tokens[start : start + GRAM]) for start in range(len(tokens) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _correlation(left: Sequence[float], right: Sequence[float]) -> float:
    """Pearson's; 0 where one of them is constant."""
    if np.std(left) == 0 or np.std(right) == 0:
        return 0.0
    return float(np.corrcoef(left, right)[0, 1])
