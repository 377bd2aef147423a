"""One round: prompts are answered, the responses rewarded, and every token gets its advantage.

1. generate      responses from the policy, sampled at the stage's temperature
2. reward        the weighted sum of the rewards; centred, clipped, less the penalty for a missing stop token
3. look          log-probabilities under policy and reference, and values, in the arithmetic of training
4. charge        the KL to the reference, token by token
5. credit        advantages by the estimator, whitened over the round's tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from align.advantages import (
    KlController,
    RunningMoments,
    discounted_returns,
    gae,
    grpo_advantages,
    kl_terms,
    normalized,
    rloo_advantages,
    spread,
    token_rewards,
    whiten,
)
from align.data.examples import prompt_of
from align.memory import Budget, Cut
from align.models.head import target_logps
from align.models.roles import Roles
from align.models.trunk import hidden_states
from align.ppo.encoding import EncodedPrompt
from align.ppo.prompts import prompts_of_round
from align.ppo.round import Round, Tokens
from align.ppo.statistics import round_numbers
from align.ppo_losses import importance_weights
from align.progress import Progress
from align.recipe.ppo_settings import GaeEstimator, GrpoEstimator, PpoSettings, ReinforceEstimator, RlooEstimator
from align.rewards.response import Response
from align.rewards.total import Rewards, Scored
from align.rollout.engine import Engine
from align.rollout.generation import Reply, Sampling
from align.rollout.inference import device_of, evaluating


class Look(NamedTuple):
    """What the models say of a round's responses, (B, R) each, on the CPU."""

    logps: Tensor
    entropies: Tensor
    reference_logps: Tensor
    values: Tensor


@dataclass
class Controls:
    """What goes on from round to round besides the weights: the KL coefficient and the moments of the rewards."""

    kl: KlController
    moments: RunningMoments


@dataclass(frozen=True)
class Collected:
    """A round, the numbers about it, and its responses with their rewards."""

    round: Round
    numbers: dict[str, float]
    responses: list[Response]
    scored: Scored
    token_rewards: Tensor


@dataclass(frozen=True)
class Collector:
    """What all rounds of a run share."""

    settings: PpoSettings
    prompts: Sequence[EncodedPrompt]
    engine: Engine
    rewards: Rewards
    watched: Rewards
    controls: Controls
    budget: Budget
    seed: int
    progress: Progress

    def collect(self, roles: Roles, number: int) -> Collected:
        """Answer the prompts of a round and find what each token of the answers was worth."""
        settings = self.settings
        places = prompts_of_round(number, len(self.prompts), settings, self.seed)
        prompts = [self.prompts[place] for place in places]
        replies = self._replies(roles, prompts, number)
        responses = [_response(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True)]
        with torch.autocast(device_of(roles.policy).type, enabled=False):  # in their own arithmetic, as `align score`
            scored = self.rewards.score(responses, self.progress)
            watched = self.watched.score(responses, self.progress)
        ids = [reply.ids for reply in replies]
        tokens = Tokens.of([prompt.ids for prompt in prompts], ids, torch.device("cpu"))
        look = self.look(roles, [prompt.ids for prompt in prompts], ids)
        scores = self._shaped(torch.tensor(scored.totals), replies)
        kl = kl_terms(look.logps, look.reference_logps, tokens.mask, settings.kl_estimator)
        charged = self.controls.kl.value if settings.kl_in == "reward" else 0.0
        rewards = token_rewards(scores, kl, tokens.mask, coefficient=charged)
        advantages, returns = credit(rewards, look.values, tokens.mask, settings)
        behaviour = tokens.table(torch.tensor([logp for reply in replies for logp in reply.logps]))
        weights = torch.ones_like(look.logps)
        if settings.engine != "local":
            weights = importance_weights(look.logps, behaviour, tokens.mask, cap=settings.importance_cap)
        found = Round(
            number, [prompt.ids for prompt in prompts], ids, look.logps, look.reference_logps, look.values,
            advantages, returns, weights,
        )  # fmt: skip
        numbers = round_numbers(found, tokens.mask, look.entropies, behaviour, replies, scored.totals)
        numbers |= {f"reward.{name}": _mean(values) for name, values in scored.parts.items()}
        numbers |= {f"watch.{name}": _mean(values) for name, values in watched.parts.items()}
        self.controls.kl.update(numbers["kl"], len(replies))
        price = charged if settings.kl_in == "reward" else self.controls.kl.value  # the loss comes after the update
        numbers |= {"number": float(number), "kl_coefficient": price}
        return Collected(found, numbers, responses, scored, rewards)

    def look(self, roles: Roles, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> Look:
        """Log-probabilities, entropies and values of responses, without gradients, a micro-batch at a time."""
        width = max(len(response) for response in responses)
        lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]

        def looked(cut: Cut) -> Look:
            tables = [torch.zeros(len(responses), width) for _ in Look._fields]
            for group in cut(lengths):
                tokens = Tokens.of([prompts[i] for i in group], [responses[i] for i in group], device_of(roles.policy))
                for table, column in zip(tables, _looked(roles, tokens, self.settings.temperature), strict=True):
                    table[group, : column.shape[1]] = column.float().cpu()
            return Look(*tables)

        with evaluating(roles):
            return self.budget.fitted(roles, lengths, looked)

    def _replies(self, roles: Roles, prompts: Sequence[EncodedPrompt], number: int) -> list[Reply]:
        settings = self.settings
        sampling = Sampling(
            max_new_tokens=settings.max_new_tokens, temperature=settings.temperature, top_k=settings.top_k,
            top_p=settings.top_p, seed=(self.seed << 24) + number,
        )  # fmt: skip
        self.engine.sync(roles.policy)
        return self.engine.generate(roles.policy, [prompt.ids for prompt in prompts], sampling, self.progress)

    def _shaped(self, totals: Tensor, replies: Sequence[Reply]) -> Tensor:
        """Rewards as they are learnt from, (B,)."""
        settings = self.settings
        if settings.normalize_reward:
            self.controls.moments.update(totals)
            totals = normalized(totals, self.controls.moments)
        if settings.clip_reward is not None:
            totals = totals.clamp(-settings.clip_reward, settings.clip_reward)
        missing = torch.tensor([not reply.finished for reply in replies])
        return totals - settings.missing_stop_penalty * missing


def credit(rewards: Tensor, values: Tensor, mask: Tensor, settings: PpoSettings) -> tuple[Tensor, Tensor]:
    """Advantages and the returns that values are to predict, (B, R) each, by the estimator of the recipe."""
    returns = torch.zeros_like(rewards)
    match settings.estimator:
        case GaeEstimator() as chosen:
            advantages, returns = gae(rewards, values, mask, gamma=chosen.gamma, lambda_=chosen.lambda_)
        case RlooEstimator() as chosen:
            advantages = spread(rloo_advantages(rewards.sum(1), chosen.samples), mask)
        case GrpoEstimator() as chosen:
            scores = grpo_advantages(rewards.sum(1), chosen.samples, divide_by_std=chosen.divide_by_std)
            advantages = spread(scores, mask)
        case ReinforceEstimator() as chosen:
            advantages = discounted_returns(rewards, mask, gamma=chosen.gamma)
    return whiten(advantages, mask) if settings.whitens else advantages, returns


def _looked(roles: Roles, tokens: Tokens, temperature: float) -> list[Tensor]:
    hidden = hidden_states(roles.policy, tokens.rows)
    logps, entropies = _logps(roles.policy, hidden, tokens, temperature)
    with roles.reference() as reference:
        reference_logps, _ = _logps(reference, hidden_states(reference, tokens.rows), tokens, temperature)
    values = torch.zeros_like(logps)
    if roles.value_head is not None:
        values = roles.values(tokens.rows, tokens.places, hidden)
    return [tokens.table(column) for column in (logps, entropies, reference_logps, values)]


def _logps(model: nn.Module, hidden: Tensor, tokens: Tokens, temperature: float) -> tuple[Tensor, Tensor]:
    logps, entropies = target_logps(model, hidden[tokens.places], tokens.targets, temperature=temperature, entropy=True)
    assert entropies is not None, "asked for"
    return logps, entropies


def _response(prompt: EncodedPrompt, reply: Reply) -> Response:
    question = prompt.question
    return Response(prompt_of(question), reply.text, len(reply.ids) - reply.finished, reply.finished, question.expected)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)
