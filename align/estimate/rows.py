"""What the rows of a stage are like, in tokens: from a sample of them, by the model's own tokenizer.

The tokens that go through a model at once, and how many of them the head sees, decide the activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist, fmean, pstdev
from typing import Any

BYTES_PER_TOKEN = 4.0  # of English text under a vocabulary of tens of thousands, where there is no tokenizer to ask
TURN_TOKENS = 3  # that a chat template puts around a turn: its role, a line's end, its stop
UNKNOWN_TOKENS = 512  # of a row of which nothing is known
LEAST_SHARED_TOKENS = 8  # as models.layout has it: a shorter beginning of two replies is computed twice

CountTokens = Callable[[str], int]


@dataclass(frozen=True)
class Rows:
    """Rows of a data set as a stage reads them. A pair counts with both sides.

    count: training rows. mean, deviation, longest: tokens of a row, as the token budget counts them. computed: share of
    those tokens that go through the model, where the two sides of a pair share their prompt. predicted: share that the
    head sees. prompt, longest_prompt: tokens of what a model is asked. held_out: rows; None: not known.
    """

    count: int
    mean: float = UNKNOWN_TOKENS
    deviation: float = 0.0
    longest: float = UNKNOWN_TOKENS
    computed: float = 1.0
    predicted: float = 1.0
    prompt: float = UNKNOWN_TOKENS / 2
    longest_prompt: float = UNKNOWN_TOKENS / 2
    held_out: int | None = None

    def step_tokens(self, rows: int, steps: int) -> float:
        """Tokens of the largest of so many optimiser steps of so many rows: the expected maximum of as many normal numbers
        (Blom 1958), which sums of rows are nearly."""
        rows = min(rows, self.count)
        deviations = NormalDist().inv_cdf((max(steps, 1) - 0.375) / (max(steps, 1) + 0.25))
        return min(rows * self.mean + deviations * self.deviation * math.sqrt(rows), rows * self.longest)

    def halved(self) -> Rows:
        """Both sides of each pair as rows by themselves."""
        return replace(
            self, count=2 * self.count, mean=self.mean / 2, deviation=self.deviation / 2, longest=self.longest / 2,
            computed=1.0,
        )  # fmt: skip


@dataclass(frozen=True)
class _Row:
    """Tokens of one row, made of one or two sequences. prompt: None where nothing is asked."""

    counted: int
    computed: int
    predicted: int
    prompt: int | None
    sides: int = 1

    def within(self, longest: int) -> _Row:
        """Cut to so many tokens a side."""
        most = longest * self.sides
        if self.counted <= most:
            return self
        kept = most / self.counted
        return replace(self, counted=most, computed=round(self.computed * kept), predicted=round(self.predicted * kept))


def rows_like(
    sample: Iterable[Mapping[str, Any]], count: int | None, count_tokens: CountTokens, *, longest: int, cuts: bool
) -> Rows | None:
    """What canonical rows are like; None when none of them can be used.

    count: of all rows, None: as many as the sample. longest: max_length, in tokens; longer rows are cut where `cuts`, else
    dropped.
    """
    found = [_tokens(row, count_tokens) for row in sample]
    kept = [row.within(longest) for row in found if cuts or row.counted <= longest * row.sides]
    if not kept:
        return None
    counted = [row.counted for row in kept]
    prompts = [row.prompt for row in kept if row.prompt is not None] or [0]
    total = sum(counted)
    share = len(kept) / len(found)
    return Rows(
        count=round(share * (count or len(found))),
        mean=fmean(counted),
        deviation=pstdev(counted),
        longest=max(counted),
        computed=sum(row.computed for row in kept) / total,
        predicted=sum(row.predicted for row in kept) / total,
        prompt=fmean(prompts),
        longest_prompt=max(prompts),
    )


def counter(folder: Path) -> CountTokens:
    """Counts tokens by the tokenizer of a model folder, where that is one of the fast ones; else by bytes."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return lambda text: math.ceil(len(text.encode()) / BYTES_PER_TOKEN)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def _tokens(row: Mapping[str, Any], count: CountTokens) -> _Row:
    if "text" in row:
        length = count(row["text"]) + 1
        return _Row(length, length, length, None)
    if "messages" in row:
        *before, last = row["messages"]
        prompt, answer = _turns(before, count), _turns([last], count)
        earlier = _turns([turn for turn in before if turn["role"] == "assistant"], count)
        return _Row(prompt + answer, prompt + answer, answer + earlier, prompt)
    prompt = _turns(row["prompt"], count)
    if "chosen" in row:
        replies = _turns(row["chosen"], count) + _turns(row["rejected"], count)
        shared = prompt if prompt >= LEAST_SHARED_TOKENS else 0
        return _Row(2 * prompt + replies, 2 * prompt + replies - shared, replies, prompt, sides=2)
    reply = _turns(row.get("completion", ()), count)
    return _Row(prompt + reply, prompt + reply, reply, prompt)


def _turns(messages: Sequence[Mapping[str, Any]], count: CountTokens) -> int:
    return sum(count(str(message.get("content") or "")) + TURN_TOKENS for message in messages)
