"""The columns of a row, each read and checked: texts, turns of a conversation, tools, numbers. Raises RowError.

Turns are read in two styles ({role, content} and ShareGPT's {from, value}), from plain text as a single turn, and from
the Human/Assistant transcripts of Anthropic's hh-rlhf. What a whole row means stands in formats.py.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from align.data.examples import Message, Messages, Role
from align.data.problems import RowError, shown
from align.errors import did_you_mean

Fields = Mapping[str, Any]

PROMPT_COLUMNS = ("prompt", "question", "instruction", "query")
REPLY_COLUMNS = ("completion", "response", "answer")
TURNS_COLUMNS = ("messages", "conversations", "conversation")
SYSTEM_COLUMNS = ("system", "system_prompt")
ANSWERED_BY: tuple[Role, ...] = ("assistant",)
ASKED_BY: tuple[Role, ...] = ("user", "tool")

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


# Columns by name ----------------------------------------------------------------------------------------------------


def one_of(fields: Fields, names: Sequence[str]) -> tuple[str, Any]:
    """Name and value of the first of these columns that the row has."""
    for name in names:
        if name in fields:
            return name, fields[name]
    has = ", ".join(map(str, fields)) or "nothing"
    raise RowError(f"no '{names[0]}' (the row has: {has})")


def turns_column(fields: Fields) -> Messages:
    """A conversation written as a list of messages."""
    name, value = one_of(fields, TURNS_COLUMNS)
    return read_turns(value, name)


def prompt_column(fields: Fields) -> Messages:
    """The prompt with its system turn, whether written as text, as turns or as a transcript."""
    if not any(name in fields for name in PROMPT_COLUMNS) and any(name in fields for name in TURNS_COLUMNS):
        return with_system(fields, turns_column(fields))
    name, value = one_of(fields, PROMPT_COLUMNS)
    if is_transcript(value):
        turns = read_transcript(value.rstrip().removesuffix("Assistant:"), f"'{name}'")
    elif isinstance(value, list | tuple):
        turns = read_turns(value, name)
    elif name == "instruction":
        turns = (text_turn("user", instruction_column(fields), "'instruction'"),)
    else:
        turns = (text_turn("user", value, f"'{name}'"),)
    turns = with_system(fields, turns)
    check_order(turns, f"'{name}'", ends_with=ASKED_BY)
    return turns


def instruction_column(fields: Fields) -> str:
    """The instruction of an Alpaca row, with its input on the next line."""
    instruction = filled_text(fields.get("instruction"), "'instruction'")
    context = fields.get("input")
    return instruction + "\n" + filled_text(context, "'input'") if context else instruction


def reply_column(fields: Fields, prompt: Messages) -> Messages:
    """The answer to `prompt`, as text or as turns, which may repeat the prompt."""
    name, value = one_of(fields, REPLY_COLUMNS)
    if isinstance(value, str):
        return (text_turn("assistant", value, f"'{name}'"),)
    turns = read_turns([value] if isinstance(value, Mapping) else value, name)
    return turns[len(prompt) :] if turns[: len(prompt)] == prompt else turns


def with_system(fields: Fields, turns: Messages) -> Messages:
    """The turns behind the row's system column, if it has one."""
    name = next((name for name in SYSTEM_COLUMNS if fields.get(name)), None)
    if name is None:
        return turns
    if turns and turns[0].role == "system":
        raise RowError(f"a system turn stands both in '{name}' and in the messages")
    return (text_turn("system", fields[name], f"'{name}'"), *turns)


def tools_column(fields: Fields) -> tuple[Mapping[str, Any], ...]:
    """The tools that the assistant may call, as a list or as its JSON."""
    value = _json_column(fields, "tools")
    if value in (None, [], ""):
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise RowError(f"'tools' must be a list of objects, not {shown(value)}")
    return tuple(plain_json(value, "'tools'"))


def expected_column(fields: Fields) -> Mapping[str, Any] | None:
    """What a judge or a reward needs to know about the right answer; plain text or a number is the answer itself."""
    value = fields.get("expected")
    if isinstance(value, str) and value.strip() in ("", "null"):
        return None
    if isinstance(value, str) and not value.lstrip().startswith(("{", "[")):
        return {"answer": value}
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"answer": plain_json(value, "'expected'")}
    value = _json_column(fields, "expected")
    if value is not None and not isinstance(value, Mapping):
        raise RowError(f"'expected' must be an object, text or a number, not {shown(value)}")
    return plain_json(value, "'expected'") if value else None


def _json_column(fields: Fields, name: str) -> Any:
    """A column's value; text (all that a CSV cell can be) is parsed as JSON."""
    value = fields.get(name)
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return json.loads(value)
    except ValueError:
        raise RowError(f"'{name}' must be JSON, not {shown(value)}") from None


def number_column(fields: Fields, name: str) -> float | None:
    """A finite number, also as the text of a CSV cell; None: the row has none."""
    value = fields.get(name)
    if value is None or value == "":
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RowError(f"'{name}' must be a number, not {shown(value)}")
    return number


# Turns ---------------------------------------------------------------------------------------------------------------


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
