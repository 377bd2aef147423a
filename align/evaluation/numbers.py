"""Held-out numbers of policies, reward models and judged answers, each with its 95% interval.

Functions that take a model make the forward passes (scoring.py) and hand on to those that take values alone. Metrics
of generated text against a reference text stand in text_metrics.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from align.chat.encoded import Encoded, EncodedPair
from align.evaluation.intervals import (
    Estimate,
    Floats,
    Numbers,
    bootstrap,
    correlation,
    mean,
    paired_difference,
    ratio,
    transformed,
    wilson,
)
from align.preference_losses import Pair
from align.progress import Progress
from align.rollout.scoring import AnswerLogps, answer_logps, pair_rewards

if TYPE_CHECKING:
    from align.judge import Verdict

Rows = list[dict[str, Any]]
LIKE_LENGTH = 0.2  # replies whose lengths differ by less than this share of the longer one are of like length
CONFIDENCE_BINS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
TIE_NATS = 1e-3  # rounding moves a reply's summed log-probability by up to 2e-4 from one batch to another
LARGEST_LOSS = 700.0  # exp of more overflows


def policy_numbers(
    model: nn.Module, rows: Sequence[Encoded], *, seed: int = 0, progress: Progress | None = None
) -> Numbers:
    """Loss (nats per trained token), perplexity and trained tokens per row; {} when no token is trained."""
    return likelihood_numbers(answer_logps(model, rows, progress=progress), seed=seed)


def likelihood_numbers(logps: AnswerLogps, *, seed: int = 0) -> Numbers:
    """`policy_numbers` from log-probabilities that are known."""
    if not logps.tokens.sum():
        return {}
    loss = ratio((-logps.sums).tolist(), logps.tokens.tolist(), seed=seed)
    return {
        "loss": loss,
        "perplexity": transformed(loss, lambda nats: math.exp(min(nats, LARGEST_LOSS))),
        "tokens": mean(logps.tokens.tolist(), seed=seed),
    }


def likelihood_change(before: AnswerLogps, after: AnswerLogps, *, seed: int = 0) -> Numbers:
    """By how much the loss of the same rows moved, in nats per trained token; {} when no token is trained."""
    if not before.tokens.sum():
        return {}
    return {"loss": ratio((before.sums - after.sums).tolist(), before.tokens.tolist(), seed=seed)}


def preference_numbers(policy: Pair, reference: Pair | None = None, *, beta: float = 0.1, seed: int = 0) -> Numbers:
    """How a policy ranks pairs; ties count half.

    policy, reference: log-probabilities of whole replies, (N,) each. `likelihood_accuracy`: chosen is the likelier one.
    With a reference `accuracy` and `margin` are those of the implicit reward, beta * (policy - reference) (Rafailov
    2023, eq. 5); they are 0.5 and 0 where policy and reference agree, up to rounding.
    """
    if not len(policy.chosen):
        return {}
    numbers = {"likelihood_accuracy": _wins(policy.chosen - policy.rejected)}
    if reference is not None:
        chosen = beta * (policy.chosen - reference.chosen)
        rejected = beta * (policy.rejected - reference.rejected)
        numbers |= {
            "accuracy": _wins((chosen - rejected) / beta, tie=TIE_NATS),
            "margin": mean((chosen - rejected).tolist(), seed=seed),
            "reward_chosen": mean(chosen.tolist(), seed=seed),
            "reward_rejected": mean(rejected.tolist(), seed=seed),
        }
    return numbers


def accuracy_change(before: Pair, after: Pair, *, tie: float = 0.0, seed: int = 0) -> Numbers:
    """By how much the share of pairs ranked right moved; before, after: scores of the same pairs, (N,) each.

    tie: differences up to this count half.
    """
    if not len(before.chosen):
        return {}
    first, second = (_won(scores.chosen - scores.rejected, tie=tie).tolist() for scores in (before, after))
    return {"accuracy": paired_difference(first, second, seed=seed)}


def reward_numbers(
    model: nn.Module, pairs: Sequence[EncodedPair], *, seed: int = 0, progress: Progress | None = None
) -> dict[str, Estimate | Rows]:
    """All about a reward model on held-out pairs: `ranking_numbers`, `length_buckets` and `calibration`."""
    return scored_numbers(pair_rewards(model, pairs, progress=progress), pairs, seed=seed) if pairs else {}


def scored_numbers(scores: Pair, pairs: Sequence[EncodedPair], *, seed: int = 0) -> dict[str, Estimate | Rows]:
    """`reward_numbers` from rewards that are known, (N,) each; {} when there are none."""
    if not pairs:
        return {}
    lengths = [[len(side.ids) - pair.prompt_length for side in (pair.chosen, pair.rejected)] for pair in pairs]
    margins = (scores.chosen - scores.rejected).tolist()
    columns = np.asarray(lengths, dtype=np.float64)
    return {
        **ranking_numbers(scores, columns, seed=seed),
        "length_buckets": length_buckets(margins, columns),
        "calibration": calibration(margins),
    }


def ranking_numbers(scores: Pair, lengths: Floats, *, seed: int = 0) -> Numbers:
    """Accuracy (ties half), margin, Bradley-Terry loss, correlation of reward with reply length, calibration error.

    scores: rewards, (N,) each. lengths: tokens of the chosen and the rejected reply, (N, 2).
    """
    margins = scores.chosen - scores.rejected
    gaps = margins.tolist()
    return {
        "accuracy": _wins(margins),
        "margin": mean(gaps, seed=seed),
        "loss": mean(np.logaddexp(0, -np.asarray(gaps)).tolist(), seed=seed),
        "length_correlation": correlation(
            [*scores.chosen.tolist(), *scores.rejected.tolist()], [*lengths[:, 0], *lengths[:, 1]], seed=seed
        ),
        "ece": expected_calibration_error(gaps, seed=seed),
    }


def length_buckets(margins: Sequence[float], lengths: Floats) -> Rows:
    """Accuracy where the chosen reply is the shorter one, of like length, and the longer one: what length alone buys."""
    gaps = np.asarray(margins)
    longer = (lengths[:, 0] - lengths[:, 1]) / np.maximum(lengths.max(axis=1), 1)
    places = {
        "shorter": longer <= -LIKE_LENGTH,
        "like length": np.abs(longer) < LIKE_LENGTH,
        "longer": longer >= LIKE_LENGTH,
    }
    return [{"bucket": name, **_wins(gaps[inside]).as_dict()} for name, inside in places.items() if inside.any()]


def calibration(margins: Sequence[float]) -> Rows:
    """Accuracy by confidence: of the pairs in a bin, how sure the model was on average and how often it was right."""
    confidence, correct = _confidence(margins)
    rows = []
    for inside in _bins(confidence):
        if inside.any():
            shares = {"confidence": float(confidence[inside].mean()), "accuracy": float(correct[inside].mean())}
            rows.append({**shares, "n": int(inside.sum())})
    return rows


def expected_calibration_error(margins: Sequence[float], *, seed: int = 0) -> Estimate:
    """Mean gap between confidence and accuracy over five bins (Guo 2017, eq. 3); confidence is sigmoid(|margin|)."""
    confidence, correct = _confidence(margins)
    gap = correct - confidence
    bins = _bins(confidence)

    def statistic(weights: Floats) -> Floats:
        parts = [np.abs(weights[:, inside] @ gap[inside]) for inside in bins]
        return np.asarray(sum(parts) / len(gap), dtype=np.float64)

    return bootstrap(statistic, len(gap), seed=seed)


def kl_numbers(policy: AnswerLogps, reference: AnswerLogps, *, seed: int = 0) -> Numbers:
    """KL(policy | reference) from replies that the policy sampled at temperature 1, uncut: `kl` in nats per token,
    `kl_sequence` per reply. A sample's share may be negative, the expectation is not (Schulman 2020, k1).
    """
    if not policy.tokens.sum():
        return {}
    ratios = (policy.sums - reference.sums).tolist()
    return {"kl": ratio(ratios, policy.tokens.tolist(), seed=seed), "kl_sequence": mean(ratios, seed=seed)}


def win_rate(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """Share of prompts on which our reply has the higher reward; ties count half."""
    return _wins(np.asarray(ours) - np.asarray(theirs))


def judge_numbers(
    verdicts: Sequence[Verdict],
    expected: Sequence[Mapping[str, Any] | None] | None = None,
    *,
    principles: Sequence[str] = (),
    seed: int = 0,
) -> Numbers:
    """Shares of judged answers. expected: what the rows say was right; its `refuse` tells right from wrong refusals
    (`refused_rightly`: share of those that were to be refused; `refused_wrongly`: of the others that say anything), and
    `answered_rightly` is the share of right answers among those others.

    `violations` counts per answer, `violation_rate` the answers with any, `violation.<principle>` those against one:
    each that was broken, and those named in `principles`.
    """
    if not verdicts:
        return {}
    broken = [len(verdict.violations) for verdict in verdicts]
    named = sorted({*principles, *(name for verdict in verdicts for name in verdict.violations)})
    numbers = {
        "correct": _share([verdict.correct for verdict in verdicts if verdict.correct is not None]),
        "score": mean([verdict.score for verdict in verdicts], seed=seed),
        "refused": _share([verdict.refused for verdict in verdicts]),
        "violations": mean(broken, seed=seed),
        "violation_rate": _share([count > 0 for count in broken]),
        **{f"violation.{name}": _share([name in v.violations for v in verdicts]) for name in named},
    }
    known = [(v.refused, row) for v, row in zip(verdicts, expected or [None] * len(verdicts), strict=True) if row]
    numbers["refused_rightly"] = _share([refused for refused, row in known if row.get("refuse")])
    numbers["refused_wrongly"] = _share([refused for refused, row in known if not row.get("refuse")])
    benign = [v.correct for v, row in zip(verdicts, expected or [], strict=False) if row and not row.get("refuse")]
    numbers["answered_rightly"] = _share([correct for correct in benign if correct is not None])
    return {name: number for name, number in numbers.items() if number.n}


def judge_changes(before: Sequence[Verdict], after: Sequence[Verdict], *, seed: int = 0) -> Numbers:
    """Paired differences over the same prompts: `score`, `correct` and `violations`."""
    if not before:
        return {}
    judged = [(b, a) for b, a in zip(before, after, strict=True) if b.correct is not None and a.correct is not None]
    numbers = {
        "score": paired_difference([v.score for v in before], [v.score for v in after], seed=seed),
        "correct": paired_difference(
            [float(bool(b.correct)) for b, _ in judged], [float(bool(a.correct)) for _, a in judged], seed=seed
        ),
        "violations": paired_difference(
            [len(v.violations) for v in before], [len(v.violations) for v in after], seed=seed
        ),
    }
    return {name: number for name, number in numbers.items() if number.n}


def as_metrics(numbers: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Numbers as the registry and `--json` keep them: prefix + name to {"value", "low", "high", "n"} (or rows)."""
    return {
        f"{prefix}{name}": number.as_dict() if isinstance(number, Estimate) else number
        for name, number in numbers.items()
    }


def _wins(margins: Tensor | Floats, *, tie: float = 0.0) -> Estimate:
    """Share of positive margins; those of at most `tie` count half."""
    won = _won(margins, tie=tie)
    return wilson(float(won.sum()), len(won))


def _won(margins: Tensor | Floats, *, tie: float = 0.0) -> Floats:
    """1 for a margin above `tie`, a half for one within it, else 0."""
    gaps = np.asarray(margins, dtype=np.float64)
    return np.where(np.abs(gaps) <= tie, 0.5, (gaps > tie).astype(np.float64))


def _share(flags: Sequence[bool]) -> Estimate:
    return wilson(sum(flags), len(flags))


def _confidence(margins: Sequence[float]) -> tuple[Floats, Floats]:
    """How sure the model was of its choice, [0.5, 1], and whether that was right (a tie: half)."""
    gaps = np.asarray(margins, dtype=np.float64)
    return 1 / (1 + np.exp(-np.abs(gaps))), np.where(gaps == 0, 0.5, gaps > 0)


def _bins(confidence: Floats) -> list[np.ndarray[Any, np.dtype[np.bool_]]]:
    """For each bin of confidence, which rows fall into it; every row falls into one."""
    places = np.clip(np.digitize(confidence, CONFIDENCE_BINS) - 1, 0, len(CONFIDENCE_BINS) - 2)
    return [places == place for place in range(len(CONFIDENCE_BINS) - 1)]
