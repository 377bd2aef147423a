"""A model behind an OpenAI-compatible server, asked by many threads at once within limits of rate and tokens.

What fails for a moment (no connection, 429, 5xx, a body that is no answer) is tried again with growing pauses; what the
server refuses (key, model, request) is an AlignError at once. The key comes from the environment; no message holds it.
"""

from __future__ import annotations

import http.client
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, NoReturn, TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_exponential_jitter

from align.critique.endpoint_answers import (
    NoLogprobs,
    Nonsense,
    answer_text,
    estimated_tokens,
    first_choice,
    first_token_logps,
    model_names,
    option_values,
    parsed,
    server_words,
    tokens_used,
)
from align.critique.endpoint_limits import Pace, TokenBudget
from align.critique.endpoint_wire import Reply, TryAgain, Wire
from align.data.examples import Messages
from align.errors import AlignError, StageFailed, did_you_mean
from align.recipe.critique_settings import EndpointCritic

T = TypeVar("T")
BUSY = (408, 409, 429)  # and 5xx: worth another try
NO_SUCH_ROUTE = (404, 405, 501)
TOP_LOGPROBS = 20  # the most that OpenAI lists, and vLLM unless told otherwise
FIRST_PAUSE_SECONDS, GROWN_PAUSE_SECONDS = 1.0, 60.0
LONGEST_PAUSE_SECONDS = 600.0  # a server that asks for more is given up
READ_CHARACTERS, SHOWN_CHARACTERS = 4000, 300  # of what a server says
HIDDEN_PIECE = 8  # characters: pieces of the key of this length are hidden too, since servers quote keys in part


class Endpoint:
    """One model of one server, which many threads may ask.

    requests: sent so far, every try counted. undecided: calls of `option_logps` where no option was among the likely tokens.
    """

    def __init__(
        self, settings: EndpointCritic, key: str | None, pause: Callable[[float], object] | None = None
    ) -> None:
        self.settings = settings
        self.requests = 0
        self.undecided = 0
        self._budget = TokenBudget(settings.token_budget)
        self._pace = Pace(settings.requests_per_minute)
        self._hide = _hider(key)
        self._closed = threading.Event()
        self._pause = pause or self._closed.wait
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(settings.concurrency)
        self._growing = wait_exponential_jitter(FIRST_PAUSE_SECONDS, GROWN_PAUSE_SECONDS, jitter=FIRST_PAUSE_SECONDS)
        self._wire = Wire(settings.url, key, timeout_seconds=settings.timeout_seconds)

    @classmethod
    def open(cls, settings: EndpointCritic, *, pause: Callable[[float], object] | None = None) -> Endpoint:
        """Read the key and make ready; nothing is sent. Raises AlignError where the key or the address is unusable.

        pause: waits for so many seconds; None: for real, or until `close`.
        """
        return cls(settings, _key(settings), pause)

    def __repr__(self) -> str:
        return f"Endpoint({self.settings.url}, {self.settings.model})"

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Give the connections back. Threads that wait for an answer or the next try wake up and raise StageFailed."""
        self._closed.set()
        self._wire.close()

    @property
    def used_tokens(self) -> int:
        """Read and written so far, as the server counts them, else estimated."""
        return self._budget.used

    def check(self) -> None:
        """Raise AlignError or StageFailed where the server is down, or refuses the key or the name of the model.

        One try where nobody answers, so that a wrong address is told at once.
        """
        names = model_names(parsed(self._retrying(hasty=True)(self._models).text))
        # Some servers know more than they list (`transformers serve` folders, Ollama names without a tag): ask them.
        if names and self.settings.model not in names:
            self._ask(self._body([{"role": "user", "content": "Hello"}], max_tokens=1), lambda _: None)

    def reply(
        self, messages: Messages, *, max_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> tuple[str, bool]:
        """What the model answers, and whether it ended by itself rather than at max_tokens.

        Raises AlignError or StageFailed.
        """
        rows = [message.row() for message in messages]
        body = self._body(rows, max_tokens=max_tokens, temperature=temperature, seed=seed)
        return self._ask(body, lambda choice: (answer_text(choice), choice.get("finish_reason") != "length"))

    def option_logps(self, messages: Messages, options: Sequence[str]) -> tuple[float, ...]:
        """Log-probability of each option as the first token of the answer; finite, and all equal where undecided.

        Raises AlignError where the server gives no log-probabilities, or as `reply`.
        """
        # Temperature and top_p are stated: some servers list log-probabilities after they have shaped them.
        body = self._body([message.row() for message in messages], max_tokens=1, temperature=1.0) | {
            "top_p": 1.0, "logprobs": True, "top_logprobs": TOP_LOGPROBS,
        }  # fmt: skip
        try:
            listed = self._ask(body, first_token_logps)
        except NoLogprobs:
            raise self._without_logprobs("gives no log-probabilities") from None
        values, decided = option_values(listed, options)
        with self._lock:
            self.undecided += not decided
        return values

    def _body(
        self, rows: list[dict[str, Any]], *, max_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> dict[str, Any]:
        return {
            "model": self.settings.model, "messages": rows, "max_tokens": max_tokens,
            "temperature": temperature, "seed": seed, "stream": False,
        }  # fmt: skip

    def _ask(self, body: Mapping[str, Any], read: Callable[[Mapping[str, Any]], T]) -> T:
        answer: T = self._retrying()(self._attempt, body, read)
        return answer

    def _retrying(self, *, hasty: bool = False) -> Retrying:
        """Calls again after TryAgain, up to `retries` times. hasty: not where nobody answered."""

        def given_up(state: RetryCallState) -> bool:
            failure = _failure(state)
            spent = state.attempt_number > self.settings.retries
            return spent or failure.pause > LONGEST_PAUSE_SECONDS or (hasty and failure.status is None)

        return Retrying(
            retry=retry_if_exception_type(TryAgain), stop=given_up, sleep=self._wait, retry_error_callback=self._give_up,
            wait=lambda state: max(self._growing(state), _failure(state).pause),
        )  # fmt: skip

    def _attempt(self, body: Mapping[str, Any], read: Callable[[Mapping[str, Any]], T]) -> T:
        """One try within the budget. Raises TryAgain, or AlignError for what the server refuses."""
        prompt_tokens = sum(estimated_tokens(str(row["content"])) for row in body["messages"])
        promised = prompt_tokens + body["max_tokens"]
        self._budget.promise(promised)
        used = prompt_tokens  # of an answer that is lost on its way, at the least
        try:
            reply = self._exchange("POST", "/chat/completions", body)
            answer = parsed(reply.text)
            used = tokens_used(answer, prompt_tokens) if reply.status == 200 else 0
        except TryAgain as failure:
            used = prompt_tokens if failure.sent else 0
            raise
        finally:
            self._budget.settle(promised, used)
        self._judge(reply)
        try:
            return read(first_choice(answer))
        except Nonsense as nonsense:
            raise TryAgain(str(nonsense), status=reply.status) from None

    def _models(self) -> Reply:
        reply = self._exchange("GET", "/models")
        if reply.status not in NO_SUCH_ROUTE:
            self._judge(reply)
        return reply

    def _exchange(self, method: str, route: str, body: Mapping[str, Any] | None = None) -> Reply:
        """One request, when its turn comes. Raises TryAgain where no whole answer comes."""
        with self._slots:
            self._wait(self._pace.delay())
            with self._lock:
                self.requests += 1
            return self._wire.send(method, route, body)

    def _wait(self, seconds: float) -> None:
        if seconds > 0:
            self._pause(seconds)
        if self._closed.is_set():
            raise StageFailed(f"{self.settings.url}: closed while requests waited", "Finished rows are kept.")

    def _judge(self, reply: Reply) -> None:
        """Raise what the status says."""
        if reply.status in BUSY or reply.status >= 500:
            raise TryAgain(self._told(reply), status=reply.status, pause=reply.pause)
        if not 200 <= reply.status < 300:
            raise self._refusal(reply)

    def _refusal(self, reply: Reply) -> AlignError:
        """The error for an answer that would be the same next time."""
        where = f"{self.settings.url} refused a request to model '{self.settings.model}': {self._told(reply)}"
        if reply.status in (401, 403):
            return AlignError(where, self._key_hint())
        if 300 <= reply.status < 400:
            return AlignError(where, f"Set url to where it points: {self._shown(reply.headers.get('location', '?'))}")
        if "logprob" in server_words(parsed(reply.text)):
            return self._without_logprobs(f"refused to give log-probabilities: {self._told(reply)}")
        if reply.status in (400, 404) and (names := self._listed()) and self.settings.model not in names:
            known = self._shown(did_you_mean(self.settings.model, names))
            return AlignError(where, f"It does not list this model. {known}")
        if reply.status in NO_SUCH_ROUTE:
            return AlignError(
                where, "See that url is the address up to /v1, and that the server has /chat/completions."
            )
        return AlignError(where, "Finished rows are kept; mend what the server names and start the same command again.")

    def _listed(self) -> tuple[str, ...]:
        try:
            return model_names(parsed(self._exchange("GET", "/models").text))
        except TryAgain:
            return ()

    def _key_hint(self) -> str:
        if self.settings.key_env:
            return f"See that the key in the environment variable {self.settings.key_env} is valid, and for this model."
        return "Set key_env to the name of the environment variable that holds the key."

    def _without_logprobs(self, what: str) -> AlignError:
        return AlignError(
            f"{self.settings.url} with model '{self.settings.model}' {what}, and options are compared by them",
            "Use a server that gives them, such as vLLM or llama.cpp, or set check_revisions: false and samples: 0.",
        )

    def _give_up(self, state: RetryCallState) -> NoReturn:
        failure, tries = _failure(state), state.attempt_number
        if failure.pause > LONGEST_PAUSE_SECONDS:
            advice = f"It asks for a pause of {failure.pause:.0f} seconds: start the same command again after it."
        elif failure.status == 429:
            advice = "Lower concurrency or set requests_per_minute, and start the same command again."
        elif failure.status is None:
            advice = (
                "See that the server runs at this address and is fast enough for timeout_seconds; then start again."
            )
        else:
            advice = "See the server's log, and start the same command again."
        raise StageFailed(
            f"{self.settings.url} did not answer for model '{self.settings.model}' in {tries} "
            f"{'try' if tries == 1 else 'tries'}, the last time: {self._shown(str(failure))}",
            f"Finished rows are kept. {advice}",
        )

    def _told(self, reply: Reply) -> str:
        """Status and words of the server. Those of a 401 are left out: they are about the key, and may quote it."""
        words = "" if reply.status == 401 else self._shown(server_words(parsed(reply.text)))
        return f"status {reply.status} ({words or http.client.responses.get(reply.status, 'unknown')})"

    def _shown(self, text: str) -> str:
        """Foreign text in one short line, without the key and without control characters."""
        line = " ".join("".join(c if c.isprintable() else " " for c in self._hide(text[:READ_CHARACTERS])).split())
        return line if len(line) <= SHOWN_CHARACTERS else line[:SHOWN_CHARACTERS] + "..."


def _failure(state: RetryCallState) -> TryAgain:
    failure = state.outcome.exception() if state.outcome else None
    assert isinstance(failure, TryAgain)
    return failure


def _key(settings: EndpointCritic) -> str | None:
    """The key that `key_env` names; None where it names none."""
    if settings.key_env is None:
        return None
    key = os.environ.get(settings.key_env, "").strip()
    if not key:
        raise AlignError(
            f"key_env: the environment variable {settings.key_env} for {settings.url} is not set or empty",
            f"export {settings.key_env}=... before the command.",
        )
    if not re.fullmatch(r"[!-~]+", key):
        raise AlignError(
            f"key_env: the environment variable {settings.key_env} holds spaces or characters that no key has",
            "Set it to the key alone.",
        )
    return key


def _hider(key: str | None) -> Callable[[str], str]:
    """Replaces the key, and pieces of it, in a text."""
    least = min(HIDDEN_PIECE, len(key or ""))
    pieces = [key[i : i + n] for n in range(len(key), least - 1, -1) for i in range(len(key) - n + 1)] if key else []

    def hide(text: str) -> str:
        for piece in pieces:
            text = text.replace(piece, "[key]")
        return text

    return hide
