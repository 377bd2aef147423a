"""Losses of language and reward modelling: by hand, by a slow loop, by TRL's own code, by finite differences."""

from __future__ import annotations

import math
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from align.losses import (
    bradley_terry_loss,
    mean_logps,
    nll_sum,
    scored_tokens,
    sequence_logps,
    token_entropies,
    token_logps,
)

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
ROWS, LENGTH, VOCABULARY = 3, 7, 11


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Logits, ids and trained; the last row trains nothing, the first trains its first token too."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, LENGTH, VOCABULARY, generator=generator)
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator)
    trained = torch.tensor([[1, 1, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0], [0] * 7]).bool()
    return logits, ids, trained


def slow_logps(logits: Tensor, ids: Tensor, trained: Tensor) -> list[list[float]]:
    """A second way: one token at a time, in Python floats."""
    result = []
    for row in range(len(ids)):
        values = []
        for t in range(1, ids.shape[1]):
            scores = logits[row, t - 1].tolist()
            chosen = scores[int(ids[row, t])] - math.log(sum(math.exp(score) for score in scores))
            values.append(chosen if trained[row, t] else 0.0)
        result.append(values)
    return result


def test_token_logps_of_two_equal_logits_is_log_half() -> None:
    logps = token_logps(torch.zeros(1, 3, 2), torch.tensor([[0, 1, 0]]), torch.tensor([[True, True, False]]))
    assert logps.tolist() == [[pytest.approx(-math.log(2)), 0.0]]


def test_token_logps_equal_a_slow_loop(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    torch.testing.assert_close(token_logps(*batch), torch.tensor(slow_logps(*batch)), atol=1e-6, rtol=1e-6)


def test_sums_means_and_counts_follow_the_slow_loop(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    logps, slow = token_logps(*batch), slow_logps(*batch)
    assert scored_tokens(batch[2]).tolist() == [4, 2, 0]  # the first token of a row is predicted by nothing
    torch.testing.assert_close(sequence_logps(logps), torch.tensor([sum(row) for row in slow]))
    torch.testing.assert_close(mean_logps(logps, batch[2]), torch.tensor([sum(slow[0]) / 4, sum(slow[1]) / 2, 0.0]))
    assert float(nll_sum(logps)) == pytest.approx(-sum(map(sum, slow)), rel=1e-6)


def test_trl_gathers_the_same_logps(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    logits, ids, trained = (part[:2] for part in batch)
    labels = ids.masked_fill(~trained, -100)
    for mean in (False, True):
        theirs = CPOTrainer.get_batch_logps(logits, labels, average_log_prob=mean)
        logps = token_logps(logits, ids, trained)
        ours = mean_logps(logps, trained) if mean else sequence_logps(logps)
        torch.testing.assert_close(ours, theirs)


def test_a_row_without_labels_is_zero_and_not_nan_where_trl_divides_by_zero(
    batch: tuple[Tensor, Tensor, Tensor],
) -> None:
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    logits, ids, trained = (part[2:] for part in batch)
    logits.requires_grad_()
    logps = token_logps(logits, ids, trained)
    mean_logps(logps, trained).sum().backward()
    assert mean_logps(logps, trained).tolist() == [0.0]
    assert logits.grad is not None
    assert not logits.grad.any()
    theirs = CPOTrainer.get_batch_logps(logits, ids.masked_fill(~trained, -100), average_log_prob=True)
    assert theirs.isnan().all()


def test_masked_positions_change_nothing_bit_for_bit(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, ids, trained = batch
    unread = ~torch.cat([trained[:, 1:], torch.zeros(ROWS, 1).bool()], dim=1)  # logits that predict no label
    other = logits.masked_fill(unread[..., None], math.nan)
    other_ids = ids.masked_fill(~trained, 3)
    results = []
    for x, y in ((logits, ids), (other, other_ids)):
        x = x.clone().requires_grad_()
        loss = nll_sum(token_logps(x, y, trained))
        loss.backward()
        assert x.grad is not None
        results.append((loss, x.grad, token_entropies(x, trained)))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("left", [0, 3])
def test_padding_left_or_right_is_irrelevant(batch: tuple[Tensor, Tensor, Tensor], left: int) -> None:
    logits, ids, trained = batch
    grow = (left, 3 - left)
    padded = token_logps(
        torch.nn.functional.pad(logits, (0, 0, *grow), value=7.0),
        torch.nn.functional.pad(ids, grow, value=5),
        torch.nn.functional.pad(trained.index_fill(1, torch.tensor([0]), False), grow, value=False),
    )
    assert torch.equal(padded[:, left : left + LENGTH - 1], token_logps(*batch))
    torch.testing.assert_close(sequence_logps(padded), sequence_logps(token_logps(*batch)), atol=1e-6, rtol=1e-6)


def test_half_precision_logits_are_scored_in_float32(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, ids, trained = batch
    half = logits.bfloat16()
    logps = token_logps(half, ids, trained)
    assert logps.dtype == torch.float32
    assert torch.equal(logps, token_logps(half.float(), ids, trained))


def test_entropy_of_a_fair_die_is_log_six_and_of_a_sure_thing_zero() -> None:
    logits = torch.tensor([[[0.0] * 6, [1000.0] + [0.0] * 5, [0.0] * 6]])
    entropies = token_entropies(logits, torch.tensor([[False, True, True]]))
    assert entropies.tolist() == [[pytest.approx(math.log(6)), 0.0]]
    assert not token_entropies(logits, torch.zeros(1, 3).bool()).any()


def test_entropy_equals_torch_distributions(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, _, trained = batch
    expected = torch.distributions.Categorical(logits=logits[:, :-1]).entropy() * trained[:, 1:]
    torch.testing.assert_close(token_entropies(logits, trained), expected)


def test_token_logps_gradient_by_finite_differences(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, ids, trained = batch
    x = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: token_logps(x, ids, trained), x)
    assert torch.autograd.gradcheck(lambda x: token_entropies(x, trained), x)


# Bradley-Terry -------------------------------------------------------------------------------------------------------

CHOSEN, REJECTED = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1.0, 1.0, 0.5])
MARGIN = torch.tensor([0.5, 0.0, 2.0])


def test_bradley_terry_by_hand() -> None:
    # differences 1, -2, 0: log(1 + e^-1), log(1 + e^2), log 2
    expected = [math.log1p(math.exp(-1)), math.log1p(math.exp(2)), math.log(2)]
    assert bradley_terry_loss(CHOSEN, REJECTED).tolist() == pytest.approx(expected)


def test_soft_labels_are_a_mixture_of_both_verdicts() -> None:
    p = torch.tensor([1.0, 0.25, 0.5])
    right, wrong = bradley_terry_loss(CHOSEN, REJECTED), bradley_terry_loss(REJECTED, CHOSEN)
    torch.testing.assert_close(bradley_terry_loss(CHOSEN, REJECTED, probability=p), p * right + (1 - p) * wrong)


def test_soft_label_is_fitted_when_the_logistic_of_the_difference_equals_it() -> None:
    reward = torch.tensor([math.log(0.7 / 0.3)], requires_grad=True)
    bradley_terry_loss(reward, torch.zeros(1), probability=torch.tensor([0.7])).backward()
    assert reward.grad is not None
    assert float(reward.grad) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("margin", [None, MARGIN])
@pytest.mark.parametrize("centering", [0.0, 0.01])
def test_trl_has_the_same_reward_loss(margin: Tensor | None, centering: float) -> None:
    theirs = _trl_reward_loss(CHOSEN, REJECTED, margin, centering)
    ours = bradley_terry_loss(CHOSEN, REJECTED, margin=margin, centering=centering).mean()
    torch.testing.assert_close(ours, theirs)


def test_bradley_terry_gradient_by_finite_differences() -> None:
    inputs = [tensor.double().requires_grad_() for tensor in (CHOSEN, REJECTED)]
    margin, p = MARGIN.double(), torch.tensor([0.9, 0.5, 0.2]).double()
    assert torch.autograd.gradcheck(
        lambda a, b: bradley_terry_loss(a, b, margin=margin, probability=p, centering=0.1), inputs
    )


def test_losses_of_no_pairs_are_empty() -> None:
    assert bradley_terry_loss(torch.zeros(0), torch.zeros(0)).shape == (0,)


def _trl_reward_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None, centering: float) -> Tensor:
    """TRL's RewardTrainer.compute_loss on these rewards, with the least that it needs around it."""
    from collections import defaultdict

    from trl import RewardTrainer

    rewards = torch.cat([chosen, rejected])[:, None]
    inputs: dict[str, Any] = {"attention_mask": torch.ones(len(rewards), 1)}
    if margin is not None:
        inputs["margin"] = margin
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(center_rewards_coefficient=centering or None),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        _total_train_tokens=0,
        _tp_size=1,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    loss = RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=rewards), inputs)
    assert isinstance(loss, Tensor)
    return loss
