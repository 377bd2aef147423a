"""Losses of the PPO family, one pure function per equation, for each token: the policy's, the value model's, the KL's.

Shapes and masks are those of advantages.py: (B, R), true at real response tokens; a masked place holds anything, comes
out as exactly 0 and passes no gradient. No function takes a mean: `loss_sum` of the micro-batches, each divided by the
`step_weight` of the whole optimiser step, gives the same gradient however the step is split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from align.advantages import KlEstimator, kl_terms, masked

Average = Literal["tokens", "rows", "constant"]


class PolicyLoss(NamedTuple):
    """Loss, probability ratio to the round's start, and whether the clip took the gradient away; (B, R) each."""

    losses: Tensor
    ratio: Tensor
    clipped: Tensor


class ValueLoss(NamedTuple):
    """Loss, and whether the clipped error was the larger one; (B, R) each."""

    losses: Tensor
    clipped: Tensor


def policy_losses(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float,
    clip_high: float | None = None,
) -> PolicyLoss:
    """PPO's clipped surrogate (Schulman 2017, eq. 7): -min(r A, clip(r, 1 - clip, 1 + clip_high) A).

    r = exp(logps - old_logps). clip_high: the upper side where it differs (DAPO, Yu 2025, sec. 3.1); None: as `clip`.
    """
    advantages = masked(advantages, mask)
    ratio = torch.exp(masked(logps, mask) - masked(old_logps, mask))
    bounded = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    free, held = ratio * advantages, bounded * advantages
    return PolicyLoss(-torch.minimum(free, held), masked(ratio, mask), held < free)


def value_losses(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float | None) -> ValueLoss:
    """Squared error of the values, halved: max((v - R)^2, (clip(v, old - clip, old + clip) - R)^2) / 2.

    (Schulman's own PPO; Huang 2022, detail 9.) clip: the most that a value moves in a round without penalty; None: no
    clipping.
    """
    values, old_values, returns = (masked(x, mask) for x in (values, old_values, returns))
    free = (values - returns).square()
    if clip is None:
        return ValueLoss(free / 2, torch.zeros_like(mask))
    held = (values.clamp(old_values - clip, old_values + clip) - returns).square()
    return ValueLoss(torch.maximum(free, held) / 2, held > free)


def kl_losses(logps: Tensor, reference_logps: Tensor, mask: Tensor, estimator: KlEstimator) -> Tensor:
    """The KL to the reference as a loss, (B, R): the value of the estimator, with a gradient that lowers the KL.

    The tokens are the policy's own samples, and no gradient goes through the sampling. So differentiating k1 gives 0 in
    expectation, while k2 gives the gradient of KL(policy || reference) at each token, as k1 in the reward does (Liu
    2025, "Rethinking KL Regularization in RLHF"): k1 borrows the gradient of k2. k3, as in GRPO (Shao 2024, eq. 4), has
    the gradient of KL(reference || policy), the same to first order near the reference. This holds on the first pass,
    while the samples are the current policy's; the KL that a token causes at later ones is charged in the reward only.
    """
    if estimator != "k1":
        return kl_terms(logps, reference_logps, mask, estimator)
    carrier = kl_terms(logps, reference_logps, mask, "k2")
    return kl_terms(logps, reference_logps, mask, "k1").detach() + (carrier - carrier.detach())


def importance_weights(old_logps: Tensor, behaviour_logps: Tensor, mask: Tensor, *, cap: float) -> Tensor:
    """Truncated importance weights, (B, R), without gradient: min(policy / sampler, cap) (Yao 2025).

    They correct for an engine that samples from other probabilities than the trained model computes.
    old_logps: the model's at the round's start. behaviour_logps: the engine's.
    """
    ratio = torch.exp(masked(old_logps, mask) - masked(behaviour_logps, mask)).clamp(max=cap)
    return masked(ratio, mask).detach()


def loss_sum(losses: Tensor, mask: Tensor, average: Average, longest: int) -> Tensor:
    """The part of a micro-batch in the loss of a step, a scalar, to be divided by the step's `step_weight`.

    tokens: every token of the step weighs the same. rows: every response does (GRPO, Shao 2024, eq. 3). constant: every
    response is divided by `longest`, the most tokens that one can have, so none is favoured (Dr. GRPO, Liu 2025).
    """
    losses = masked(losses, mask)
    if average == "tokens":
        return losses.sum()
    if average == "rows":
        return (losses.sum(1) / mask.sum(1).clamp(min=1)).sum()
    return losses.sum() / longest


def step_weight(lengths: Sequence[int], average: Average) -> float:
    """What the loss sums of an optimiser step are divided by, at least 1.

    lengths: real tokens of each response of the whole step, all micro-batches together.
    """
    return float(max(sum(lengths) if average == "tokens" else len(lengths), 1))
