"""Turns of a conversation, from the ways in which people write them down, each checked.

Two styles of turns are read ({role, content} and ShareGPT's {from, value}), plain text as a single turn, and the
Human/Assistant transcripts of Anthropic's hh-rlhf. Raises RowError; what a whole row looks like stands in formats.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from align.data.examples import Message, Messages, Role
from align.data.problems import RowError, shown
from align.errors import did_you_mean

ROLE_NAMES: dict[str, Role] = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "function_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool", "ipython": "tool",
}  # fmt: skip
MAY_FOLLOW: dict[Role | None, tuple[Role, ...]] = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
TEMPLATE_KEYS = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")  # all that templates read
SPEAKER = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
SPEAKER_ROLES: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}


def read_turns(value: Any, what: str) -> Messages:
    """The turns of a list of messages in either style; `what` names the field in errors."""
    if not isinstance(value, list | tuple):
        raise RowError(f"{what} must be a list of messages, not {shown(value)}")
    if not value:
        raise RowError(f"{what} is empty")
    return tuple(_turn(item, f"{what}[{number}]") for number, item in enumerate(value))


def text_turn(role: Role, value: Any, what: str) -> Message:
    """A single turn from plain text that must not be blank."""
    return Message(role, filled_text(value, what))


def filled_text(value: Any, what: str) -> str:
    """`value`, which must be text with something in it."""
    if value is None:
        raise RowError(f"{what} is missing")
    if not isinstance(value, str):
        raise RowError(f"{what} must be text, not {shown(value)}")
    if not value.strip():
        raise RowError(f"{what} is empty")
    return value


def read_transcript(value: Any, what: str) -> Messages:
    """The turns of an hh transcript: paragraphs that begin with `Human:` or `Assistant:`."""
    text = filled_text(value, what).lstrip()
    pieces = SPEAKER.split(text)
    if pieces[0]:
        raise RowError(f"{what} must begin with 'Human:' or 'Assistant:', not {shown(text, 30)}")
    turns = zip(pieces[1::2], pieces[2::2])
    return tuple(
        text_turn(SPEAKER_ROLES[speaker], content.strip(), f"{what}: turn {number} ({speaker})")
        for number, (speaker, content) in enumerate(turns, start=1)
    )


def is_transcript(value: Any) -> bool:
    """Whether this is text that begins the way hh transcripts do."""
    return isinstance(value, str) and value.lstrip().startswith("Human:") and "\n\nAssistant:" in value


def check_order(turns: Sequence[Message], what: str, *, ends_with: Sequence[Role]) -> None:
    """Raises RowError unless roles follow each other sensibly from the first turn to the last."""
    before: Role | None = None
    for number, turn in enumerate(turns):
        if turn.role not in MAY_FOLLOW[before]:
            where = f"after {before}" if before else "at the start"
            raise RowError(
                f"{what}[{number}]: a turn of {turn.role} {where} (expected {' or '.join(MAY_FOLLOW[before])})"
            )
        before = turn.role
    if before not in ends_with:
        raise RowError(f"{what}: the last turn is of {before}, not of {' or '.join(ends_with)}")


def plain_json(value: Any, what: str) -> Any:
    """`value`, which must be what JSON can hold."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        raise RowError(f"{what} is no plain JSON: {shown(value)}") from None
    return value


# One turn ------------------------------------------------------------------------------------------------------------


def _turn(item: Any, what: str) -> Message:
    if not isinstance(item, Mapping):
        raise RowError(f"{what} must be a message with role and content, not {shown(item)}")
    role_key, content_key = ("from", "value") if "from" in item and "role" not in item else ("role", "content")
    role = _role(item.get(role_key), what)
    extra = {key: plain_json(item[key], f"{what}.{key}") for key in TEMPLATE_KEYS if item.get(key) is not None}
    return Message(role, _content(item.get(content_key), role, extra, f"{what}.{content_key}"), extra or None)


def _role(value: Any, what: str) -> Role:
    if value is None:
        raise RowError(f"{what} has no role")
    if not isinstance(value, str) or value not in ROLE_NAMES:
        raise RowError(f"{what}: unknown role {shown(value)}. {did_you_mean(str(value), ROLE_NAMES)}")
    return ROLE_NAMES[value]


def _content(value: Any, role: Role, extra: Mapping[str, Any], what: str) -> str:
    """Text of a turn. It may be empty where that means something: a tool call, a silent tool, no instructions."""
    if isinstance(value, list):
        value = "".join(_text_part(part, what) for part in value)
    if role in ("system", "tool") and value == "":
        return ""
    if role == "assistant" and extra.get("tool_calls") and value in (None, ""):
        return ""
    return filled_text(value, what)


def _text_part(part: Any, what: str) -> str:
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise RowError(f"{what}: only parts of text can be trained on, not {shown(part)}")
