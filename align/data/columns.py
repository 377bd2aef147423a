"""The columns of a row, each read and checked by the name that people give it. Raises RowError.

What a whole row means stands in formats.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from align.data.examples import Messages, Role
from align.data.problems import RowError, shown
from align.data.turns import check_order, filled_text, is_transcript, plain_json, read_transcript, read_turns, text_turn

Fields = Mapping[str, Any]

PROMPT_COLUMNS = ("prompt", "question", "instruction", "query")
REPLY_COLUMNS = ("completion", "response", "answer")
TURNS_COLUMNS = ("messages", "conversations", "conversation")
SYSTEM_COLUMNS = ("system", "system_prompt")
ANSWERED_BY: tuple[Role, ...] = ("assistant",)
ASKED_BY: tuple[Role, ...] = ("user", "tool")


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
    """What a judge needs to know about the right answer."""
    value = _json_column(fields, "expected")
    if value is not None and not isinstance(value, Mapping):
        raise RowError(f"'expected' must be an object, not {shown(value)}")
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
