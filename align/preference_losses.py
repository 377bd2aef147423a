"""The DPO family: one pure function per paper, from log-probabilities of answers to a loss per pair, (B,).

policy and reference hold log-probabilities of whole answers, summed over their trained tokens; `tokens` holds the
number of those (losses.scored_tokens). s is the logistic function, log-ratio is policy - reference. Means over a batch
are the caller's, over pairs: then splitting a batch changes nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from align.losses import soft_logistic_loss


class Pair(NamedTuple):
    """One number for each answer of a pair, (B,) each."""

    chosen: Tensor
    rejected: Tensor


def log_ratios(policy: Pair, reference: Pair) -> Pair:
    """Policy minus reference for each answer; times beta it is DPO's implicit reward."""
    return Pair(policy.chosen - reference.chosen, policy.rejected - reference.rejected)


def margins(policy: Pair, reference: Pair) -> Tensor:
    """By how much the log-ratio of chosen is above that of rejected, (B,); 0 when policy and reference are equal."""
    ratios = log_ratios(policy, reference)
    return ratios.chosen - ratios.rejected


def sigmoid_loss(
    policy: Pair,
    reference: Pair,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    probability: Tensor | None = None,
) -> Tensor:
    """DPO (Rafailov 2023, eq. 7): -log s(beta * margin).

    beta: pull towards the reference, > 0; small is weak. label_smoothing: share e of labels taken to be wrong, which
    gives conservative DPO (Mitchell 2023, eq. 3): -(1 - e) log s(z) - e log s(-z). probability: of chosen being the
    better one, (B,), instead of 1; smoothing then mixes it with its opposite.
    """
    logit = beta * margins(policy, reference)
    if probability is None and not label_smoothing:
        return soft_logistic_loss(logit)
    p = torch.ones_like(logit) if probability is None else probability
    return soft_logistic_loss(logit, p * (1 - label_smoothing) + (1 - p) * label_smoothing)


def robust_loss(policy: Pair, reference: Pair, *, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO (Chowdhury 2024, eq. 12): unbiased where a share e < 0.5 of labels is flipped.

    (-(1 - e) log s(z) + e log s(-z)) / (1 - 2e) with z = beta * margin. May be negative.
    """
    logit = beta * margins(policy, reference)
    right, flipped = soft_logistic_loss(logit), soft_logistic_loss(-logit)
    return ((1 - label_smoothing) * right - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo_loss(policy: Pair, reference: Pair, tokens: Pair, *, beta: float) -> Tensor:
    """IPO (Azar 2023, eq. 17): (h - 1 / (2 beta))^2, h the margin of the mean log-ratios per token.

    The mean is over scored tokens; its authors confirmed the mean, which the paper leaves open.
    """
    ratios = log_ratios(policy, reference)
    difference = _mean(ratios.chosen, tokens.chosen) - _mean(ratios.rejected, tokens.rejected)
    return (difference - 1 / (2 * beta)).square()


def hinge_loss(policy: Pair, reference: Pair, *, beta: float) -> Tensor:
    """Hinge on the margin (SLiC, Zhao 2023, eq. 1, in the form of RSO, Liu 2023, eq. 10): max(0, 1 - beta * margin)."""
    return torch.relu(1 - beta * margins(policy, reference))


def apo_zero_loss(policy: Pair, reference: Pair, *, beta: float) -> Tensor:
    """APO-zero (D'Oosterlinck 2024, eq. 7): 1 - s(beta * chosen's log-ratio) + s(beta * rejected's)."""
    ratios = log_ratios(policy, reference)
    return 1 - torch.sigmoid(beta * ratios.chosen) + torch.sigmoid(beta * ratios.rejected)


def simpo_loss(policy: Pair, tokens: Pair, *, beta: float, target_margin: float) -> Tensor:
    """SimPO (Meng 2024, eq. 6), no reference: -log s(beta * (mean chosen - mean rejected - target_margin)).

    target_margin: in units of beta (gamma / beta in the paper's terms).
    """
    difference = _mean(policy.chosen, tokens.chosen) - _mean(policy.rejected, tokens.rejected)
    return soft_logistic_loss(beta * (difference - target_margin))


def cpo_loss(policy: Pair, tokens: Pair, *, beta: float, answer_weight: float) -> Tensor:
    """CPO (Xu 2024, eq. 3 and 5), no reference: -log s(beta * (chosen - rejected)) + weight * NLL of chosen.

    The NLL is the mean over the chosen answer's tokens.
    """
    preference = soft_logistic_loss(beta * (policy.chosen - policy.rejected))
    return preference - answer_weight * _mean(policy.chosen, tokens.chosen)


def orpo_loss(policy: Pair, tokens: Pair, *, beta: float) -> Tensor:
    """ORPO (Hong 2024, eq. 6 and 7), no reference: NLL of chosen - beta * log s(log odds ratio).

    odds(p) = p / (1 - p) of the mean probability per token; the NLL is the mean over the chosen answer's tokens.
    """
    chosen, rejected = _mean(policy.chosen, tokens.chosen), _mean(policy.rejected, tokens.rejected)
    log_odds_ratio = chosen - rejected - (_log1mexp(chosen) - _log1mexp(rejected))
    return -chosen + beta * soft_logistic_loss(log_odds_ratio)


def kto_loss(
    policy: Tensor,
    reference: Tensor,
    desirable: Tensor,
    kl: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO (Ethayarajh 2024, eq. 8) for single answers, (B,): w * (1 - s(+-beta * (log-ratio - kl))).

    policy, reference: log-probabilities of the answers, (B,). desirable: (B,) bool. kl: the baseline of `kto_kl`.
    """
    distance = beta * (policy - reference - kl)
    good = desirable_weight * (1 - torch.sigmoid(distance))
    bad = undesirable_weight * (1 - torch.sigmoid(-distance))
    return torch.where(desirable, good, bad)


def kto_kl(policy: Tensor, reference: Tensor) -> Tensor:
    """KTO's baseline, a scalar without gradient: mean log-ratio, at least 0, of answers put to other rows' prompts.

    policy, reference: log-probabilities of those mismatched answers, (B,). 0 where there is none.
    """
    ratios = (policy - reference).detach()
    return ratios.mean().clamp(min=0) if len(ratios) else ratios.sum()


def _mean(logps: Tensor, tokens: Tensor) -> Tensor:
    return logps / tokens.clamp(min=1)


def _log1mexp(logp: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, exact near 0 and far from it (Maechler 2012); finite at 0, gradient included."""
    x = logp.clamp(max=-torch.finfo(logp.dtype).tiny)
    near = torch.log(-torch.expm1(x.clamp(min=-1.0)))  # each branch is kept where it is finite: where() passes NaN
    far = torch.log1p(-torch.exp(x.clamp(max=-0.5)))
    return torch.where(x > -0.6931472, near, far)
