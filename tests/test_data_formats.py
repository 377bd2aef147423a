"""Formats: each is recognised, becomes the right example, and every kind of bad row is refused with its reason."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest

from align.data.examples import Conversation, Document, Example, Message, Preference, Prompt, Rated, example_from_row
from align.data.formats import FORMATS, detect, read_row, renamed
from align.data.inspection import inspect
from align.data.problems import RowError
from align.data.reading import Reading, source_of
from align.errors import AlignError
from align.recipe.settings import DataSettings, Format

USER = Message("user", "Who?")
ANSWER = Message("assistant", "Me.")
OTHER = Message("assistant", "You.")
TURNS = [USER.row(), ANSWER.row()]
HH = "\n\nHuman: Who?\n\nAssistant: "
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}

CASES: list[tuple[str, dict[str, Any], Any]] = [
    ("messages", {"messages": TURNS, "id": 3}, Conversation((USER, ANSWER))),
    (
        "messages",
        {"messages": [{"role": "system", "content": ""}, *TURNS], "tools": [], "expected": {"answer": "me"}},
        Conversation((Message("system", ""), USER, ANSWER), (), {"answer": "me"}),
    ),
    (
        "messages",
        {"messages": [USER.row(), CALL, {"role": "tool", "content": "1", "name": "f"}, ANSWER.row()], "tools": [{"name": "f"}]},
        Conversation(
            (USER, Message("assistant", "", {"tool_calls": CALL["tool_calls"]}), Message("tool", "1", {"name": "f"}), ANSWER),
            ({"name": "f"},),
        ),
    ),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Who?"}], "name": None}, ANSWER.row()]},
        Conversation((USER, ANSWER)),
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}], "system": "Be brief."},
        Conversation((Message("system", "Be brief."), USER, ANSWER)),
    ),
    (
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "Who?"}, {"from": "function_call", "value": "{}"},
                {"from": "observation", "value": "1"}, {"from": "gpt", "value": "Me."},
            ],
            "tools": '[{"name": "f"}]',
        },
        Conversation((USER, Message("assistant", "{}"), Message("tool", "1"), ANSWER), ({"name": "f"},)),
    ),
    ("alpaca", {"instruction": "Who?", "input": "", "output": "Me."}, Conversation((USER, ANSWER))),
    (
        "alpaca",
        {"instruction": "Add.", "input": "1 2", "output": "3", "system": "S", "history": [["Who?", "Me."]]},
        Conversation((Message("system", "S"), USER, ANSWER, Message("user", "Add.\n1 2"), Message("assistant", "3"))),
    ),
    ("prompt_completion", {"prompt": "Who?", "completion": "Me."}, Conversation((USER, ANSWER))),
    ("prompt_completion", {"question": "Who?", "answer": "Me."}, Conversation((USER, ANSWER))),
    ("prompt_completion", {"prompt": [USER.row()], "completion": [ANSWER.row()]}, Conversation((USER, ANSWER))),
    ("preferences", {"prompt": "Who?", "chosen": "Me.", "rejected": "You."}, Preference((USER,), (ANSWER,), (OTHER,))),
    (
        "preferences",
        {"prompt": [USER.row()], "chosen": [ANSWER.row()], "rejected": [OTHER.row()], "margin": 2, "probability": 0.75},
        Preference((USER,), (ANSWER,), (OTHER,), 2.0, 0.75),
    ),
    (
        "preferences",  # as UltraFeedback: whole conversations beside the prompt's text
        {"prompt": "Who?", "chosen": TURNS, "rejected": [USER.row(), OTHER.row()], "messages": TURNS},
        Preference((USER,), (ANSWER,), (OTHER,)),
    ),
    (
        "preferences",  # the turns after the shared ones differ, the user's too
        {"chosen": [*TURNS, {"role": "user", "content": "a"}, ANSWER.row()],
         "rejected": [*TURNS, {"role": "user", "content": "b"}, OTHER.row()]},
        Preference((USER,), (ANSWER, Message("user", "a"), ANSWER), (ANSWER, Message("user", "b"), OTHER)),
    ),
    (
        "preferences",  # ShareGPT pairs
        {"conversations": [{"from": "human", "value": "Who?"}], "chosen": {"from": "gpt", "value": "Me."},
         "rejected": {"from": "gpt", "value": "You."}},
        Preference((USER,), (ANSWER,), (OTHER,)),
    ),
    ("preferences", {"chosen": TURNS, "rejected": TURNS}, Preference((USER,), (ANSWER,), (ANSWER,))),
    ("rated", {"prompt": "Who?", "completion": "Me.", "label": False}, Rated((USER,), (ANSWER,), False)),
    ("rated", {"prompt": "Who?", "completion": [*TURNS], "label": 1}, Rated((USER,), (ANSWER,), True)),
    ("rated", {"prompt": "Who?", "completion": "Me.", "label": 1.0}, Rated((USER,), (ANSWER,), True)),
    ("rated", {"prompt": "Who?", "completion": "Me.", "label": 0.0}, Rated((USER,), (ANSWER,), False)),
    ("rated", {"prompt": "Who?", "completion": "Me.", "label": "0.0"}, Rated((USER,), (ANSWER,), False)),  # CSV
    ("hh", {"chosen": HH + "Me.", "rejected": HH + "You."}, Preference((USER,), (ANSWER,), (OTHER,))),
    ("hh", {"text": HH + "Me."}, Conversation((USER, ANSWER))),
    ("prompts", {"prompt": "Who?", "label": "safe", "id": "1"}, Prompt((USER,))),
    ("prompts", {"prompt": HH, "expected": '{"refuse": true}'}, Prompt((USER,), {"refuse": True})),
    ("prompts", {"messages": [*TURNS, USER.row()]}, Prompt((USER, ANSWER, USER))),
    ("text", {"text": " Once. "}, Document(" Once. ")),
]  # fmt: skip


@pytest.mark.parametrize(("form", "fields", "example"), CASES)
def test_a_row_is_recognised_and_becomes_the_right_example(form: str, fields: dict[str, Any], example: Any) -> None:
    assert detect([fields]) == form
    assert read_row(form, fields) == example


@pytest.mark.parametrize("example", [case[2] for case in CASES])
def test_an_example_is_the_same_after_its_canonical_row(example: Any) -> None:
    assert example_from_row(example.row()) == example


def test_every_format_of_the_recipe_exists_and_has_a_case() -> None:
    assert {"auto", *FORMATS} == set(get_args(Format))
    assert {case[0] for case in CASES} == set(FORMATS)


def turns(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": "x"} for role in roles]


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("messages", {"conversation": []}, "conversation is empty"),
    ("messages", {"message": TURNS}, "no 'messages' (the row has: message)"),
    ("messages", {"messages": None}, "no 'messages'"),
    ("messages", {"messages": "hello"}, "messages must be a list of messages, not 'hello'"),
    ("messages", {"messages": ["hello"]}, "messages[0] must be a message with role and content"),
    ("messages", {"messages": [{"content": "a"}]}, "messages[0] has no role"),
    ("messages", {"messages": [USER.row(), {"role": "asistant", "content": "a"}]}, "Did you mean 'assistant'?"),
    ("messages", {"messages": [USER.row(), {"role": "assistant"}]}, "messages[1].content is missing"),
    ("messages", {"messages": [USER.row(), {"role": "assistant", "content": " \n"}]}, "messages[1].content is empty"),
    ("messages", {"messages": [USER.row(), {"role": "assistant", "content": 5}]}, "must be text, not 5"),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "only parts of text"),
    ("messages", {"messages": turns("user")}, "the last turn is of user, not of assistant"),
    ("messages", {"messages": turns("assistant")}, "a turn of assistant at the start"),
    ("messages", {"messages": turns("user", "user", "assistant")}, "messages[1]: a turn of user after user"),
    ("messages", {"messages": turns("user", "assistant", "assistant")}, "messages[2]: a turn of assistant after"),
    ("messages", {"messages": turns("user", "system", "assistant")}, "a turn of system after user"),
    ("messages", {"messages": turns("user", "tool", "assistant")}, "a turn of tool after user"),
    ("messages", {"messages": turns("user", "assistant", "tool")}, "the last turn is of tool"),
    ("messages", {"messages": TURNS, "expected": '{"me"'}, "'expected' must be JSON"),
    ("messages", {"messages": TURNS, "expected": [1]}, "'expected' must be an object, text or a number"),
    ("messages", {"messages": TURNS, "tools": {"name": "f"}}, "'tools' must be a list of objects"),
    ("messages", {"messages": turns("system", "user", "assistant"), "system": "S"}, "a system turn stands both"),
    ("alpaca", {"instruction": "a", "output": ""}, "'output' is empty"),
    ("alpaca", {"instruction": None, "output": "a"}, "'instruction' is missing"),
    ("alpaca", {"instruction": "a", "output": "b", "history": [["q"]]}, "history[0] must be [question, answer]"),
    ("prompt_completion", {"prompt": "a"}, "no 'completion' (the row has: prompt)"),
    ("prompt_completion", {"prompt": "a", "completion": None}, "no 'completion'"),
    ("prompt_completion", {"prompt": "a", "completion": "  "}, "'completion' is empty"),
    ("prompt_completion", {"prompt": "a", "completion": {"text": "b"}}, "completion[0] has no role"),
    ("prompt_completion", {"prompt": 1, "completion": "b"}, "'prompt' must be text, not 1"),
    ("preferences", {"prompt": "a", "chosen": "b"}, "no 'rejected'"),
    ("preferences", {"chosen": "b", "rejected": "c"}, "no 'prompt'"),
    ("preferences", {"prompt": "a", "chosen": "b", "rejected": ""}, "'rejected' is empty"),
    ("preferences", {"chosen": TURNS, "rejected": turns("user", "assistant")}, "do not begin with the same prompt"),
    ("preferences", {"prompt": "What?", "chosen": TURNS, "rejected": TURNS}, "'prompt' differs from the turns"),
    ("preferences", {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "big"}, "'margin' must be a number"),
    ("preferences", {"prompt": "a", "chosen": "b", "rejected": "c", "margin": float("inf")}, "'margin' must be a"),
    ("preferences", {"prompt": "a", "chosen": "b", "rejected": "c", "probability": 0}, "must be above 0"),
    ("rated", {"prompt": "a", "completion": "b", "label": "good"}, "'label' must be true or false, not 'good'"),
    ("rated", {"prompt": "a", "completion": "b", "label": 0.5}, "'label' must be true or false, not 0.5"),
    ("rated", {"prompt": "a", "completion": "b", "label": float("nan")}, "'label' must be true or false, not nan"),
    ("rated", {"prompt": "a", "completion": "b"}, "no 'label'"),
    ("hh", {"chosen": HH + "a", "rejected": "Bot: no"}, "do not begin with the same prompt"),
    ("hh", {"chosen": HH, "rejected": HH + "a"}, "'chosen': turn 2 (Assistant) is empty"),
    ("prompts", {"prompt": ""}, "'prompt' is empty"),
    ("text", {"text": 5}, "'text' must be text, not 5"),
    ("text", {"story": "a"}, "no 'text' (the row has: story)"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "fields", "words"), BAD)
def test_a_bad_row_is_refused_with_its_reason(form: str, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(RowError) as error:
        read_row(form, fields)
    assert words in str(error.value)


def test_rows_without_an_answer_do_not_mislead_the_detection() -> None:
    assert detect([{"prompt": "a"}, {"prompt": "a", "completion": "b"}]) == "prompt_completion"
    assert detect([{"prompt": "a", "completion": None}]) == "prompt_completion"
    rated = {"prompt": "a", "completion": "b", "label": True}
    assert detect([rated, {"prompt": "a", "completion": "b"}, rated]) == "rated"
    pair = {"prompt": "a", "messages": TURNS, "chosen": TURNS, "rejected": TURNS}
    assert detect([pair, pair, {"messages": TURNS}]) == "preferences"
    assert detect([*[{"prompt": "a"}] * 5, {"prompt": "a", "completion": "b"}]) == "prompt_completion"
    assert detect([{"messages": TURNS[:1]}, {"messages": TURNS}]) == "messages"


def test_rows_that_no_format_fits_are_refused_with_their_columns_and_the_known_ones() -> None:
    with pytest.raises(AlignError, match="their columns are: reply, story") as error:
        detect([{"story": "a"}, {"reply": "b"}])
    assert "columns:" in error.value.hint
    assert "chosen" in error.value.hint


def test_columns_are_renamed_also_crosswise_and_a_missing_one_is_named() -> None:
    assert renamed({"a": 1, "b": 2, "c": 3}, {"a": "b", "b": "a"}) == {"a": 2, "b": 1, "c": 3}
    assert renamed({"a": 1, "prompt": 2}, {"a": "prompt"}) == {"prompt": 1}
    with pytest.raises(RowError, match=r"no column 'qestion'.* Did you mean 'question'\?"):
        renamed({"question": 1}, {"qestion": "prompt"})


REAL = [
    ("instruct/instructions.jsonl", "messages", "conversation", 1100, 0),
    ("instruct/chats.jsonl", "messages", "conversation", 161, 0),
    ("instruct/alpaca_identity.json", "alpaca", "conversation", 91, 0),
    ("preference/hh_harmless_1300.jsonl.gz", "hh", "preference", 1300, 7),
    ("preference/tone.jsonl", "preferences", "preference", 1094, 0),
    ("text/stories_train.jsonl", "text", "text", 1000, 0),
    ("text/stories_instruct_valid.jsonl", "text", "text", 68, 0),
    ("eval/gsm8k_300.jsonl", "prompt_completion", "conversation", 300, 0),
    ("eval/xstest_prompts.csv", "prompts", "prompt", 450, 0),
]


def rows_of(folder: Path, file: str) -> list[Example]:
    settings = DataSettings(path=file)
    return list(Reading(source_of(settings, folder), settings).examples())


@pytest.mark.parametrize(("file", "form", "kind", "rows", "bad"), REAL)
def test_real_files_are_read_as_what_they_are(
    shared: Path, file: str, form: str, kind: str, rows: int, bad: int
) -> None:
    report, examples = inspect(DataSettings(path=file), shared / "data"), rows_of(shared / "data", file)
    assert (report.format, report.kinds, report.rows, len(report.bad_rows)) == (form, (kind,), rows, bad)
    assert report.usable
    assert len(examples) == rows - bad
    assert all(example_from_row(example.row()) == example for example in examples)


def test_real_transcripts_keep_every_turn(shared: Path) -> None:
    examples = rows_of(shared / "data", "preference/hh_harmless_1300.jsonl.gz")
    first = examples[0]
    assert isinstance(first, Preference)
    assert [turn.role for turn in first.prompt] == ["user", "assistant"] * 2 + ["user"]
    assert first.prompt[0].content == "what are some pranks with a pen i can do?"
    assert Counter(len(e.chosen) for e in examples if isinstance(e, Preference)).most_common(1)[0][0] == 1
