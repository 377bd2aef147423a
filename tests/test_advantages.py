"""Advantages: by hand, by slow loops, by TRL's own code, under masks that hide anything."""

from __future__ import annotations

import math
from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from align.advantages import (
    KlController,
    KlEstimator,
    RunningMoments,
    discounted_returns,
    explained_variance,
    gae,
    grpo_advantages,
    kl_terms,
    masked_mean,
    normalized,
    rloo_advantages,
    spread,
    token_rewards,
    whiten,
)

LENGTHS = [5, 1, 0, 3]
ESTIMATORS: list[KlEstimator] = ["k1", "k2", "k3"]
GARBAGE = [99.0, -99.0, math.nan, math.inf]


def mask_of(lengths: list[int], longest: int | None = None) -> Tensor:
    return torch.arange(max(lengths) if longest is None else longest) < torch.tensor(lengths)[:, None]


MASK = mask_of(LENGTHS, 6)


def noise(seed: int, mask: Tensor = MASK) -> Tensor:
    return torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed))


# Rewards of tokens ---------------------------------------------------------------------------------------------------


def test_kl_terms_by_hand() -> None:
    logps, reference = torch.tensor([[-1.0, -3.0, 7.0]]), torch.tensor([[-2.0, -1.0, 5.0]])
    mask = mask_of([2], 3)
    expected = {"k1": [1.0, -2.0], "k2": [0.5, 2.0], "k3": [math.exp(-1), math.exp(2) - 3]}
    for estimator in ESTIMATORS:
        terms = kl_terms(logps, reference, mask, estimator)
        assert terms.tolist() == [pytest.approx([*expected[estimator], 0.0])]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_kl_is_exactly_zero_where_policy_and_reference_agree(estimator: KlEstimator) -> None:
    assert not kl_terms(noise(0), noise(0), MASK, estimator).any()


def test_k1_flips_its_sign_with_the_roles_and_k2_and_k3_are_never_negative() -> None:
    logps, reference = noise(0), noise(1)
    assert torch.equal(kl_terms(logps, reference, MASK, "k1"), -kl_terms(reference, logps, MASK, "k1"))
    for distance in (1.0, 1e-3, 1e-7, 1e-20):  # the last ones are where a rounding could go below 0
        for estimator in ESTIMATORS[1:]:
            assert (kl_terms(distance * logps, distance * reference, MASK, estimator) >= 0).all()


def test_k1_and_k3_are_unbiased_over_what_the_policy_samples() -> None:
    policy, reference = (torch.randn(7, generator=torch.Generator().manual_seed(i)).log_softmax(-1) for i in (0, 1))
    exact = float((policy.exp() * (policy - reference)).sum())
    real = torch.ones(1, 7).bool()
    for estimator in (ESTIMATORS[0], ESTIMATORS[2]):
        terms = kl_terms(policy[None], reference[None], real, estimator)
        assert float((policy.exp() * terms).sum()) == pytest.approx(exact, rel=1e-5)


def test_the_score_lands_on_the_stop_token_and_never_on_a_pad() -> None:
    """[t0, t1, eos, pad, pad], where pad may be eos: only the length decides; an unpadded row ends at its last index."""
    mask = mask_of([3, 5])
    rewards = token_rewards(torch.tensor([2.0, -1.0]), torch.zeros(2, 5), mask, coefficient=0.1)
    assert rewards.tolist() == [[0.0, 0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, -1.0]]


def test_token_rewards_by_hand() -> None:
    kl = torch.tensor([[0.5, -1.0, 2.0, 9.0], [3.0, 9.0, 9.0, 9.0]])
    rewards = token_rewards(torch.tensor([1.0, -2.0]), kl, mask_of([3, 1], 4), coefficient=0.1)
    assert rewards.tolist() == [pytest.approx([-0.05, 0.1, 1.0 - 0.2, 0.0]), pytest.approx([-2.3, 0.0, 0.0, 0.0])]


def test_a_response_without_tokens_has_no_reward_whatever_its_score() -> None:
    for longest in (0, 3):
        rewards = token_rewards(
            torch.tensor([math.nan]), torch.ones(1, longest), mask_of([0], longest), coefficient=1.0
        )
        assert rewards.shape == (1, longest)
        assert not rewards.any()


# Generalised advantage estimation ------------------------------------------------------------------------------------


def test_gae_by_hand() -> None:
    """Errors 0.9 0.6 - 0.5 = 0.04, 0.9 0.8 - 0.6 = 0.12, 1 - 0.8 = 0.2; carried with 0.9 0.5 = 0.45."""
    rewards = torch.tensor([[0.0, 0.0, 1.0, 5.0]])
    values = torch.tensor([[0.5, 0.6, 0.8, 5.0]])
    advantages, returns = gae(rewards, values, mask_of([3], 4), gamma=0.9, lambda_=0.5)
    assert advantages.tolist() == [pytest.approx([0.04 + 0.45 * 0.21, 0.12 + 0.45 * 0.2, 0.2, 0.0])]
    assert returns.tolist() == [pytest.approx([0.6345, 0.81, 1.0, 0.0])]


@settings(deadline=None, max_examples=50)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    gamma=st.floats(0.1, 1.0),
    lambda_=st.floats(0.0, 1.0),
    garbage=st.sampled_from(GARBAGE),
    seed=st.integers(0, 1000),
)
def test_gae_is_the_discounted_sum_of_errors(
    lengths: list[int], gamma: float, lambda_: float, garbage: float, seed: int
) -> None:
    mask = mask_of(lengths, 6)
    rewards, values = (noise(seed + i, mask).masked_fill(~mask, garbage) for i in (0, 1))
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lambda_=lambda_)
    for row, length in enumerate(lengths):
        r, v = rewards[row, :length].tolist(), [*values[row, :length].tolist(), 0.0]
        errors = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        expected = [sum((gamma * lambda_) ** k * e for k, e in enumerate(errors[t:])) for t in range(length)]
        assert advantages[row].tolist() == pytest.approx([*expected, *[0.0] * (6 - length)], abs=1e-5)
        assert returns[row].tolist() == pytest.approx(
            [*(a + b for a, b in zip(expected, v)), *[0.0] * (6 - length)], abs=1e-5
        )


def test_lambda_one_is_the_whole_return_and_lambda_zero_a_single_step() -> None:
    rewards, values = noise(0), noise(1)
    whole = gae(rewards, values, MASK, gamma=0.9, lambda_=1.0)
    torch.testing.assert_close(whole.returns, discounted_returns(rewards, MASK, gamma=0.9))
    step = gae(rewards, values, MASK, gamma=0.9, lambda_=0.0)
    following = torch.where(MASK, values, 0.0).roll(-1, 1)
    torch.testing.assert_close(step.advantages, torch.where(MASK, rewards + 0.9 * following - values, 0.0))


def test_a_perfect_value_model_leaves_no_advantage() -> None:
    rewards = noise(0)
    values = discounted_returns(rewards, MASK, gamma=0.9)
    assert gae(rewards, values, MASK, gamma=0.9, lambda_=0.95).advantages.abs().max() < 1e-6


def test_padding_left_right_or_in_between_is_irrelevant() -> None:
    rewards, values, real = noise(0)[:1], noise(1)[:1], torch.ones(1, 6).bool()
    plain = gae(rewards, values, real, gamma=0.9, lambda_=0.8)
    for places in ([3, 4, 5, 6, 7, 8], [0, 1, 2, 3, 4, 5], [0, 2, 3, 5, 7, 8]):
        mask = torch.zeros(1, 9).bool().index_fill(1, torch.tensor(places), True)
        grown = (torch.full((1, 9), math.nan).masked_scatter(mask, x) for x in (rewards, values))
        for ours, theirs in zip(gae(*grown, mask, gamma=0.9, lambda_=0.8), plain, strict=True):
            assert torch.equal(ours[mask], theirs[0])
            assert not ours[~mask].any()


def test_discounted_returns_by_hand() -> None:
    rewards = torch.tensor([[1.0, 2.0, 4.0, 9.0], [3.0, 9.0, 9.0, 9.0]])
    returns = discounted_returns(rewards, mask_of([3, 1], 4), gamma=0.5)
    assert returns.tolist() == [[1 + 1 + 1, 2 + 2, 4, 0], [3, 0, 0, 0]]


# Groups --------------------------------------------------------------------------------------------------------------

SCORES = torch.tensor([1.0, 2.0, 6.0, 0.5, -0.5, 0.0])


def test_rloo_by_hand() -> None:
    # 1 - (2 + 6) / 2, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2; 0.5 - (-0.5) / 2, -0.5 - 0.5 / 2, 0
    assert rloo_advantages(SCORES, 3).tolist() == pytest.approx([-3.0, -1.5, 4.5, 0.75, -0.75, 0.0])


def test_grpo_by_hand() -> None:
    # mean 3, squares 4 + 1 + 9 over 3 - 1; mean 0, squares 0.5 over 2
    first, second = math.sqrt(7) + 1e-4, 0.5 + 1e-4
    expected = [-2 / first, -1 / first, 3 / first, 0.5 / second, -0.5 / second, 0.0]
    assert grpo_advantages(SCORES, 3, divide_by_std=True).tolist() == pytest.approx(expected)
    assert grpo_advantages(SCORES, 3, divide_by_std=False).tolist() == pytest.approx([-2, -1, 3, 0.5, -0.5, 0])


@pytest.mark.parametrize("score", [0.1, 1234.567, -3e7])
def test_equal_scores_have_no_advantage_at_all(score: float) -> None:
    scores = torch.full((14,), score)
    for samples in (2, 7):
        assert not rloo_advantages(scores, samples).any()
        assert not grpo_advantages(scores, samples, divide_by_std=True).any()


@pytest.mark.parametrize("samples", [2, 4])
def test_trl_has_the_same_rloo_advantages(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import trl.trainer.rloo_trainer as rloo

    monkeypatch.setattr(rloo, "disable_gradient_checkpointing", lambda *_: nullcontext())
    scores = 3 + 2 * torch.randn(8, generator=torch.Generator().manual_seed(samples))
    theirs = _trl_advantages(rloo.RLOOTrainer, scores, samples, normalize_advantages=False, reward_clip_range=None)
    torch.testing.assert_close(rloo_advantages(scores, samples), theirs)


@pytest.mark.parametrize("samples", [2, 4])
@pytest.mark.parametrize("divide", [True, False])
def test_trl_has_the_same_grpo_advantages(samples: int, divide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import trl.trainer.grpo_trainer as grpo

    monkeypatch.setattr(grpo, "disable_gradient_checkpointing", lambda *_: nullcontext())
    scores = 3 + 2 * torch.randn(8, generator=torch.Generator().manual_seed(samples))
    theirs = _trl_advantages(
        grpo.GRPOTrainer, scores, samples, scale_rewards="group" if divide else "none", use_vllm=False, num_iterations=1,
        multi_objective_aggregation="sum_then_normalize", environment_factories=None, environments=None, tools=[],
    )  # fmt: skip
    torch.testing.assert_close(grpo_advantages(scores, samples, divide_by_std=divide), theirs)


def _trl_advantages(trainer: Any, scores: Tensor, samples: int, **settings: Any) -> Tensor:
    """The trainer's own scoring of responses, with the least that it needs around it; the scores are given."""
    rows = len(scores)
    tokens = [[1, 2]] * rows
    rloo = trainer.__name__ == "RLOOTrainer"
    generated: tuple[Any, ...] = (
        (tokens, tokens, ["text"] * rows) if rloo else (tokens, tokens, None, ["text"] * rows, None, {}, *2 * [None])
    )
    stand_in = SimpleNamespace(
        accelerator=SimpleNamespace(device=torch.device("cpu"), process_index=0, gather=lambda x: x),
        model=SimpleNamespace(training=True), num_generations=samples, beta=0.0, mask_truncated_completions=False,
        args=SimpleNamespace(
            per_device_train_batch_size=rows, gradient_checkpointing_kwargs=None, steps_per_generation=1,
            gradient_accumulation_steps=1,
        ),
        _tokenizer=SimpleNamespace(pad_token_id=0), pad_to_multiple_of=None, reward_weights=torch.ones(1),
        reward_func_names=["score"], _generate=lambda _: generated, _calculate_rewards=lambda *_: scores[:, None].clone(),
        _get_per_token_logps_and_entropies=lambda *_, **__: (torch.zeros(rows, 2), None, None),
        _metrics=defaultdict(lambda: defaultdict(list)), _pending_extra_logs={}, _pending_metrics={},
        _logs={"prompt": [], "completion": [], "advantages": [], "rewards": defaultdict(list)}, **settings,
    )  # fmt: skip
    advantages = trainer._generate_and_score_completions(stand_in, [{"prompt": "text"}] * rows)["advantages"]
    assert isinstance(advantages, Tensor)
    return advantages


def test_a_row_s_advantage_is_put_on_each_of_its_tokens_and_nowhere_else() -> None:
    assert spread(torch.tensor([2.0, -1.0]), mask_of([1, 2], 3)).tolist() == [[2, 0, 0], [-1, -1, 0]]


# Whitening and fit ---------------------------------------------------------------------------------------------------


def test_whitened_values_have_mean_zero_and_deviation_one_over_real_tokens() -> None:
    values = 5 + 3 * noise(0)
    real = whiten(values, MASK)[MASK]
    assert float(real.mean()) == pytest.approx(0, abs=1e-6)
    assert float(real.std(correction=0)) == pytest.approx(1, abs=1e-6)
    kept = whiten(values, MASK, shift_mean=False)
    torch.testing.assert_close(kept[MASK], real + values[MASK].mean())
    assert not kept[~MASK].any()


def test_whiten_by_hand() -> None:
    whitened = whiten(torch.tensor([[1.0, 3.0], [5.0, 9.0]]), mask_of([2, 1]))  # mean 3, variance (4 + 0 + 4) / 3
    assert whitened.flatten().tolist() == pytest.approx([-math.sqrt(1.5), 0.0, math.sqrt(1.5), 0.0])


@pytest.mark.parametrize("lengths", [[0, 0], [1, 0]])
def test_whitening_no_token_or_one_gives_zero_and_not_nan(lengths: list[int]) -> None:
    mask = mask_of(lengths, 3)
    values = torch.full((2, 3), 7.0)
    assert not whiten(values, mask).any()
    assert torch.equal(whiten(values, mask, shift_mean=False), torch.where(mask, 7.0, 0.0))


@pytest.mark.parametrize("value", [0.1, 1234.567, -3e7])
def test_whitening_equal_values_does_not_blow_up_their_rounding(value: float) -> None:
    assert whiten(torch.full((1, 50_021), value), torch.ones(1, 50_021).bool()).abs().max() < 1e-3


def test_masked_mean_by_hand_and_over_nothing() -> None:
    values = torch.tensor([[1.0, 2.0, math.nan], [6.0, math.inf, -99.0]])
    assert float(masked_mean(values, mask_of([2, 1], 3))) == 3.0
    assert float(masked_mean(values, mask_of([0, 0], 3))) == 0.0


def test_explained_variance_of_perfect_constant_and_opposite_values() -> None:
    returns = noise(0)
    assert explained_variance(returns, returns, MASK) == 1.0
    assert explained_variance(returns + 4, returns, MASK) == pytest.approx(1.0)
    assert explained_variance(torch.full_like(returns, 2.0), returns, MASK) == pytest.approx(0.0, abs=1e-6)
    assert explained_variance(-returns, returns, MASK) == pytest.approx(-3.0, rel=1e-5)  # (2 r)^2 = 4 times r^2
    assert explained_variance(returns, torch.ones_like(returns), MASK) == 0.0
    assert explained_variance(returns, returns, torch.zeros_like(MASK)) == 0.0


# Masks ---------------------------------------------------------------------------------------------------------------


def everything(x: Tensor, y: Tensor) -> list[Tensor]:
    """All functions of masked tensors, of tensors whose masked places are to be irrelevant."""
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0])
    return [
        *(kl_terms(x, y, MASK, estimator) for estimator in ESTIMATORS),
        token_rewards(scores, x, MASK, coefficient=0.3),
        *gae(x, y, MASK, gamma=0.9, lambda_=0.8),
        discounted_returns(x, MASK, gamma=0.9),
        whiten(x, MASK),
        whiten(x, MASK, shift_mean=False),
        masked_mean(x, MASK)[None],
        torch.tensor([explained_variance(x, y, MASK)]),
    ]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_masked_places_change_nothing_bit_for_bit_and_come_out_as_zero(garbage: float) -> None:
    x, y = noise(0), noise(1)
    for clean, dirty in zip(
        everything(x, y), everything(*(z.masked_fill(~MASK, garbage) for z in (x, y))), strict=True
    ):
        assert torch.equal(clean, dirty)
        if dirty.shape == MASK.shape:
            assert not dirty[~MASK].any()


def test_half_precision_is_worked_on_in_float32() -> None:
    x, y = noise(0).bfloat16(), noise(1).bfloat16()
    for half, full in zip(everything(x, y), everything(x.float(), y.float()), strict=True):
        assert half.dtype == torch.float32
        assert torch.equal(half, full)
    scores = SCORES.bfloat16()
    assert torch.equal(rloo_advantages(scores, 3), rloo_advantages(SCORES, 3))
    assert torch.equal(spread(scores[:4], MASK), spread(SCORES[:4], MASK))
    assert normalized(scores, RunningMoments(2, 1.0, 2.0)).dtype == torch.float32


# Running states ------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.floats(-1e3, 1e3), max_size=5), max_size=5))
def test_moments_in_batches_equal_those_of_all_scores_at_once(batches: list[list[float]]) -> None:
    moments = RunningMoments()
    for batch in batches:
        moments.update(batch)
        moments = RunningMoments.from_dict(moments.as_dict())
    scores = [score for batch in batches for score in batch]
    mean = sum(scores) / max(len(scores), 1)
    variance = sum((score - mean) ** 2 for score in scores) / max(len(scores), 1)
    assert moments.count == len(scores)
    assert moments.mean == pytest.approx(mean, abs=1e-9)
    assert moments.std == pytest.approx(math.sqrt(variance), abs=1e-6)


def test_normalized_scores_by_hand_and_while_nothing_varies() -> None:
    moments = RunningMoments()
    moments.update(torch.full((5,), 0.1))
    assert moments.std == 0.0
    assert not normalized(torch.full((5,), 0.1), moments).any()
    moments = RunningMoments()
    moments.update([1.0, 3.0])
    assert normalized(torch.tensor([1.0, 2.0, 5.0]), moments).tolist() == pytest.approx([-1.0, 0.0, 3.0])


def test_the_kl_coefficient_is_steered_by_hand() -> None:
    controller = KlController(value=0.5, target=4.0, horizon=100)
    controller.update(4.4, 20)  # a tenth above
    assert controller.value == pytest.approx(0.5 * (1 + 0.1 * 0.2))
    controller = KlController.from_dict(controller.as_dict())
    controller.update(400.0, 20)  # far above counts as a fifth
    assert controller.value == pytest.approx(0.5 * 1.02 * 1.04)
    controller.update(0.0, 50)  # far below counts as a fifth
    assert controller.value == pytest.approx(0.5 * 1.02 * 1.04 * 0.9)
    controller.update(4.0, 50)
    assert controller.value == pytest.approx(0.5 * 1.02 * 1.04 * 0.9)


def test_the_kl_coefficient_stays_above_zero_when_a_round_is_longer_than_the_horizon() -> None:
    controller = KlController(value=0.5, target=4.0, horizon=1)
    controller.update(0.0, 64)
    assert controller.value == pytest.approx(0.4)


def test_the_kl_coefficient_without_a_target_is_fixed() -> None:
    controller = KlController(value=0.5, target=None, horizon=100)
    controller.update(400.0, 20)
    assert controller.value == 0.5
