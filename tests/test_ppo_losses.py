"""Losses of PPO: by hand at both clips, by a slow loop, by TRL's own code, by finite differences, under any mask."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from align.advantages import KlEstimator, masked_mean
from align.ppo_losses import (
    Average,
    importance_weights,
    kl_losses,
    loss_sum,
    policy_losses,
    step_weight,
    value_losses,
)

CLIP, CLIP_HIGH = 0.2, 0.3
LENGTHS = [5, 1, 0, 3]
LONGEST = 6
MASK = torch.arange(LONGEST) < torch.tensor(LENGTHS)[:, None]
GARBAGE = [99.0, -99.0, math.nan, math.inf]
ESTIMATORS: list[KlEstimator] = ["k1", "k2", "k3"]
AVERAGES: list[Average] = ["tokens", "rows", "constant"]


def noise(seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(MASK.shape, generator=torch.Generator().manual_seed(seed))


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities now and at the round's start, on both sides of both clips, and advantages of both signs."""
    old = -noise(seed).abs()
    return old + noise(seed + 1, 0.4), old, noise(seed + 2)


# The policy's loss ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.5, 2.0, -1.3 * 2, True),  # a good token that is already likelier: nothing more to earn
        (0.5, 2.0, -0.5 * 2, False),  # a good token that has become unlikely is still pulled up
        (0.5, -2.0, 0.8 * 2, True),  # a bad token that is already unlikelier
        (1.5, -2.0, 1.5 * 2, False),  # a bad token that has become likely is still pushed down
        (1.25, 2.0, -1.25 * 2, False),  # between the lower and the upper clip
        (0.9, -2.0, 0.9 * 2, False),
        (1.5, 0.0, 0.0, False),
    ],
)
def test_each_side_of_the_clip_by_hand(ratio: float, advantage: float, loss: float, clipped: bool) -> None:
    logps = torch.tensor([[math.log(ratio) - 1]], requires_grad=True)
    real = torch.ones(1, 1).bool()
    result = policy_losses(
        logps, torch.tensor([[-1.0]]), torch.tensor([[advantage]]), real, clip=CLIP, clip_high=CLIP_HIGH
    )
    result.losses.sum().backward()
    assert logps.grad is not None
    assert result.losses.item() == pytest.approx(loss)
    assert result.ratio.item() == pytest.approx(ratio)
    assert bool(result.clipped) == clipped
    assert float(logps.grad) == pytest.approx(0.0 if clipped else -ratio * advantage)


def test_policy_losses_equal_a_slow_loop() -> None:
    logps, old, advantages = batch()
    losses, ratio, clipped = policy_losses(logps, old, advantages, MASK, clip=CLIP, clip_high=CLIP_HIGH)
    seen = set()
    for row, length in enumerate(LENGTHS):
        for t in range(LONGEST):
            r, a = math.exp(float(logps[row, t]) - float(old[row, t])), float(advantages[row, t])
            held = min(r, 1.3) if a > 0 else max(r, 0.8)
            real = t < length
            assert float(losses[row, t]) == pytest.approx(-held * a if real else 0.0, rel=1e-5)
            assert float(ratio[row, t]) == pytest.approx(r if real else 0.0, rel=1e-5)
            assert bool(clipped[row, t]) == (real and held != r)
            seen |= {(a > 0, held != r)} if real else set()
    assert len(seen) == 4  # both signs, clipped and not


def test_the_upper_clip_is_the_lower_one_unless_it_is_given() -> None:
    data = batch()
    alone = policy_losses(*data, MASK, clip=CLIP)
    assert torch.equal(alone.losses, policy_losses(*data, MASK, clip=CLIP, clip_high=CLIP).losses)
    assert not torch.equal(alone.losses, policy_losses(*data, MASK, clip=CLIP, clip_high=CLIP_HIGH).losses)


def test_on_the_first_pass_the_ratio_is_one_and_the_gradient_that_of_reinforce() -> None:
    _, old, advantages = batch()
    logps = old.clone().requires_grad_()
    losses, ratio, clipped = policy_losses(logps, old, advantages, MASK, clip=CLIP)
    losses.sum().backward()
    assert torch.equal(ratio, MASK.float())
    assert not clipped.any()
    assert logps.grad is not None
    assert torch.equal(logps.grad, torch.where(MASK, -advantages, 0.0))


# The value model's loss ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "target", "loss", "clipped"),
    [
        (1.5, 2.0, 0.8**2 / 2, True),  # it came nearer by more than the clip: held at 1.2, no gradient
        (1.5, 0.0, 1.5**2 / 2, False),  # it went away by more than the clip: pulled back
        (1.1, 2.0, 0.9**2 / 2, False),
    ],
)
def test_value_losses_by_hand(value: float, target: float, loss: float, clipped: bool) -> None:
    values = torch.tensor([[value]], requires_grad=True)
    real = torch.ones(1, 1).bool()
    result = value_losses(values, torch.ones(1, 1), torch.tensor([[target]]), real, clip=0.2)
    result.losses.sum().backward()
    assert values.grad is not None
    assert result.losses.item() == pytest.approx(loss)
    assert bool(result.clipped) == clipped
    assert float(values.grad) == pytest.approx(0.0 if clipped else value - target)


def test_value_losses_equal_a_slow_loop_with_and_without_a_clip() -> None:
    old, returns = noise(0), noise(1)
    values = old + noise(2, 0.4)
    for clip in (0.2, None):
        losses, clipped = value_losses(values, old, returns, MASK, clip=clip)
        for row, length in enumerate(LENGTHS):
            for t in range(LONGEST):
                v, o, target = (float(x[row, t]) for x in (values, old, returns))
                held = v if clip is None else o + max(-clip, min(clip, v - o))
                worst = max(abs(v - target), abs(held - target))
                assert float(losses[row, t]) == pytest.approx(worst**2 / 2 if t < length else 0.0, rel=1e-4, abs=1e-7)
                assert bool(clipped[row, t]) == (t < length and abs(held - target) > abs(v - target))
        assert clipped.any() == (clip is not None)


# The KL as a loss ----------------------------------------------------------------------------------------------------


def test_the_value_of_a_kl_loss_is_its_estimator_s() -> None:
    logps, reference = torch.tensor([[-1.0, -3.0, 7.0]]), torch.tensor([[-2.0, -1.0, 5.0]])
    mask = torch.tensor([[True, True, False]])
    expected = {"k1": [1.0, -2.0], "k2": [0.5, 2.0], "k3": [math.exp(-1), math.exp(2) - 3]}
    for estimator in ESTIMATORS:
        assert kl_losses(logps, reference, mask, estimator).tolist() == [pytest.approx([*expected[estimator], 0.0])]


def test_a_kl_loss_has_the_gradient_of_a_kl_over_what_the_policy_samples() -> None:
    """Every token of a vocabulary of 5, weighed by its probability, is the expectation over samples, exactly."""
    logits, other = (torch.randn(5, generator=torch.Generator().manual_seed(i)).double() for i in (0, 1))
    logits.requires_grad_()
    policy, reference = logits.log_softmax(-1), other.log_softmax(-1)
    real = torch.ones(1, 5).bool()

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    def sampled(per_token: Tensor) -> Tensor:
        return gradient((policy.detach().exp() * per_token).sum())

    reverse = gradient((policy.exp() * (policy - reference)).sum())
    forward = gradient((reference.exp() * (reference - policy)).sum())
    terms = {estimator: kl_losses(policy[None], reference[None], real, estimator) for estimator in ESTIMATORS}
    torch.testing.assert_close(sampled(terms["k1"]), reverse)
    torch.testing.assert_close(sampled(terms["k2"]), reverse)
    torch.testing.assert_close(sampled(terms["k3"]), forward)
    assert not torch.allclose(reverse, forward)
    assert sampled(policy - reference).abs().max() < 1e-12  # what k1 would teach by itself: nothing


# Importance weights --------------------------------------------------------------------------------------------------


def test_importance_weights_by_hand() -> None:
    old = torch.tensor([[-1.0, -1.0, -1.0, -9.0]], requires_grad=True)
    behaviour = torch.tensor([[-1.0, -1.0 - math.log(1.5), -5.0, 9.0]])
    weights = importance_weights(old, behaviour, torch.tensor([[True, True, True, False]]), cap=2.0)
    assert weights.tolist() == [pytest.approx([1.0, 1.5, 2.0, 0.0])]
    assert not weights.requires_grad


# Sums over a step ----------------------------------------------------------------------------------------------------


def test_each_average_by_hand() -> None:
    losses = torch.tensor([[1.0, 2.0, 6.0, 9.0], [5.0, 9.0, 9.0, 9.0], [9.0, 9.0, 9.0, 9.0]])
    lengths = [3, 1, 0]
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    means = {
        average: float(loss_sum(losses, mask, average, 10)) / step_weight(lengths, average) for average in AVERAGES
    }
    assert means["tokens"] == pytest.approx((1 + 2 + 6 + 5) / 4)
    assert means["rows"] == pytest.approx(((1 + 2 + 6) / 3 + 5 + 0) / 3)
    assert means["constant"] == pytest.approx((1 + 2 + 6 + 5) / (3 * 10))


@pytest.mark.parametrize("average", AVERAGES)
def test_a_step_without_a_token_has_loss_zero(average: Average) -> None:
    for rows in (0, 2):
        mask = torch.zeros(rows, 3).bool()
        loss = loss_sum(torch.full((rows, 3), math.nan), mask, average, 3) / step_weight([0] * rows, average)
        assert float(loss) == 0.0


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("parts", [[[0, 1, 2, 3]], [[0, 1], [2, 3]], [[2], [3, 0], [1]], [[0], [1], [2], [3]]])
def test_a_step_in_micro_batches_has_the_gradient_of_the_step_at_once(average: Average, parts: list[list[int]]) -> None:
    """Each micro-batch is cut to its own longest row, as the loop does."""
    logps, old, advantages = batch()
    gradients = []
    for split in ([[0, 1, 2, 3]], parts):
        x = logps.clone().requires_grad_()
        for rows in split:
            width = max(LENGTHS[row] for row in rows)
            piece = [tensor[rows, :width] for tensor in (x, old, advantages, MASK)]
            losses = policy_losses(*piece, clip=CLIP).losses
            (loss_sum(losses, piece[3], average, LONGEST) / step_weight(LENGTHS, average)).backward()
        assert x.grad is not None
        gradients.append(x.grad)
    assert gradients[0].any()
    torch.testing.assert_close(gradients[0], gradients[1])


# Masks, precision, finite differences --------------------------------------------------------------------------------


def everything(x: Tensor, y: Tensor, z: Tensor) -> list[Tensor]:
    """All losses of tensors whose masked places are to be irrelevant."""
    losses, ratio, clipped = policy_losses(x, y, z, MASK, clip=CLIP)
    return [
        losses,
        ratio,
        clipped.float(),
        *(part.float() for clip in (0.2, None) for part in value_losses(x, y, z, MASK, clip=clip)),
        *(kl_losses(x, y, MASK, estimator) for estimator in ESTIMATORS),
        importance_weights(x, y, MASK, cap=2.0),
        *(loss_sum(z, MASK, average, LONGEST)[None] for average in AVERAGES),
        masked_mean(losses, MASK)[None],
    ]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_masked_places_change_no_loss_and_no_gradient_bit_for_bit(garbage: float) -> None:
    results = []
    for fill in (0.0, garbage):
        inputs = [tensor.masked_fill(~MASK, fill).requires_grad_() for tensor in batch()]
        outputs = everything(*inputs)
        torch.stack([output.sum() for output in outputs]).sum().backward()
        results.append([*outputs, *(tensor.grad for tensor in inputs)])
    for clean, dirty in zip(*results, strict=True):
        assert clean is not None
        assert dirty is not None
        assert torch.equal(clean, dirty)
        if dirty.shape == MASK.shape:
            assert not dirty[~MASK].any()


def test_half_precision_is_worked_on_in_float32() -> None:
    half = [tensor.bfloat16() for tensor in batch()]
    for ours, theirs in zip(everything(*half), everything(*(x.float() for x in half)), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


def test_gradients_by_finite_differences() -> None:
    logps, old, advantages = (tensor.double() for tensor in batch())
    x = logps.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: policy_losses(x, old, advantages, MASK, clip=CLIP).losses, x)
    for clip in (0.2, None):
        assert torch.autograd.gradcheck(lambda x, c=clip: value_losses(x, old, advantages, MASK, clip=c).losses, x)
    for estimator in ESTIMATORS[1:]:  # the gradient of k1 is not that of its value, on purpose
        assert torch.autograd.gradcheck(lambda x, e=estimator: kl_losses(x, old, MASK, e), x)
    for average in AVERAGES:
        assert torch.autograd.gradcheck(lambda x, a=average: loss_sum(x, MASK, a, LONGEST), x)


# TRL as the oracle ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss_type", "average"), [("bnpo", "tokens"), ("grpo", "rows"), ("dr_grpo", "constant")])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("cap", [None, 1.2])
def test_trl_has_the_same_loss_and_gradient(loss_type: str, average: Average, beta: float, cap: float | None) -> None:
    logps, old, advantages = batch()
    reference, behaviour = old + noise(3, 0.5), old + noise(4, 0.3)
    weights = torch.ones_like(old) if cap is None else importance_weights(old, behaviour, MASK, cap=cap)
    gradients, losses = [], []
    for ours in (True, False):
        x = logps.clone().requires_grad_()
        if ours:
            per_token = weights * policy_losses(x, old, advantages, MASK, clip=CLIP, clip_high=CLIP_HIGH).losses
            per_token = per_token + beta * kl_losses(x, reference, MASK, "k3")
            loss = loss_sum(per_token, MASK, average, LONGEST) / step_weight(LENGTHS, average)
        else:
            loss = _trl_grpo_loss(loss_type, beta, x, {
                "old_per_token_logps": old, "advantages": advantages, "ref_per_token_logps": reference,
                "importance_sampling_ratio": weights,
            })  # fmt: skip
        loss.backward()
        assert x.grad is not None
        losses.append(loss.detach())
        gradients.append(x.grad)
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1])


def _trl_grpo_loss(loss_type: str, beta: float, logps: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """GRPOTrainer._compute_loss at these log-probabilities, with the least that it needs around it."""
    from trl import GRPOTrainer

    metrics: Any = defaultdict(lambda: defaultdict(list))
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), loss_type=loss_type, beta=beta, epsilon_low=CLIP, epsilon_high=CLIP_HIGH,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None), importance_sampling_level="token",
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, max_completion_length=LONGEST, aux_loss_enabled=False,
        use_vllm=True, vllm_importance_sampling_correction=True, current_gradient_accumulation_steps=1,
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, **_: x), _metrics=metrics,
        _entropy_bonus_enabled=False,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, torch.zeros_like(logps), None),
    )  # fmt: skip
    ids = torch.zeros(MASK.shape, dtype=torch.long)
    completion = {"prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": MASK.long()}
    loss = GRPOTrainer._compute_loss(trainer, None, completion | inputs)
    assert isinstance(loss, Tensor)
    return loss
