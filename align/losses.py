"""Log-probabilities of tokens and sequences, and the losses of language and reward modelling. Pure tensor functions.

B: rows, T: tokens of the longest row, V: vocabulary. Position t of a (B, T-1) tensor belongs to token t+1 of the row,
which the logits at t predict. Untrained positions hold exactly 0 and pass no gradient, whatever stands there; a mean
over no token is 0. All arithmetic on probabilities is at least float32. The DPO family: preference_losses.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def token_logps(logits: Tensor, input_ids: Tensor, trained: Tensor) -> Tensor:
    """Log-probability of each trained token given those before it, shape (B, T-1).

    logits: (B, T, V), as the model returns them (not shifted). input_ids: (B, T). trained: (B, T) bool.
    """
    scored = trained[:, 1:]
    rows = _at_least_float32(logits[:, :-1][scored])  # only scored positions: prompts and padding cost nothing here
    logps = -F.cross_entropy(rows, input_ids[:, 1:][scored], reduction="none")
    return _scatter(logps, scored)


def token_entropies(logits: Tensor, trained: Tensor) -> Tensor:
    """Entropy in nats of the distribution that each trained token is drawn from, shape (B, T-1)."""
    scored = trained[:, 1:]
    logps = _at_least_float32(logits[:, :-1][scored]).log_softmax(-1)
    return _scatter(-torch.special.xlogy(logps.exp(), logps.exp()).sum(-1), scored)


def sequence_logps(token_logps: Tensor) -> Tensor:
    """Log-probability of each row's trained tokens together, (B,): the sum over its tokens."""
    return token_logps.sum(-1)


def scored_tokens(trained: Tensor) -> Tensor:
    """Number of tokens of each row that have a log-probability, (B,). The first token has none: nothing predicts it."""
    return trained[:, 1:].sum(-1)


def mean_logps(token_logps: Tensor, trained: Tensor) -> Tensor:
    """Mean log-probability of each row's trained tokens, (B,); 0 for a row without any."""
    return token_logps.sum(-1) / scored_tokens(trained).clamp(min=1)


def nll_sum(token_logps: Tensor) -> Tensor:
    """Negative log-likelihood of all trained tokens of the batch together, a scalar.

    Divide by the number of trained tokens of the whole optimiser step, not of this micro-batch: then any split of the
    step into micro-batches gives the same gradient.
    """
    return -token_logps.sum()


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Tensor | None = None,
    probability: Tensor | None = None,
    centering: float = 0.0,
) -> Tensor:
    """Loss per pair of rewards, (B,): -p log s(d) - (1 - p) log s(-d) + c (chosen + rejected)^2.

    d = chosen - rejected - margin (Bradley & Terry 1952; Ouyang 2022, eq. 1; the margin: Touvron 2023, eq. 2).
    margin: by how much chosen should win, (B,). probability: p, that chosen is the better one, (B,); None: 1.
    centering: c, keeps rewards around 0 (Eisenstein 2023, sec. 4).
    """
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    loss = soft_logistic_loss(difference, probability)
    return loss + centering * (chosen + rejected).square() if centering else loss


def soft_logistic_loss(logit: Tensor, probability: Tensor | None = None) -> Tensor:
    """Cross-entropy of the label "first is better" at this logit, elementwise: -p log s(x) - (1 - p) log s(-x)."""
    if probability is None:
        return -F.logsigmoid(logit)
    return -probability * F.logsigmoid(logit) - (1 - probability) * F.logsigmoid(-logit)


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _scatter(values: Tensor, scored: Tensor) -> Tensor:
    """(N,) values at the N true places of `scored`, 0 elsewhere."""
    return torch.zeros(scored.shape, dtype=values.dtype, device=values.device).masked_scatter(scored, values)
