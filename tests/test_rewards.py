"""Rewards that need no model: each by hand, their sum, and every way in which one can be wrong."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from align.data.examples import Message, Prompt
from align.errors import AlignError
from align.judge import AnswerRules, Judge, JudgeRules, Principle
from align.progress import Progress
from align.recipe.ppo_settings import Reward as Term
from align.rewards.response import Response
from align.rewards.total import Rewards, build_rewards
from align.rewards.verifiable import AnswerMatch

JUDGE = Judge(
    JudgeRules(
        answer=AnswerRules(compare="contains"), principles=[Principle(id="kind", weight=0.5, forbid=[r"\bfool\b"])]
    )
)
QUESTION = (Message("system", "Be brief."), Message("user", "How many crates?"))


def response(text: str, expected: Mapping[str, Any] | None = None, tokens: int = 4) -> Response:
    return Response(QUESTION, text, tokens, True, expected)


def rewards(*terms: Mapping[str, Any], judges: Mapping[str | None, Judge] | None = None) -> Rewards:
    parsed = [TypeAdapter(Term).validate_python(dict(term)) for term in terms]
    return build_rewards(parsed, models={}, judges={None: JUDGE} if judges is None else judges)


def given_by(term: Mapping[str, Any], responses: Sequence[Response]) -> list[float]:
    return rewards(term).score(responses).totals


# Each reward ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer", "reward"),
    [
        (" six  CRATES ", "Six crates", 1),
        ("six crates of figs", "six crates", 0),
        ("72", 72, 1),
        ("two", ["one", "two"], 1),
        ("three", ["one", "two"], 0),
        ("", "six", 0),
        ("", ["", "six"], 0),
    ],
)
def test_exact_match_ignores_case_and_spacing_alone(text, answer, reward):
    assert given_by({"kind": "exact_match"}, [response(text, {"answer": answer})]) == [reward]


@pytest.mark.parametrize(
    ("text", "answer", "reward"),
    [
        ("48 + 24 = 72 clips.", "Half of 48 is 24.\n#### 72", 1),
        ("The answer is 1,234.", "1234", 1),
        ("The answer is 1234", "1,234", 1),
        ("I said 71, no, 72", 72, 1),
        ("I said 72, no, 71", 72, 0),
        ("#### 72 (in 3 days)", 72, 1),
        ("10-20", 20, 1),
        ("it was -3.50", -3.5, 1),
        ("3.5", -3.5, 0),
        (".5", 0.5, 1),
        ("7", 1e-7, 0),
        ("1,000,001", 1_000_000, 0),
        ("0.3", 0.1 + 0.2, 1),
        ("about 8", [7, "8"], 1),
        ("eight", 8, 0),
        ("9" * 400, 8, 0),
        ("", 0, 0),
    ],
)
def test_numeric_match_compares_last_numbers_as_for_gsm8k(text, answer, reward):
    assert given_by({"kind": "numeric_match"}, [response(text, {"answer": answer})]) == [reward]


@given(
    number=st.decimals(min_value=-(10**9), max_value=10**9, places=2) | st.integers(-(10**9), 10**9),
    before=st.sampled_from(["", "So ", "3 and 4 make ", "It costs $"]),
    after=st.sampled_from(["", ".", ", no more", " crates of figs!", "%", "\n"]),
    commas=st.booleans(),
)
def test_a_number_is_read_however_it_is_written(number, before, after, commas):
    match = AnswerMatch("numeric")
    said = f"{before}{number:,f}{after}" if commas else f"{before}{number:f}{after}"
    right = [str(number), float(number), f"{number:,f}", f"3 + 4\n#### {number}"]
    assert match([response(said, {"answer": answer}) for answer in right], Progress()) == [1.0] * len(right)
    wrong = [number + 1, -number if number else 5, number * 10 if number else 5]
    assert match([response(said, {"answer": str(answer)}) for answer in wrong], Progress()) == [0.0] * len(wrong)


def test_a_pattern_is_found_anywhere_and_in_nothing_never():
    texts = [response(text) for text in ("well, Yes.", "yes", "no", "")]
    assert given_by({"kind": "regex", "pattern": r"(?i)\byes\b"}, texts) == [1, 1, 0, 0]
    assert given_by({"kind": "regex", "pattern": r"\byes\b"}, texts) == [0, 1, 0, 0]


def test_length_is_best_at_its_target_and_never_below_minus_one():
    texts = [response("x", tokens=tokens) for tokens in (10, 5, 15, 0, 20, 90)]
    assert given_by({"kind": "length", "target_tokens": 10}, texts) == [0, -0.5, -0.5, -1, -1, -1]


def test_the_judges_score_is_the_reward():
    texts = ["It is 6.", "You fool, 6.", "It is 7.", ""]
    assert given_by({"kind": "judge"}, [response(text, {"answer": 6}) for text in texts]) == [1, 0.5, 0, 0]


def test_a_judge_of_its_own_file_is_asked():
    mild = Judge(JudgeRules())
    both = rewards({"kind": "judge"}, {"kind": "judge", "file": "mild.yaml"}, judges={None: JUDGE, "mild.yaml": mild})
    assert both.score([response("You fool.")]).parts == {"judge": [0.5], "judge-2": [1.0]}


# The sum -------------------------------------------------------------------------------------------------------------


def test_the_parts_are_added_by_weight_and_kept_without_it():
    scored = rewards(
        {"kind": "numeric_match", "weight": 2.0},
        {"kind": "regex", "pattern": "fool", "weight": -0.5},
        {"kind": "length", "target_tokens": 4},
    ).score([response("6", {"answer": 6}), response("fool, 6", {"answer": 6}, tokens=6), response("", {"answer": 6})])
    assert scored.parts == {"numeric_match": [1, 1, 0], "regex": [0, 1, 0], "length": [0, -0.5, 0]}
    assert scored.totals == [2.0, 1.0, 0.0]


def test_every_part_has_a_name_of_its_own():
    patterns = [{"kind": "regex", "pattern": letter} for letter in "abc"]
    found = rewards(*patterns, {"kind": "exact_match"}).score([response("b", {"answer": "c"})])
    assert found.parts == {"regex": [0], "regex-2": [1], "regex-3": [0], "exact_match": [0]}


def test_no_responses_and_no_rewards_give_nothing():
    assert rewards({"kind": "judge"}).score([]).totals == []
    assert rewards().score([response("a"), response("b")]).totals == [0, 0]


# What is wrong with data, judge and sums -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "expected", "message"),
    [
        ("numeric_match", None, "prompt 2 has no expected.answer"),
        ("exact_match", {"refuse": True}, "prompt 2 has no expected.answer"),
        ("exact_match", {"answer": []}, "prompt 2 has no expected.answer"),
        ("numeric_match", {"answer": "six"}, "prompt 2 has expected.answer 'six', without a number"),
        ("exact_match", {"answer": " . "}, "prompt 2 has expected.answer ' . ', without a word"),
        ("exact_match", {"answer": True}, "prompt 2 has expected.answer true"),
        ("exact_match", {"answer": [{"text": "six"}]}, "prompt 2 has expected.answer"),
    ],
)
def test_a_prompt_without_a_right_answer_is_named_before_the_first_round(kind, expected, message):
    reward = rewards({"kind": "regex", "pattern": "x"}, {"kind": kind})
    reward.check([Prompt(QUESTION, {"answer": "6 crates"})] * 2)
    with pytest.raises(AlignError) as caught:
        reward.check([Prompt(QUESTION, {"answer": 6}), Prompt(QUESTION, expected)])
    assert caught.value.message.startswith(f"reward '{kind}': {message}")
    with pytest.raises(AlignError, match=f"reward '{kind}': the {message.replace('2', 'of response 2', 1)}"):
        reward.score([response("6", {"answer": 6}), response("6", expected)])


def test_a_judge_that_is_missing_is_asked_for():
    with pytest.raises(AlignError, match="reward 'judge': there is no judge") as caught:
        rewards({"kind": "judge"}, judges={})
    assert "evaluation" in caught.value.hint


def test_what_the_judge_cannot_read_is_refused_before_the_first_round():
    reward = rewards({"kind": "judge"})
    reward.check([Prompt(QUESTION), Prompt(QUESTION, {"answer": 6})])
    with pytest.raises(AlignError, match=r"reward 'judge': 'expected' of the prompt 'How many crates\?'"):
        reward.check([Prompt(QUESTION, {"answr": 6})])


def test_a_sum_that_is_too_large_is_refused(code):
    code.write_text("def large(prompts, responses, expected): return [1.0, 3e38]")
    with pytest.raises(AlignError, match=r"the sum of the rewards is 3e\+39 for response 2"):
        rewards({"kind": "function", "name": f"{code.stem}:large", "weight": 10.0}).score([response("a")] * 2)


# Functions -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A module in the working folder, yet to be written; its name is new, so that no import is remembered."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    return tmp_path / f"rewards_{abs(hash(request.node.nodeid))}.py"


def scored_by(code: Path, body: str, texts: Sequence[str] = ("a", "bb", "", "dddd")) -> list[float]:
    code.write_text(f"import numpy as np, torch\ndef f(prompts, responses, expected):\n    {body}\n")
    return given_by({"kind": "function", "name": f"{code.stem}:f"}, [response(text, {"n": 1}) for text in texts])


def test_a_function_gets_texts_and_what_the_data_say(code):
    code.write_text(
        "def f(prompts, responses, expected):\n"
        "    assert prompts == ['How many crates?'] * 2 and responses == ['a', '']\n"
        "    assert expected == [{'answer': [6]}, None]\n"
        "    expected[0]['answer'].append(7)\n"
        "    return [0.25, True]\n"
    )
    right = {"answer": [6]}
    function = {"kind": "function", "name": f"{code.stem}:f"}
    scored = rewards(function, {"kind": "judge"}).score([response("a", right), response("")])
    assert scored.parts["function"] == [0.25, 1.0]
    assert right == {"answer": [6]}


@pytest.mark.parametrize("body", ["return [{}]", "return ({})", "return np.array([{}])", "return torch.tensor([{}])"])
def test_lists_tuples_arrays_and_tensors_of_numbers_are_taken(code, body):
    assert scored_by(code, body.format("1.5, 2, 0, 4")) == [1.5, 2, 0, 4]


def test_numbers_of_numpy_in_a_list_are_taken(code):
    assert scored_by(code, "return [np.float32(len(r)) for r in responses]") == [1, 2, 0, 4]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0] * 3", "returned 3 values for 4 responses"),
        ("return [1.0, float('nan'), 0.0, 0.0]", "returned nan for response 2"),
        ("return [1.0, 0.0, -np.float64('inf'), 0.0]", "returned -inf for response 3"),
        ("return [1e39] * 4", r"returned 1e\+39 for response 1"),
        ("return [10**400] * 4", "returned 1000.* for response 1"),
        ("return [1.0, None, 0.0, 0.0]", "returned None for response 2"),
        ("return responses", "returned 'a' for response 1"),
        ("return [[1.0]] * 4", r"returned \[1.0\] for response 1"),
        ("return None", ": it returned a NoneType, not a list of numbers"),
        ("return 'good'", ": it returned a str, not a list of numbers"),
        ("return {r: 1.0 for r in responses}", ": it returned a dict, not a list of numbers"),
        ("return torch.tensor(1.0)", ": it returned a Tensor, not a list of numbers"),
        ("yield 1.0", ": it returned a generator, not a list of numbers"),
        ("raise ValueError('no figs')", ": it raised ValueError: no figs"),
        ("raise SystemExit(3)", ": it raised SystemExit: 3"),
        ("assert False", ": it raised AssertionError$"),
    ],
)
def test_a_function_that_gives_no_numbers_is_named_with_what_it_gave(code, body, message):
    with pytest.raises(AlignError) as caught:
        scored_by(code, body)
    label = f"reward 'function {code.stem}:f'"
    assert caught.value.message.startswith(label)
    assert caught.match("(?m)" + message)
    if "raised" in message:
        assert caught.value.hint == f"In {code}, line 3."


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("", "nowhere_at_all:f", "there is no module 'nowhere_at_all'"),
        ("", "nowhere_at_all.inside:f", "there is no module 'nowhere_at_all'"),
        ("import nowhere_else", "{}:f", "importing '{}' raised ModuleNotFoundError: No module named 'nowhere_else'"),
        ("def f(:", "{}:f", "importing '{}' raised SyntaxError"),
        ("1 / 0", "{}:f", "importing '{}' raised ZeroDivisionError: division by zero"),
        ("raise SystemExit", "{}:f", "importing '{}' raised SystemExit"),
        ("def brevity(a, b, c): pass", "{}:brevty", "module '{}' has no function 'brevty'\n  Did you mean 'brevity'"),
        ("f = 3", "{}:f", "module '{}' has no function 'f'"),
        ("def f(response): pass", "{}:f", "it takes (response), not (prompts, responses, expected)"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_before_any_response(code, text, name, message):
    code.write_text(text)
    name = name.format(code.stem)
    with pytest.raises(AlignError) as caught:
        rewards({"kind": "function", "name": name})
    assert str(caught.value).startswith(f"reward 'function {name}': {message.format(code.stem)}")


def test_errors_name_the_second_function_as_the_second(code):
    code.write_text("def f(prompts, responses, expected): return [1.0]\ndef g(*lists): return []\n")
    both = rewards(*({"kind": "function", "name": f"{code.stem}:{name}"} for name in "fg"))
    with pytest.raises(AlignError, match=f"reward 'function-2 {code.stem}:g' returned 0 values for 1 responses"):
        both.score([response("a")])


def test_nothing_to_score_asks_no_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function may divide by the number of responses."""
    found = rewards({"kind": "judge"}, {"kind": "length", "target_tokens": 4})
    monkeypatch.setattr("align.rewards.verifiable.Judged.__call__", lambda *_: 1 / 0)
    assert found.score([]).totals == []
    assert found.score([]).parts == {"judge": [], "length": []}
