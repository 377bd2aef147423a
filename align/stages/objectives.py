"""What each stage asks of the model, as objectives for the one loop: sums over rows, divided there by the whole step.

The equations stand in losses.py; here they meet models and batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from align.chat.encoded import Encoded, EncodedPair
from align.generators import generators_now
from align.losses import bradley_terry_loss, nll_sum
from align.memory import Budget, Cut
from align.models.logps import trained_logps
from align.models.rewards import row_rewards
from align.objective import Objective
from align.preference_losses import (
    Pair,
    apo_zero_loss,
    cpo_loss,
    hinge_loss,
    ipo_loss,
    kto_kl,
    kto_loss,
    margins,
    orpo_loss,
    robust_loss,
    sigmoid_loss,
    simpo_loss,
)
from align.recipe.settings import (
    ApoZeroLoss,
    CpoLoss,
    DpoLoss,
    HingeLoss,
    IpoLoss,
    KtoLoss,
    OrpoLoss,
    RobustLoss,
    SigmoidLoss,
    SimpoLoss,
)


class AnswerLoss(Objective):
    """Negative log-likelihood of the trained tokens, divided by their number over the whole optimiser step."""

    def weight(self, rows: Sequence[Encoded]) -> float:
        """Number of trained tokens; the first token of a row has nothing before it to be predicted from."""
        return float(sum(row.labels for row in rows))

    def tokens(self, row: Encoded) -> int:
        """Length of the row."""
        return len(row.ids)

    def __call__(self, model: nn.Module, rows: Sequence[Encoded]) -> tuple[Tensor, dict[str, float]]:
        """Summed loss."""
        return nll_sum(trained_logps(model, rows).logps), {}


class RewardLoss(Objective):
    """Bradley-Terry on pairs, divided by the number of pairs."""

    def __init__(self, *, centering: float) -> None:
        self.centering = centering

    def weight(self, rows: Sequence[EncodedPair]) -> float:
        """Number of pairs."""
        return float(len(rows))

    def tokens(self, row: EncodedPair) -> int:
        """Length of both."""
        return len(row.chosen.ids) + len(row.rejected.ids)

    def __call__(self, model: nn.Module, rows: Sequence[EncodedPair]) -> tuple[Tensor, dict[str, float]]:
        """Summed loss; how many pairs are ranked right, and the summed margin."""
        sides = [row.chosen for row in rows] + [row.rejected for row in rows]
        chosen, rejected = row_rewards(model, [side.ids for side in sides]).chunk(2)
        losses = bradley_terry_loss(
            chosen,
            rejected,
            margin=_column([row.margin or 0.0 for row in rows], chosen),
            probability=_column([1.0 if row.probability is None else row.probability for row in rows], chosen),
            centering=self.centering,
        )
        gap = (chosen - rejected).detach()
        return losses.sum(), {"accuracy": float((gap > 0).sum()), "margin": float(gap.sum())}


@dataclass(frozen=True, slots=True)
class ComparedPair:
    """A pair and the log-probabilities of its replies under the reference (0 where the loss needs no reference)."""

    pair: EncodedPair
    chosen: float
    rejected: float


class PreferenceLoss(Objective):
    """One of the DPO family on pairs, divided by the number of pairs."""

    def __init__(self, loss: DpoLoss, *, beta: float) -> None:
        self.loss, self.beta = loss, beta

    def weight(self, rows: Sequence[ComparedPair]) -> float:
        """Number of pairs."""
        return float(len(rows))

    def tokens(self, row: ComparedPair) -> int:
        """Length of both."""
        return len(row.pair.chosen.ids) + len(row.pair.rejected.ids)

    def __call__(self, model: nn.Module, rows: Sequence[ComparedPair]) -> tuple[Tensor, dict[str, float]]:
        """Summed loss; how many implicit rewards rank the pair right, and the summed margin beta * (difference)."""
        pairs = [row.pair for row in rows]
        sides = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        policy = Pair(*trained_logps(model, sides).sums().chunk(2))
        tokens = Pair(*_column([side.labels for side in sides], policy.chosen).chunk(2))
        reference = Pair(
            _column([row.chosen for row in rows], policy.chosen), _column([row.rejected for row in rows], policy.chosen)
        )
        soft = [1.0 if pair.probability is None else pair.probability for pair in pairs]
        probability = None if set(soft) == {1.0} else _column(soft, policy.chosen)
        losses = preference_loss(self.loss, policy, reference, tokens, beta=self.beta, probability=probability)
        margin = self.beta * margins(policy, reference).detach()
        return losses.sum(), {"accuracy": float((margin > 0).sum()), "margin": float(margin.sum())}


def preference_loss(
    loss: DpoLoss, policy: Pair, reference: Pair, tokens: Pair, *, beta: float, probability: Tensor | None = None
) -> Tensor:
    """Loss per pair, (B,), of the member of the family that the recipe chose."""
    match loss:
        case SigmoidLoss():
            smoothing = loss.label_smoothing
            return sigmoid_loss(policy, reference, beta=beta, label_smoothing=smoothing, probability=probability)
        case RobustLoss():
            return robust_loss(policy, reference, beta=beta, label_smoothing=loss.label_smoothing)
        case IpoLoss():
            return ipo_loss(policy, reference, tokens, beta=beta)
        case HingeLoss():
            return hinge_loss(policy, reference, beta=beta)
        case ApoZeroLoss():
            return apo_zero_loss(policy, reference, beta=beta)
        case SimpoLoss():
            return simpo_loss(policy, tokens, beta=beta, target_margin=loss.target_margin)
        case OrpoLoss():
            return orpo_loss(policy, tokens, beta=beta)
        case CpoLoss():
            return cpo_loss(policy, tokens, beta=beta, answer_weight=loss.answer_weight)
    raise AssertionError(f"{loss.kind} is not a loss on pairs")


@dataclass(frozen=True, slots=True)
class RatedRow:
    """A rated reply, and another row's reply put to the same prompt, each with its reference log-probability."""

    row: Encoded
    desirable: bool
    reference: float
    mismatched: Encoded
    mismatched_reference: float


class RatedLoss(Objective):
    """KTO on rated replies, divided by their number. Its baseline is that of the whole optimiser step."""

    def __init__(self, loss: KtoLoss, *, beta: float, budget: Budget) -> None:
        self.loss, self.beta, self.budget = loss, beta, budget
        self.kl = torch.zeros(())

    def weight(self, rows: Sequence[RatedRow]) -> float:
        """Number of replies."""
        return float(len(rows))

    def tokens(self, row: RatedRow) -> int:
        """Length of the row."""
        return len(row.row.ids)

    def prepared(self, model: nn.Module, rows: Sequence[RatedRow]) -> Sequence[RatedRow]:
        """The rows as they are. Baseline of this step: the KL estimate of all their mismatched replies together."""
        lengths = [len(row.mismatched.ids) for row in rows]

        def mismatched(cut: Cut) -> Tensor:
            logps = torch.zeros(len(rows))
            with torch.no_grad():
                for group in cut(lengths):
                    logps[group] = trained_logps(model, [rows[i].mismatched for i in group]).sums().cpu()
            return logps

        logps = self.budget.fitted(model, lengths, mismatched, generators_now())
        self.kl = kto_kl(logps, _column([row.mismatched_reference for row in rows], logps))
        return rows

    def again(self, model: nn.Module, rows: Sequence[RatedRow]) -> None:
        """The baseline in the arithmetic and the parts of the new attempt."""
        self.prepared(model, rows)

    def __call__(self, model: nn.Module, rows: Sequence[RatedRow]) -> tuple[Tensor, dict[str, float]]:
        """Summed loss; how many implicit rewards have the sign of their rating."""
        policy = trained_logps(model, [row.row for row in rows]).sums()
        reference = _column([row.reference for row in rows], policy)
        desirable = torch.tensor([row.desirable for row in rows], device=policy.device)
        losses = kto_loss(
            policy, reference, desirable, self.kl.to(policy), beta=self.beta,
            desirable_weight=self.loss.desirable_weight, undesirable_weight=self.loss.undesirable_weight,
        )  # fmt: skip
        right = ((policy.detach() > reference) == desirable).sum()
        return losses.sum(), {"accuracy": float(right), "kl": float(self.kl) * len(rows)}


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)
