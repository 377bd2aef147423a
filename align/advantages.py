"""From scores of responses to an advantage for each of their tokens. Pure tensor functions, and two small running states.

B: responses, R: tokens of the longest response. Tensors of shape (B, R) belong to response tokens; `mask` (B, R) bool is
true for the real ones, the stop token among them, wherever the padding stands. Masked places may hold anything, NaN
included: they influence nothing and come out as exactly 0. All arithmetic is at least float32. The losses that
advantages go into: ppo_losses.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

KlEstimator = Literal["k1", "k2", "k3"]

GROUP_FLOOR = 1e-4  # added to the deviation of a group's scores
FLOOR = 1e-8  # added to a round's variance and to a running deviation: a constant comes out as 0
MOST_KL_ERROR = 0.2  # the relative error of the KL that one update of its coefficient answers to, at most


class Advantages(NamedTuple):
    """By how much each token was better than expected, and the return that its value should have been; (B, R) each."""

    advantages: Tensor
    returns: Tensor


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """The values, in float32 at least, with exactly 0 at masked places, whose gradient is 0 too."""
    values = _at_least_float32(values)
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real tokens of all rows together, a scalar; 0 over none."""
    return masked(values, mask).sum() / mask.sum().clamp(min=1)


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def spread(per_row: Tensor, mask: Tensor) -> Tensor:
    """(B,) numbers put on every real token of their row, (B, R)."""
    return masked(per_row[:, None].expand(mask.shape), mask)


# Rewards of tokens ---------------------------------------------------------------------------------------------------


def kl_terms(logps: Tensor, reference_logps: Tensor, mask: Tensor, estimator: KlEstimator) -> Tensor:
    """Estimate of KL(policy || reference) at each token that the policy sampled, (B, R) (Schulman 2020).

    With d = log policy - log reference: k1 = d, unbiased and of either sign; k2 = d^2 / 2, biased and never negative;
    k3 = exp(-d) - 1 + d, unbiased and never negative.
    """
    difference = masked(logps, mask) - masked(reference_logps, mask)
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    return torch.expm1(-difference) + difference  # expm1: exp(-d) - 1 has no digit left where d is small


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, *, coefficient: float) -> Tensor:
    """Reward of each token, (B, R): -coefficient * kl, and the score of the response on its last real token.

    (Ziegler 2019, eq. 2; Ouyang 2022, eq. 2.) scores: (B,). kl: (B, R). A row without tokens has no reward.
    """
    last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
    return spread(scores, last) - coefficient * masked(kl, mask)


# Advantages ----------------------------------------------------------------------------------------------------------


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lambda_: float) -> Advantages:
    """Generalised advantage estimation (Schulman 2016, eq. 16); returns = advantages + values, the targets of values.

    rewards, values: (B, R); a value is that of the state before its token. Nothing is expected after the last token.
    """
    rewards, values = masked(rewards, mask), masked(values, mask)
    advantages = torch.zeros_like(rewards)
    advantage = following = values.new_zeros(len(values))
    for t in reversed(range(mask.shape[1])):
        real = mask[:, t]  # masked places are stepped over
        error = rewards[:, t] + gamma * following - values[:, t]
        advantage = torch.where(real, error + gamma * lambda_ * advantage, advantage)
        following = torch.where(real, values[:, t], following)
        advantages[:, t] = advantage
    advantages = masked(advantages, mask)
    return Advantages(advantages, advantages + values)


def discounted_returns(rewards: Tensor, mask: Tensor, *, gamma: float) -> Tensor:
    """Sum of the rewards from each token on, discounted by gamma per token, (B, R); REINFORCE++ (Hu 2025)."""
    return gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lambda_=1.0).advantages


def rloo_advantages(scores: Tensor, samples: int) -> Tensor:
    """Score minus the mean score of the other responses to the same prompt, (B,) (Kool 2019; Ahmadian 2024).

    scores: (B,), the `samples` >= 2 responses to one prompt next to each other; grpo_advantages alike.
    """
    return (_centred(scores, samples) * (samples / (samples - 1))).flatten()


def grpo_advantages(scores: Tensor, samples: int, *, divide_by_std: bool) -> Tensor:
    """Score minus the mean of its group, over the group's deviation, (B,) (Shao 2024, sec. 4.1.2).

    divide_by_std: without it, prompts that are easy or hard weigh no more than others (Dr. GRPO, Liu 2025).
    """
    centred = _centred(scores, samples)
    if divide_by_std:
        centred = centred / (centred.std(1, keepdim=True) + GROUP_FLOOR)
    return centred.flatten()


def _centred(scores: Tensor, samples: int) -> Tensor:
    """Scores less the mean of their group, (B / samples, samples)."""
    grouped = _at_least_float32(scores).reshape(-1, samples)
    above_first = grouped - grouped[:, :1]  # equal scores are then exactly 0, not a rounding error over GROUP_FLOOR
    return above_first - above_first.mean(1, keepdim=True)


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Values scaled to deviation 1 over all real tokens, (B, R), and to mean 0 unless `shift_mean` is false.

    The variance is that of the tokens at hand, without Bessel's correction ("The N implementation details of RLHF with PPO", Huang 2024).
    """
    mean = masked_mean(values, mask)
    centred = masked(masked(values, mask) - mean, mask)
    centred = masked(centred - masked_mean(centred, mask), mask)  # again: the mean of large values is off by a rounding
    whitened = centred * torch.rsqrt(masked_mean(centred.square(), mask) + FLOOR)
    return whitened if shift_mean else masked(whitened + mean, mask)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """Share of the returns' variance that the values account for: 1 is perfect, 0 no better than a constant.

    Below 0: worse than a constant. 0 where the returns do not vary.
    """
    total = _variance(returns, mask)
    return 1 - _variance(masked(returns, mask) - masked(values, mask), mask) / total if total else 0.0


def _variance(values: Tensor, mask: Tensor) -> float:
    return float(masked_mean((masked(values, mask) - masked_mean(values, mask)).square(), mask))


# Running states ------------------------------------------------------------------------------------------------------


@dataclass
class RunningMoments:
    """Mean and deviation of all scores so far, merged batch by batch (Welford 1962; Chan 1979).

    m2: sum of squared distances from the mean.
    """

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0

    def update(self, scores: Tensor | Sequence[float]) -> None:
        """Take in a batch of scores, (B,)."""
        batch = torch.as_tensor(scores, dtype=torch.float64).flatten()
        added = len(batch)
        if not added:
            return
        batch_mean = float(batch.mean())
        distance, total = batch_mean - self.mean, self.count + added
        self.m2 += float((batch - batch_mean).square().sum()) + distance**2 * self.count * added / total
        self.mean += distance * added / total
        self.count = total

    @property
    def std(self) -> float:
        """Deviation of the scores so far, 0 before two of them differ."""
        return math.sqrt(self.m2 / self.count) if self.count else 0.0

    def as_dict(self) -> dict[str, Any]:
        """The state as plain numbers."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> RunningMoments:
        """The state that `as_dict` gave."""
        return cls(**state)


def normalized(scores: Tensor, moments: RunningMoments) -> Tensor:
    """Scores less the running mean, over the running deviation, (B,); 0 while all scores have been the same."""
    return (_at_least_float32(scores) - moments.mean) / (moments.std + FLOOR)


@dataclass
class KlController:
    """The price of a nat of KL, steered towards a target KL or fixed (Ziegler 2019, sec. 2.2).

    target: nats per response; None: the value never changes. horizon: responses over which the steering works.
    """

    value: float
    target: float | None
    horizon: int

    def update(self, kl_per_response: float, responses: int) -> None:
        """Raise the price after a round whose KL was above the target, lower it after one below."""
        if self.target is None:
            return
        error = min(max(kl_per_response / self.target - 1, -MOST_KL_ERROR), MOST_KL_ERROR)
        self.value *= 1 + error * min(responses / self.horizon, 1)  # at most a whole step: the price stays above 0

    def as_dict(self) -> dict[str, Any]:
        """The state as plain numbers."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> KlController:
        """The state that `as_dict` gave."""
        return cls(**state)
