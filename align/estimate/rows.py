"""What the rows of a stage are like, in tokens: from a sample of them, by the model's own tokenizer.

The tokens that go through a model at once, and how many of them the head sees, decide the activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    those tokens that go through the model, where the two sides of a pair share their prompt; unevenly: standard deviation
    of a row's from that share, in tokens. predicted: share that the head sees. prompt, longest_prompt: tokens of what a
    model is asked. held_out: rows; None: not known. sides: sequences that a row is made of.
    """

    count: int
    mean: float = UNKNOWN_TOKENS
    deviation: float = 0.0
    longest: float = UNKNOWN_TOKENS
    computed: float = 1.0
    unevenly: float = 0.0
    predicted: float = 1.0
    prompt: float = UNKNOWN_TOKENS / 2
    longest_prompt: float = UNKNOWN_TOKENS / 2
    held_out: int | None = None
    sides: int = 1

    def step_tokens(self, rows: int, steps: int) -> float:
        """Tokens of the largest of so many optimiser steps of so many rows."""
        rows = min(rows, self.count)
        return min(rows * self.mean + _most_of(steps) * self.deviation * math.sqrt(rows), rows * self.longest)

    def computed_tokens(self, tokens: float, batches: float) -> float:
        """Those of so many tokens that go through the model, in that of so many micro-batches in which pairs share least."""
        more = _most_of(batches) * self.unevenly * math.sqrt(tokens / self.mean)
        return min(tokens * self.computed + more, tokens)

    def halved(self) -> Rows:
        """Both sides of each pair as rows by themselves; rows of one side are as they were."""
        if self.sides == 1:
            return self
        return replace(
            self, count=2 * self.count, mean=self.mean / 2, deviation=self.deviation / 2, longest=self.longest / 2,
            computed=1.0, unevenly=0.0, sides=1,
        )  # fmt: skip


@dataclass(frozen=True)
class _Row:
    """Tokens of one row, made of one or two sequences. prompt: None where nothing is asked."""

    counted: int
    computed: int
    predicted: int
    prompt: int | None
    sides: int = 1

    def within(self, longest: int, *, cuts: bool) -> Iterator[_Row]:
        """What is trained of it with so many tokens a side: it, or it cut short where `cuts`; of plain text all, in chunks."""
        most = longest * self.sides
        if self.counted <= most:
            yield self
        elif self.prompt is None:  # a chunk begins with the last token of the one before, as chat.encoder has it
            for start in range(0, self.counted - 1, max(longest - 1, 1)):
                length = min(longest, self.counted - start)
                yield replace(self, counted=length, computed=length, predicted=length)
        elif cuts:
            kept = most / self.counted
            yield replace(
                self, counted=most, computed=round(self.computed * kept), predicted=round(self.predicted * kept)
            )


def rows_like(
    sample: Iterable[Mapping[str, Any]], count: int | None, count_tokens: CountTokens, *, longest: int, cuts: bool
) -> Rows | None:
    """What canonical rows are like; None when none of them can be used.

    count: of all rows, None: as many as the sample. longest: max_length, in tokens, at least 2; longer rows are cut where
    `cuts`, else dropped, and each chunk of a longer text is a row.
    """
    found = [_tokens(row, count_tokens) for row in sample]
    kept = [part for row in found for part in row.within(longest, cuts=cuts)]
    if not kept:
        return None
    counted = [row.counted for row in kept]
    prompts = [row.prompt for row in kept if row.prompt is not None] or [0]
    total = sum(counted)
    computed = sum(row.computed for row in kept) / total
    share = len(kept) / len(found)
    return Rows(
        count=round(share * (count or len(found))),
        mean=fmean(counted),
        deviation=pstdev(counted),
        longest=max(counted),
        computed=computed,
        unevenly=pstdev(row.computed - computed * row.counted for row in kept),
        predicted=sum(row.predicted for row in kept) / total,
        prompt=fmean(prompts),
        longest_prompt=max(prompts),
        sides=max(row.sides for row in kept),
    )


def counter(folder: Path) -> CountTokens:
    """Counts tokens by the tokenizer of a model folder, where that is one of the fast ones; else by bytes.

    So it does where the tokenizer cannot be read: whoever loads it says what is wrong.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        return _tokens_by_bytes
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception:  # tokenizers raises nothing narrower
        return _tokens_by_bytes
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def _most_of(numbers: float) -> float:
    """Deviations from the mean of the largest of so many normal numbers, which sums of rows nearly are (Blom 1958)."""
    numbers = max(numbers, 1.0)
    return NormalDist().inv_cdf((numbers - 0.375) / (numbers + 0.25))


def _tokens_by_bytes(text: str) -> int:
    return math.ceil(len(text.encode()) / BYTES_PER_TOKEN)


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
