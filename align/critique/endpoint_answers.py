"""What a server of the OpenAI form answers, read without trust: any part may be missing or of another type."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

CHARACTERS_PER_TOKEN = 4  # of English, where the server does not count
SPACE_MARKS = " \t\n▁Ġ"  # the last two are the space of tokens that some servers show undecoded
LEAST_REST = 1e-9  # probability: sums of listed ones are rounded


class Nonsense(Exception):
    """An answer without what was asked for."""


class NoLogprobs(Exception):
    """The server answers, and leaves log-probabilities out."""


def estimated_tokens(text: str) -> int:
    """Tokens of a text, at least 1."""
    return len(text) // CHARACTERS_PER_TOKEN + 1


def parsed(text: str) -> dict[str, Any]:
    """The JSON object in the text; empty where there is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def first_choice(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """The first of `choices`. Raises Nonsense where there is none."""
    if not answer:
        raise Nonsense("an answer that is no JSON object")
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise Nonsense(f"an answer without choices{_after_colon(server_words(answer))}")
    return choices[0]


def answer_text(choice: Mapping[str, Any]) -> str:
    """Text of the message; it may be empty. Raises Nonsense where there is none, as when all was spent on thinking."""
    message = choice.get("message")
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, str):
        raise Nonsense(f"an answer without text (finish_reason: {choice.get('finish_reason')})")
    return content


def tokens_used(answer: Mapping[str, Any], prompt_tokens: int) -> int:
    """Tokens as the server counts them; without its count, prompt_tokens and an estimate of the text."""
    usage = answer.get("usage")
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    if isinstance(total, int) and total > 0:
        return total
    try:
        return prompt_tokens + estimated_tokens(answer_text(first_choice(answer)))
    except Nonsense:
        return prompt_tokens


def model_names(answer: Mapping[str, Any]) -> tuple[str, ...]:
    """Names in the answer of /models; empty where it is of another form."""
    entries = answer.get("data")
    names = [entry.get("id") for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    return tuple(name for name in names if isinstance(name, str))


def server_words(answer: Mapping[str, Any]) -> str:
    """What the server says about its refusal; empty where it says nothing."""
    error = answer.get("error")
    if isinstance(error, str):
        return error
    holders = [holder for holder in (error, answer) if isinstance(holder, Mapping)]
    words = [holder[name] for holder in holders for name in ("message", "detail") if holder.get(name)]
    return str(words[0]) if words else ""


def first_token_logps(choice: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    """First tokens that the model thought of, each with its log-probability, as `top_logprobs` lists them.

    Empty where the model ended its turn at once. Raises NoLogprobs where the server lists none.
    """
    logprobs = choice.get("logprobs")
    positions = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(positions, list):
        raise NoLogprobs
    if not positions:
        return ()
    listed = positions[0].get("top_logprobs") if isinstance(positions[0], dict) else None
    entries = listed if isinstance(listed, list) else []
    pairs = tuple(pair for entry in entries if (pair := _token_logp(entry)))
    if not pairs:
        raise NoLogprobs
    return pairs


def option_values(listed: Sequence[tuple[str, float]], options: Sequence[str]) -> tuple[tuple[float, ...], bool]:
    """Log-probability of each option as the first token, and whether any option is listed at all.

    Tokens that differ only in the space around them are one option, and their probabilities are added up. An option that
    is not listed has at most the probability of the least listed token, and at most what the listed ones leave; it gets
    1 less than the log of that, so that all values are finite and a listed option is always ahead.
    """
    found = {option: [logp for token, logp in listed if token.strip(SPACE_MARKS) == option] for option in options}
    rest = 1 - sum(math.exp(logp) for _, logp in listed)
    absent = min([logp for _, logp in listed] + [math.log(max(rest, LEAST_REST))]) - 1
    values = tuple(_log_sum_exp(found[option]) if found[option] else absent for option in options)
    return values, any(found.values())


def _token_logp(entry: Any) -> tuple[str, float] | None:
    token, logp = (entry.get("token"), entry.get("logprob")) if isinstance(entry, dict) else (None, None)
    if not isinstance(token, str) or not isinstance(logp, int | float) or not math.isfinite(logp):
        return None
    return token, min(float(logp), 0.0)


def _log_sum_exp(values: Sequence[float]) -> float:
    most = max(values)
    return most + math.log(sum(math.exp(value - most) for value in values))


def _after_colon(text: str) -> str:
    return f": {text}" if text else ""
