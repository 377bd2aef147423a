"""Who answers requests: a model in this process, or one behind an endpoint. Nothing here knows what is asked."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from align.chat.encoded import Encoded
from align.chat.encoder import Encoder
from align.chat.templates import stop_token_ids
from align.critique.endpoint import Endpoint
from align.critique.writing import Options, Written
from align.data.examples import Message, Messages
from align.errors import AlignError, StageFailed
from align.progress import Progress
from align.rollout.choices import choice_logps
from align.rollout.generation import Sampling, generate
from align.rollout.scoring import answer_logps

Asked = TypeVar("Asked")
Found = TypeVar("Found")
# How servers refuse a request that is longer than the context: OpenAI and vLLM, llama.cpp, others.
TOO_LONG = re.compile(r"maximum context|context[ _](length|size|window)|longer than the (maximum|model)", re.IGNORECASE)


@dataclass(frozen=True)
class LocalWriter:
    """A language model of this process, without dropout."""

    model: nn.Module
    tokenizer: Any
    encoder: Encoder
    context: int
    progress: Progress

    def write(
        self, requests: Sequence[Messages], max_new_tokens: int, *, temperature: float = 0.0, seed: int = 0
    ) -> list[Written | None]:
        """Replies, decoded together."""
        prompts = [self.encoder.prompt(request) for request in requests]
        fitting = [place for place, prompt in enumerate(prompts) if len(prompt) + max_new_tokens <= self.context]
        sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        replies = generate(
            self.model, self.tokenizer, [prompts[place] for place in fitting], sampling,
            stop_ids=stop_token_ids(self.tokenizer), progress=self.progress,
        )  # fmt: skip
        found = {place: Written(_readable(r.text), r.finished) for place, r in zip(fitting, replies, strict=True)}
        return [found.get(place) for place in range(len(requests))]

    def choose(self, requests: Sequence[Messages], options: Options) -> list[float | None]:
        """From the log-probabilities of the options themselves, never from sampled text (Bai 2022, section 4.1)."""
        rows = [
            [self.encoder.reply(request, (Message("assistant", word),)) for word in options] for request in requests
        ]
        fitting = [place for place, pair in enumerate(rows) if max(len(row.ids) for row in pair) <= self.context]
        if not fitting:
            return [None] * len(requests)
        pairs = [rows[place] for place in fitting]
        logps = self._first_token_logps(pairs) if all(map(_differ_at_once, pairs)) else self._whole_logps(pairs)
        chances = (logps[:, 0] - logps[:, 1]).double().sigmoid().tolist()
        found = dict(zip(fitting, chances, strict=True))
        return [found.get(place) for place in range(len(requests))]

    def _first_token_logps(self, pairs: Sequence[Sequence[Encoded]]) -> Tensor:
        """Log-probabilities of both options, (N, 2), where their first tokens tell them apart: one pass for both."""
        prompts = [pair[0].ids[: pair[0].trained.index(True)] for pair in pairs]
        firsts = [[row.ids[row.trained.index(True)] for row in pair] for pair in pairs]
        return choice_logps(self.model, prompts, firsts)

    def _whole_logps(self, pairs: Sequence[Sequence[Encoded]]) -> Tensor:
        """Log-probabilities of both options with their stop tokens, (N, 2)."""
        sums = answer_logps(self.model, [row for pair in pairs for row in pair], progress=self.progress).sums
        return sums.view(-1, 2)


@dataclass(frozen=True)
class EndpointWriter:
    """A model behind a server; as many requests at once as its settings allow."""

    endpoint: Endpoint
    threads: int

    def write(
        self, requests: Sequence[Messages], max_new_tokens: int, *, temperature: float = 0.0, seed: int = 0
    ) -> list[Written | None]:
        """Replies of the server; one that it cut short is not finished."""

        def ask(request: Messages) -> Written:
            text, whole = self.endpoint.reply(request, max_tokens=max_new_tokens, temperature=temperature, seed=seed)
            return Written(_readable(text), whole)

        return in_threads(_unless_too_long(ask), requests, self.threads, self.endpoint.close)

    def choose(self, requests: Sequence[Messages], options: Options) -> list[float | None]:
        """From the log-probabilities that the server gives for the first token."""

        def ask(request: Messages) -> float:
            first, second = self.endpoint.option_logps(request, options)
            return 1 / (1 + math.exp(max(-700.0, min(700.0, second - first))))

        return in_threads(_unless_too_long(ask), requests, self.threads, self.endpoint.close)

    def close(self) -> None:
        """Ends the requests that are under way."""
        self.endpoint.close()


def in_threads(
    work: Callable[[Asked], Found], items: Sequence[Asked], threads: int, end: Callable[[], None]
) -> list[Found]:
    """The results of `work`, in order. The first error ends it: what has not begun is not begun any more.

    end: called when the error comes from outside, as a second Ctrl-C does, so that what is under way ends too.
    """
    if len(items) < 2 or threads < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            ended = [future for future in futures if future.done() and not future.cancelled()]
            if not any(future.exception() is error for future in ended):
                end()
            raise


def _unless_too_long(ask: Callable[[Messages], Found]) -> Callable[[Messages], Found | None]:
    """The same, and None where the server refuses a request because of its length."""

    def asked(request: Messages) -> Found | None:
        try:
            return ask(request)
        except StageFailed:
            raise
        except AlignError as error:
            if TOO_LONG.search(error.message):
                return None
            raise

    return asked


def _readable(text: str) -> str:
    """A reply without white space around it, and without what no data may hold: NUL and halves of characters."""
    return text.replace("\0", "\ufffd").encode("utf-16", "surrogatepass").decode("utf-16", "replace").strip()


def _differ_at_once(pair: Sequence[Encoded]) -> bool:
    """Whether the replies differ in their first token alone: else one token would stand for an option only in part."""
    first, second = (row.trained.index(True) for row in pair)
    same = pair[0].ids[:first] == pair[1].ids[:second] and pair[0].ids[first + 1 :] == pair[1].ids[second + 1 :]
    return same and pair[0].ids[first] != pair[1].ids[second]
