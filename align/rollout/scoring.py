"""What a model thinks of given texts: log-probabilities of their trained tokens, or rewards. No numbers about them.

Rows go through in batches: side by side what begins alike, so that the model reads it once, or, where it needs padding, what
is of like length. Results come in the rows' order, on the CPU, the same for every batching.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from align.batches import micro_batches, pad
from align.chat.encoded import Encoded, EncodedPair
from align.errors import StageFailed
from align.models.logps import PAD_ID, TrainedLogps, is_lean, is_padded, trained_logps
from align.models.rewards import reward_scores, row_rewards
from align.preference_losses import Pair
from align.progress import Progress
from align.rollout.inference import device_of, evaluating

TOKENS_AT_ONCE = 8192  # padding included, where there is any
LOGITS_AT_ONCE = 2**27  # numbers, where all logits are made; 512 MB in float32


class AnswerLogps(NamedTuple):
    """Per row, (N,) each, float64: log-probability of its trained tokens, summed, and how many they are."""

    sums: Tensor
    tokens: Tensor


class PairLogps(NamedTuple):
    """Of each pair, (N,) each: the summed log-probabilities of both replies, and their numbers of tokens."""

    logps: Pair
    tokens: Pair


def answer_logps(model: nn.Module, rows: Sequence[Encoded], *, progress: Progress | None = None) -> AnswerLogps:
    """Log-probabilities of the trained tokens of each row, at temperature 1 and without dropout."""

    def score(some: Sequence[Encoded]) -> Tensor:
        found = trained_logps(model, some)
        return TrainedLogps(found.logps.double(), found.row, found.rows).sums()

    most = TOKENS_AT_ONCE if is_lean(model) else min(TOKENS_AT_ONCE, LOGITS_AT_ONCE // _vocabulary(model))
    counts = torch.tensor([row.labels for row in rows], dtype=torch.float64)
    return AnswerLogps(_finite("log-probabilities", _in_batches(model, rows, score, max(1, most), progress)), counts)


def pair_logps(model: nn.Module, pairs: Sequence[EncodedPair], *, progress: Progress | None = None) -> PairLogps:
    """Log-probabilities of chosen and rejected replies."""
    both = answer_logps(model, _both_sides(pairs), progress=progress)
    return PairLogps(_halves(both.sums), _halves(both.tokens))


def rewards(model: nn.Module, rows: Sequence[Encoded], *, progress: Progress | None = None) -> Tensor:
    """Rewards of a reward model, (N,), float64."""

    def score(some: Sequence[Encoded]) -> Tensor:
        if is_padded(model):
            return reward_scores(model, pad(some, PAD_ID).to(device_of(model)))
        return row_rewards(model, [row.ids for row in some])

    return _finite("rewards", _in_batches(model, rows, score, TOKENS_AT_ONCE, progress))


def pair_rewards(model: nn.Module, pairs: Sequence[EncodedPair], *, progress: Progress | None = None) -> Pair:
    """Rewards of chosen and rejected replies, (N,) each."""
    return _halves(rewards(model, _both_sides(pairs), progress=progress))


def reply_row(prompt: Sequence[int], reply: Sequence[int]) -> Encoded:
    """A generated reply as a row whose trained tokens are the reply's."""
    return Encoded([*prompt, *reply], [False] * len(prompt) + [True] * len(reply))


def _in_batches(
    model: nn.Module,
    rows: Sequence[Encoded],
    score: Callable[[Sequence[Encoded]], Tensor],
    budget: int,
    progress: Progress | None,
) -> Tensor:
    found = torch.zeros(len(rows), dtype=torch.float64)
    order = sorted(range(len(rows)), key=lambda index: rows[index].ids)
    with (progress or Progress()).bar("evaluate", len(rows)) as bar, evaluating(model):
        for group in micro_batches([len(rows[index].ids) for index in order], budget, padded=is_padded(model)):
            indices = [order[place] for place in group]
            some = [rows[index] for index in indices]
            found[indices] = score(some).double().cpu()
            bar.advance(len(group), tokens=sum(len(row.ids) for row in some))
    return found


def _finite(what: str, found: Tensor) -> Tensor:
    """The same numbers. Raises StageFailed where some are not finite: no number about them would mean anything."""
    wild = [(row, value) for row, value in enumerate(found.tolist(), 1) if not math.isfinite(value)]
    if wild:
        raise StageFailed(
            f"the model gives {what} that are not finite to {len(wild)} of {len(found)} rows (row {wild[0][0]}: {wild[0][1]})",
            "Its numbers grow beyond what floats can hold. Train it again with a lower learning_rate, or with precision: "
            "float32.",
        )
    return found


def _both_sides(pairs: Sequence[EncodedPair]) -> list[Encoded]:
    return [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]


def _halves(values: Tensor) -> Pair:
    chosen, rejected = values.view(2, -1)
    return Pair(chosen, rejected)


def _vocabulary(model: nn.Module) -> int:
    config: Any = model.config
    return int(config.get_text_config().vocab_size)
