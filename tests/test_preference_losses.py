"""The DPO family: by hand, by a slow loop, by TRL's own code on the same tensors, by finite differences."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from align.losses import mean_logps, scored_tokens, sequence_logps, token_logps
from align.preference_losses import (
    Pair,
    apo_zero_loss,
    cpo_loss,
    hinge_loss,
    ipo_loss,
    kto_kl,
    kto_loss,
    log_ratios,
    margins,
    orpo_loss,
    robust_loss,
    sigmoid_loss,
    simpo_loss,
)

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

BETA = 0.3
POLICY = Pair(torch.tensor([-4.0, -9.0, -2.5, -30.0]), torch.tensor([-5.0, -6.0, -2.5, -11.0]))
REFERENCE = Pair(torch.tensor([-5.0, -7.0, -2.5, -28.0]), torch.tensor([-4.5, -6.5, -2.5, -15.0]))
TOKENS = Pair(torch.tensor([2, 5, 1, 9]), torch.tensor([3, 4, 1, 6]))
# log-ratios: chosen 1, -2, 0, -2; rejected -0.5, 0.5, 0, 4; margins 1.5, -2.5, 0, -6
MARGINS = [1.5, -2.5, 0.0, -6.0]

Loss = Callable[[Pair, Pair], Tensor]
WITH_REFERENCE: dict[str, Loss] = {
    "sigmoid": lambda p, r: sigmoid_loss(p, r, beta=BETA),
    "conservative": lambda p, r: sigmoid_loss(p, r, beta=BETA, label_smoothing=0.2),
    "robust": lambda p, r: robust_loss(p, r, beta=BETA, label_smoothing=0.2),
    "ipo": lambda p, r: ipo_loss(p, r, TOKENS, beta=BETA),
    "hinge": lambda p, r: hinge_loss(p, r, beta=BETA),
    "apo_zero": lambda p, r: apo_zero_loss(p, r, beta=BETA),
}
WITHOUT_REFERENCE: dict[str, Loss] = {
    "simpo": lambda p, _: simpo_loss(p, TOKENS, beta=2.0, target_margin=0.5),
    "cpo": lambda p, _: cpo_loss(p, TOKENS, beta=BETA, answer_weight=0.7),
    "orpo": lambda p, _: orpo_loss(p, TOKENS, beta=BETA),
}


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_margins_are_the_difference_of_log_ratios() -> None:
    assert log_ratios(POLICY, REFERENCE).rejected.tolist() == [-0.5, 0.5, 0.0, 4.0]
    assert margins(POLICY, REFERENCE).tolist() == MARGINS


# By hand and by a slow loop ------------------------------------------------------------------------------------------


def slow(name: str, i: int) -> float:
    """Loss of pair i, written a second way in Python floats."""
    pc, pr, rc, rr = (float(x[i]) for x in (*POLICY, *REFERENCE))
    nc, nr = (int(x[i]) for x in TOKENS)
    z = BETA * ((pc - rc) - (pr - rr))
    odds = [math.exp(x / n) / (1 - math.exp(x / n)) for x, n in ((pc, nc), (pr, nr))]
    return {
        "sigmoid": -math.log(s(z)),
        "conservative": -0.8 * math.log(s(z)) - 0.2 * math.log(s(-z)),
        "robust": (-0.8 * math.log(s(z)) + 0.2 * math.log(s(-z))) / 0.6,
        "ipo": ((pc - rc) / nc - (pr - rr) / nr - 1 / (2 * BETA)) ** 2,
        "hinge": max(0.0, 1 - z),
        "apo_zero": 1 - s(BETA * (pc - rc)) + s(BETA * (pr - rr)),
        "simpo": -math.log(s(2 * (pc / nc - pr / nr) - 2 * 0.5)),
        "cpo": -math.log(s(BETA * (pc - pr))) - 0.7 * pc / nc,
        "orpo": -pc / nc - BETA * math.log(s(math.log(odds[0] / odds[1]))),
    }[name]


@pytest.mark.parametrize("name", [*WITH_REFERENCE, *WITHOUT_REFERENCE])
def test_each_loss_equals_a_slow_loop(name: str) -> None:
    losses = (WITH_REFERENCE | WITHOUT_REFERENCE)[name](POLICY, REFERENCE)
    assert losses.shape == (4,)
    assert losses.tolist() == pytest.approx([slow(name, i) for i in range(4)], rel=1e-5, abs=1e-6)


def test_dpo_of_two_and_three_tokens_by_hand() -> None:
    """Chosen -0.5 and -0.7, rejected -1, -1, -2; reference all -1: margin 0.8 + 1, loss log(1 + e^-0.18)."""
    policy = Pair(torch.tensor([-1.2]), torch.tensor([-4.0]))
    reference = Pair(torch.tensor([-2.0]), torch.tensor([-3.0]))
    assert float(sigmoid_loss(policy, reference, beta=0.1)) == pytest.approx(math.log1p(math.exp(-0.18)), abs=1e-6)
    # IPO: 0.8 / 2 + 1 / 3 - 5
    expected = (0.8 / 2 + 1 / 3 - 5) ** 2
    assert float(ipo_loss(policy, reference, _tokens(2, 3), beta=0.1)) == pytest.approx(expected, rel=1e-5)


def test_dpo_is_log_two_where_policy_and_reference_agree() -> None:
    for smoothing in (0.0, 0.3):
        losses = sigmoid_loss(POLICY, POLICY, beta=BETA, label_smoothing=smoothing)
        assert losses.tolist() == pytest.approx([math.log(2)] * 4, abs=1e-7)
    assert robust_loss(POLICY, POLICY, beta=BETA, label_smoothing=0.3).tolist() == pytest.approx([math.log(2)] * 4)
    assert hinge_loss(POLICY, POLICY, beta=BETA).tolist() == [1.0] * 4
    assert apo_zero_loss(POLICY, POLICY, beta=BETA).tolist() == [1.0] * 4


def test_robust_loss_is_unbiased_under_flipped_labels() -> None:
    flipped = Pair(POLICY.rejected, POLICY.chosen), Pair(REFERENCE.rejected, REFERENCE.chosen)
    right = robust_loss(POLICY, REFERENCE, beta=BETA, label_smoothing=0.2)
    wrong = robust_loss(*flipped, beta=BETA, label_smoothing=0.2)
    torch.testing.assert_close(0.8 * right + 0.2 * wrong, sigmoid_loss(POLICY, REFERENCE, beta=BETA))


def test_probability_one_is_plain_dpo_and_a_half_is_indifferent() -> None:
    plain = sigmoid_loss(POLICY, REFERENCE, beta=BETA)
    torch.testing.assert_close(sigmoid_loss(POLICY, REFERENCE, beta=BETA, probability=torch.ones(4)), plain)
    swapped = Pair(POLICY.rejected, POLICY.chosen), Pair(REFERENCE.rejected, REFERENCE.chosen)
    half = torch.full((4,), 0.5)
    torch.testing.assert_close(
        sigmoid_loss(POLICY, REFERENCE, beta=BETA, probability=half),
        sigmoid_loss(*swapped, beta=BETA, probability=half),
    )


def test_smoothing_and_a_soft_label_of_the_same_size_are_the_same() -> None:
    torch.testing.assert_close(
        sigmoid_loss(POLICY, REFERENCE, beta=BETA, label_smoothing=0.2),
        sigmoid_loss(POLICY, REFERENCE, beta=BETA, probability=torch.full((4,), 0.8)),
    )


def test_orpo_stays_finite_for_answers_that_are_certain_or_impossible() -> None:
    certain, impossible = torch.tensor([0.0, -1e-9, -3000.0]), torch.tensor([-3000.0, 0.0, -1e-9])
    policy = Pair(certain.requires_grad_(), impossible.requires_grad_())
    losses = orpo_loss(policy, _tokens([1, 1, 1], [1, 1, 1]), beta=BETA)
    losses.sum().backward()
    assert losses.isfinite().all()
    for logps in policy:
        assert logps.grad is not None
        assert logps.grad.isfinite().all()


def test_an_answer_without_tokens_gives_a_finite_loss() -> None:
    policy = Pair(torch.tensor([-1.0]), torch.tensor([0.0]))
    for loss in (
        ipo_loss(policy, policy, _tokens(2, 0), beta=BETA),
        simpo_loss(policy, _tokens(2, 0), beta=BETA, target_margin=0.5),
        orpo_loss(policy, _tokens(2, 0), beta=BETA),
    ):
        assert loss.isfinite().all()


# KTO -----------------------------------------------------------------------------------------------------------------

DESIRABLE = torch.tensor([True, False, True, False])


def test_kto_by_hand() -> None:
    """Log-ratios 1, -2, 0, -2 with baseline 0.5: distances +-0.15, 0.75, 0.15, 0.75."""
    losses = kto_loss(
        POLICY.chosen, REFERENCE.chosen, DESIRABLE, torch.tensor(0.5),
        beta=BETA, desirable_weight=2.0, undesirable_weight=0.5,
    )  # fmt: skip
    expected = [2 * (1 - s(0.15)), 0.5 * (1 - s(0.75)), 2 * (1 - s(-0.15)), 0.5 * (1 - s(0.75))]
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)


def test_kto_baseline_is_never_negative_and_has_no_gradient() -> None:
    policy = torch.tensor([-1.0, -2.0], requires_grad=True)
    assert float(kto_kl(policy, torch.tensor([-2.0, -4.0]))) == 1.5
    assert float(kto_kl(policy, torch.tensor([0.0, 0.0]))) == 0.0
    assert not kto_kl(policy, policy.detach()).requires_grad
    assert float(kto_kl(policy[:0], policy[:0])) == 0.0


def test_kto_is_half_where_policy_and_reference_agree() -> None:
    losses = kto_loss(POLICY.chosen, POLICY.chosen, DESIRABLE, torch.tensor(0.0), beta=BETA)
    assert losses.tolist() == [0.5] * 4


# Gradients -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*WITH_REFERENCE, *WITHOUT_REFERENCE])
def test_gradients_by_finite_differences(name: str) -> None:
    loss = (WITH_REFERENCE | WITHOUT_REFERENCE)[name]
    reference = Pair(*(x.double() for x in REFERENCE))
    inputs = [x.double().requires_grad_() for x in POLICY]
    assert torch.autograd.gradcheck(lambda chosen, rejected: loss(Pair(chosen, rejected), reference), inputs)


def test_kto_gradient_by_finite_differences() -> None:
    policy = POLICY.chosen.double().requires_grad_()
    kl = torch.tensor(0.5).double()
    assert torch.autograd.gradcheck(
        lambda x: kto_loss(x, REFERENCE.chosen.double(), DESIRABLE, kl, beta=BETA, undesirable_weight=2.0), policy
    )


@pytest.mark.parametrize("name", ["sigmoid", "conservative", "robust", "hinge", "apo_zero", "simpo"])
def test_every_loss_asks_for_more_chosen_and_less_rejected(name: str) -> None:
    policy = Pair(*(x.clone().requires_grad_() for x in POLICY))
    (WITH_REFERENCE | WITHOUT_REFERENCE)[name](policy, REFERENCE).sum().backward()
    assert policy.chosen.grad is not None
    assert policy.rejected.grad is not None
    assert (policy.chosen.grad <= 0).all()
    assert (policy.rejected.grad >= 0).all()


# TRL as the oracle ---------------------------------------------------------------------------------------------------


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Policy and reference logits, ids, trained: four pairs, chosen first, as TRL lays them out; prompt of 2 tokens."""
    generator = torch.Generator().manual_seed(seed)
    policy = torch.randn(8, 9, 13, generator=generator)
    reference = policy + 0.3 * torch.randn(8, 9, 13, generator=generator)
    ids = torch.randint(13, (8, 9), generator=generator)
    lengths = torch.tensor([4, 7, 9, 5, 6, 3, 9, 8])
    place = torch.arange(9)
    return policy, reference, ids, (place >= 2) & (place < lengths[:, None])


def summed(logits: Tensor, ids: Tensor, trained: Tensor) -> Pair:
    return Pair(*sequence_logps(token_logps(logits, ids, trained)).chunk(2))


def trl_dpo(loss_type: str, data: tuple[Tensor, Tensor, Tensor, Tensor], **settings: Any) -> Tensor:
    """DPOTrainer._compute_loss, with a model that returns these logits' log-probabilities as TRL's fused head does."""
    from trl import DPOTrainer

    policy, reference, ids, trained = data

    def model_of(logits: Tensor) -> Any:
        logps = token_logps(logits, ids, trained)
        output = SimpleNamespace(log_probs=logps, entropy=logps, mean_logits=logps, is_top1=logps > 0)
        return lambda **_: output

    trainer = _fake(
        model=SimpleNamespace(training=True), ref_model=model_of(reference), loss_types=[loss_type], loss_weights=[1.0],
        beta=BETA, label_smoothing=settings.get("label_smoothing", 0.0), f_divergence_type="reverse_kl", ld_alpha=None,
        precompute_ref_logps=False, use_weighting=False, aux_loss_enabled=False,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05),
    )  # fmt: skip
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": trained.long()}
    loss = DPOTrainer._compute_loss(trainer, model_of(policy), inputs, return_outputs=False)
    assert isinstance(loss, Tensor)
    return loss


def _fake(**values: Any) -> Any:
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x)
    metrics: Any = defaultdict(lambda: defaultdict(list))
    return SimpleNamespace(accelerator=accelerator, _metrics=metrics, _total_train_tokens=0, _tp_size=1, **values)


@pytest.fixture(autouse=True)
def _no_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL asks whether the model is a PEFT model, and turns its gradient checkpointing off and on; ours is a function."""
    import trl.trainer.dpo_trainer as dpo
    import trl.trainer.kto_trainer as kto

    for module in (dpo, kto):
        monkeypatch.setattr(module, "is_peft_model", lambda _: False)
        monkeypatch.setattr(module, "disable_gradient_checkpointing", lambda *_: nullcontext())


@pytest.mark.parametrize("name", ["sigmoid", "robust", "hinge", "apo_zero"])
@pytest.mark.parametrize("seed", [0, 1])
def test_trl_has_the_same_loss(name: str, seed: int) -> None:
    data = batch(seed)
    policy, reference, ids, trained = data
    ours = WITH_REFERENCE[name](summed(policy, ids, trained), summed(reference, ids, trained))
    torch.testing.assert_close(ours.mean(), trl_dpo(name, data, label_smoothing=0.2))


def test_label_smoothing_acts_here_and_not_in_trl() -> None:
    data = batch()
    policy, reference, ids, trained = data
    assert trl_dpo("sigmoid", data, label_smoothing=0.2) == trl_dpo("sigmoid", data)
    pairs = summed(policy, ids, trained), summed(reference, ids, trained)
    plain, smoothed = (sigmoid_loss(*pairs, beta=BETA, label_smoothing=e) for e in (0.0, 0.2))
    z = BETA * margins(*pairs)
    assert not torch.allclose(plain, smoothed)
    torch.testing.assert_close(smoothed, 0.8 * plain - 0.2 * torch.nn.functional.logsigmoid(-z))


def test_ipo_equals_trl_and_differs_where_the_first_token_is_trained() -> None:
    data = batch()
    policy, reference, ids, trained = data
    ours = _ipo(data)
    torch.testing.assert_close(ours, trl_dpo("ipo", data))
    whole = policy, reference, ids, trained | (torch.arange(9) < 2)  # the prompt is gone: the first token is a label
    torch.testing.assert_close(_ipo(whole, extra=1), trl_dpo("ipo", whole))  # TRL counts it, though nothing scores it
    assert not torch.isclose(_ipo(whole), trl_dpo("ipo", whole))


def _ipo(data: tuple[Tensor, Tensor, Tensor, Tensor], extra: int = 0) -> Tensor:
    policy, reference, ids, trained = data
    tokens = Pair(*(scored_tokens(trained) + extra).chunk(2))
    return ipo_loss(summed(policy, ids, trained), summed(reference, ids, trained), tokens, beta=BETA).mean()


@pytest.mark.parametrize("kind", ["simpo", "sigmoid"])
def test_trl_has_the_same_loss_without_a_reference(kind: str) -> None:
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    policy, _, ids, trained = batch()
    logps, tokens = summed(policy, ids, trained), Pair(*scored_tokens(trained).chunk(2))
    trainer = _fake(alpha=0.0, loss_type=kind, simpo_gamma=0.5 * BETA, beta=BETA, label_smoothing=0.0)
    if kind == "simpo":
        ours = simpo_loss(logps, tokens, beta=BETA, target_margin=0.5)
        means = mean_logps(token_logps(policy, ids, trained), trained).chunk(2)
        theirs = CPOTrainer.cpo_loss(trainer, *means)[0]
    else:
        ours = cpo_loss(logps, tokens, beta=BETA, answer_weight=0.0)
        theirs = CPOTrainer.cpo_loss(trainer, *logps)[0]
    torch.testing.assert_close(ours, theirs)


def test_trl_has_the_same_odds_ratio() -> None:
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    policy, _, ids, trained = batch()
    chosen, rejected = mean_logps(token_logps(policy, ids, trained), trained).chunk(2)
    weighted = ORPOTrainer.odds_ratio_loss(_fake(beta=BETA), chosen, rejected)[0]
    ours = orpo_loss(summed(policy, ids, trained), Pair(*scored_tokens(trained).chunk(2)), beta=BETA)
    torch.testing.assert_close(ours, -chosen - weighted)


def test_trl_has_the_same_kto_loss() -> None:
    from trl import KTOTrainer

    policy, reference, ids, trained = batch()
    desirable = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0]).bool()
    mismatched = torch.tensor([0.7, 0.1, -0.2, 0.4, 0.3, 0.6, 0.0, 0.1])
    logps, reference_logps = (sequence_logps(token_logps(x, ids, trained)) for x in (policy, reference))
    kl = kto_kl(mismatched, torch.zeros(8))
    ours = kto_loss(logps, reference_logps, desirable, kl, beta=BETA, desirable_weight=1.5, undesirable_weight=0.5)
    trainer = _fake(
        model=SimpleNamespace(training=True), loss_type="kto", beta=BETA, desirable_weight=1.5, undesirable_weight=0.5,
        precompute_ref_logps=True, calculate_KL=True, aux_loss_enabled=False,
        _compute_kl_logps=lambda *_: mismatched,
    )  # fmt: skip
    inputs = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": trained.long(),
        "label": desirable.long(), "ref_logps": reference_logps, "ref_KL_logps": torch.zeros(8),
    }  # fmt: skip
    output = SimpleNamespace(log_probs=token_logps(policy, ids, trained))
    output.mean_logits = output.entropy = output.log_probs * 0
    theirs = KTOTrainer._compute_loss(trainer, lambda **_: output, inputs, return_outputs=False)
    torch.testing.assert_close(ours.mean(), theirs)


def _tokens(chosen: int | list[int], rejected: int | list[int]) -> Pair:
    return Pair(*(torch.tensor(x if isinstance(x, list) else [x]) for x in (chosen, rejected)))
