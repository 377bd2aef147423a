"""The forms in which people write training rows: which one a file has, and what example each row is.

Every row is checked as it is read; RowError says what is wrong with it. A column that is null counts as absent, columns
that no format knows are passed over. Hub, files and places are none of this file's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from align.data.columns import (
    ANSWERED_BY,
    ASKED_BY,
    PROMPT_COLUMNS,
    REPLY_COLUMNS,
    TURNS_COLUMNS,
    Fields,
    check_order,
    expected_column,
    filled_text,
    instruction_column,
    is_transcript,
    number_column,
    one_of,
    prompt_column,
    read_transcript,
    read_turns,
    reply_column,
    text_turn,
    tools_column,
    turns_column,
    with_system,
)
from align.data.examples import Conversation, Document, Example, Message, Messages, Preference, Prompt, Rated
from align.data.problems import RowError, shown
from align.errors import AlignError, did_you_mean

LABELS = {  # 1 and 1.0 equal True; pandas writes whole numbers with a gap among them as 1.0
    True: True, False: False, "true": True, "false": False, "True": True, "False": False, "1": True, "0": False,
    "1.0": True, "0.0": False,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class RowFormat:
    """One way to write rows. fits: whether a row's columns look like it; read: the example, or RowError."""

    columns: str
    fits: Callable[[Fields], bool]
    read: Callable[[Fields], Example]
    bad_share: float = 0.0  # of the rows may be unusable without an error; they are dropped and counted


def detect(rows: Sequence[Fields]) -> str:
    """The name of the most demanding format that fits any of these rows.

    So rows that lack an answer are refused as such, and do not turn a file into one of prompts without a word. Raises
    AlignError when no format fits any row.
    """
    best = next((name for name, form in FORMATS.items() if any(map(form.fits, rows))), None)
    if best is None:
        columns = ", ".join(sorted({str(key) for row in rows for key in row}))
        known = "; ".join(f"{name}: {form.columns}" for name, form in FORMATS.items())
        raise AlignError(
            f"no format fits these rows; their columns are: {columns}",
            f"Rename them with `columns: {{theirs: ours}}`. Known: {known}.",
        )
    return best


def read_row(name: str, fields: Fields) -> Example:
    """The example behind one row of format `name`. Raises RowError."""
    return FORMATS[name].read({key: value for key, value in fields.items() if value is not None})


def renamed(fields: Fields, columns: Mapping[str, str]) -> Fields:
    """The row with its columns under the names that the format expects; {theirs: ours}. Raises RowError."""
    if not columns:
        return fields
    missing = [name for name in columns if name not in fields]
    if missing:
        raise RowError(f"no column '{missing[0]}', which `columns:` renames. {did_you_mean(missing[0], fields)}")
    taken = set(columns) | set(columns.values())
    kept = {key: value for key, value in fields.items() if key not in taken}
    return kept | {ours: fields[theirs] for theirs, ours in columns.items()}


# Conversations -------------------------------------------------------------------------------------------------------


def _conversation(fields: Fields) -> Conversation:
    turns = with_system(fields, turns_column(fields))
    return _answered(fields, turns)


def _alpaca(fields: Fields) -> Conversation:
    turns = (*_history(fields), text_turn("user", instruction_column(fields), "'instruction'"))
    answer = text_turn("assistant", one_of(fields, ("output",))[1], "'output'")
    return _answered(fields, (*with_system(fields, turns), answer))


def _prompt_completion(fields: Fields) -> Conversation:
    prompt = prompt_column(fields)
    return _answered(fields, prompt + reply_column(fields, prompt))


def _answered(fields: Fields, turns: Messages) -> Conversation:
    check_order(turns, "messages", ends_with=ANSWERED_BY)
    return Conversation(turns, tools_column(fields), expected_column(fields))


def _history(fields: Fields) -> Messages:
    """Earlier rounds of an Alpaca row: a list of [question, answer]."""
    turns: list[Message] = []
    rounds = fields.get("history") or ()
    if not isinstance(rounds, list | tuple):
        raise RowError(f"'history' must be a list of [question, answer], not {shown(rounds)}")
    for number, pair in enumerate(rounds):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowError(f"history[{number}] must be [question, answer], not {shown(pair)}")
        turns.append(text_turn("user", pair[0], f"history[{number}][0]"))
        turns.append(text_turn("assistant", pair[1], f"history[{number}][1]"))
    return tuple(turns)


# Pairs, rated answers, prompts, text ---------------------------------------------------------------------------------


def _preference(fields: Fields) -> Preference:
    chosen, rejected = (_side(fields, name) for name in ("chosen", "rejected"))
    if chosen[0].role == "assistant" == rejected[0].role:
        prompt = prompt_column(fields)
    else:
        prompt, chosen, rejected = _shared_prompt(chosen, rejected)
        _check_stated_prompt(fields, prompt)
        prompt = with_system(fields, prompt)
    check_order(prompt, "prompt", ends_with=ASKED_BY)
    check_order(prompt + chosen, "chosen", ends_with=ANSWERED_BY)
    check_order(prompt + rejected, "rejected", ends_with=ANSWERED_BY)
    margin, probability = number_column(fields, "margin"), number_column(fields, "probability")
    if probability is not None and not 0 < probability <= 1:
        raise RowError(f"'probability' must be above 0 and at most 1, not {probability}")
    return Preference(prompt, chosen, rejected, margin, probability, expected_column(fields))


def _side(fields: Fields, name: str) -> Messages:
    """One side of a pair: a reply alone, or a whole conversation."""
    _, value = one_of(fields, (name,))
    if is_transcript(value):
        return read_transcript(value, f"'{name}'")
    if isinstance(value, str):
        return (text_turn("assistant", value, f"'{name}'"),)
    return read_turns([value] if isinstance(value, Mapping) else value, name)


def _shared_prompt(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """Two whole conversations as (what they share, the rest of chosen, the rest of rejected)."""
    most = min(len(chosen), len(rejected)) - 1
    shared = next((n for n in range(most) if chosen[n] != rejected[n]), most)
    while shared > 0 and not chosen[shared].role == "assistant" == rejected[shared].role:
        shared -= 1
    if shared <= 0:
        raise RowError("'chosen' and 'rejected' do not begin with the same prompt")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _check_stated_prompt(fields: Fields, prompt: Messages) -> None:
    """A prompt column beside whole conversations must not say something else."""
    name = next((name for name in PROMPT_COLUMNS if name in fields), None)
    if name is None:
        return
    value = fields[name]
    stated = [value] if isinstance(value, str) else [turn.content for turn in read_turns(value, name)]
    found = [turn.content for turn in prompt]
    if not all(any(text.strip() == other.strip() for other in found) for text in stated):
        raise RowError(f"'{name}' differs from the turns that 'chosen' and 'rejected' share")


def _rated(fields: Fields) -> Rated:
    prompt = prompt_column(fields)
    reply = reply_column(fields, prompt)
    check_order(prompt + reply, "messages", ends_with=ANSWERED_BY)
    _, label = one_of(fields, ("label",))
    if not _is_label(label):
        raise RowError(
            f"'label' must be true or false, not {shown(label)} (known: true, false, 1, 0); a label that is no verdict on "
            "the answer is passed over with `format: prompt_completion`"
        )
    return Rated(prompt, reply, LABELS[label], expected_column(fields))


def _prompt(fields: Fields) -> Prompt:
    turns = _asked(fields)
    while turns and turns[-1].role == "assistant":  # a conversation serves as the prompt of its last answer
        turns = turns[:-1]
    check_order(turns, "prompt", ends_with=ASKED_BY)
    return Prompt(turns, expected_column(fields))


def _asked(fields: Fields) -> Messages:
    """The prompt in a row of any format, where the row has one, else its conversation."""
    if "chosen" in fields and "rejected" in fields:
        return _preference(fields).prompt
    if any(name in fields for name in PROMPT_COLUMNS):
        turns = prompt_column(fields)
        system = int(turns[0].role == "system")
        return (*turns[:system], *_history(fields), *turns[system:]) if "instruction" in fields else turns
    if _is_hh(fields):
        return read_transcript(fields["text"], "'text'")
    return with_system(fields, turns_column(fields))


def _transcript(fields: Fields) -> Conversation | Preference:
    if "chosen" in fields or "rejected" in fields:
        return _preference(fields)
    return _answered(fields, read_transcript(one_of(fields, ("text",))[1], "'text'"))


def _document(fields: Fields) -> Document:
    return Document(filled_text(one_of(fields, ("text",))[1], "'text'"))


# Which format --------------------------------------------------------------------------------------------------------


def _has(fields: Fields, *groups: Sequence[str]) -> bool:
    return all(any(name in fields for name in names) for names in groups)


def _is_label(value: object) -> bool:
    return isinstance(value, bool | int | float | str) and value in LABELS


def _is_hh(fields: Fields) -> bool:
    return is_transcript(fields.get("chosen", fields.get("text")))


def _ends_asking(fields: Fields) -> bool:
    """Whether a row of messages waits for an answer."""
    turns = next((fields[name] for name in TURNS_COLUMNS if name in fields), None)
    last = turns[-1] if isinstance(turns, list) and turns else None
    return isinstance(last, Mapping) and (last.get("role") or last.get("from")) in ("user", "human")


FORMATS: dict[str, RowFormat] = {  # the most demanding first
    "hh": RowFormat("chosen and rejected as Human/Assistant transcripts", _is_hh, _transcript, bad_share=0.05),
    "preferences": RowFormat(
        "prompt, chosen, rejected", lambda row: _has(row, ("chosen", "rejected")), _preference
    ),
    "messages": RowFormat("messages", lambda row: "messages" in row and not _ends_asking(row), _conversation),
    "sharegpt": RowFormat(
        "conversations", lambda row: _has(row, TURNS_COLUMNS[1:]) and not _ends_asking(row), _conversation
    ),
    "alpaca": RowFormat("instruction, input, output", lambda row: _has(row, ("instruction",), ("output",)), _alpaca),
    "rated": RowFormat(
        "prompt, completion, label",
        lambda row: _has(row, PROMPT_COLUMNS, REPLY_COLUMNS) and row.get("label") is not None,
        _rated,
    ),
    "prompt_completion": RowFormat(
        "prompt and completion, or question and answer",
        lambda row: _has(row, PROMPT_COLUMNS, REPLY_COLUMNS),
        _prompt_completion,
    ),
    "prompts": RowFormat("prompt", lambda row: _has(row, PROMPT_COLUMNS) or _ends_asking(row), _prompt),
    "text": RowFormat("text", lambda row: "text" in row, _document),
}  # fmt: skip
