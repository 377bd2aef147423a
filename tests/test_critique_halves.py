"""Critique and revision, comparison, and the data that they make, worked out by hand with scripted critics."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.critique.comparing import compare
from align.critique.critics import Contest, TextCritic
from align.critique.panel import panel_probabilities
from align.critique.results import counts, critic_metrics, data_sets, judge_metrics, samples
from align.critique.revising import revise
from align.critique.rows import FAULTS, Comparison, Row, Step
from align.data.examples import Conversation, Message, Preference
from align.judge import Judge
from tests.critique_kit import JUDGE, PRINCIPLES, Scripted, constitution, mending, said

RULES = constitution()
CALM = RULES.principles[0]
FIRST = 0.7  # chance of the first option, of a critic that likes the letter A


def row(index: int = 0, *answers: str) -> Row:
    return Row(index, said(f"q{index}"), list(answers) or [f"a{index}"])


def critic(writer: Any) -> TextCritic:
    return TextCritic(writer, RULES, 8)


def revised(one: Row, writer: Scripted, *, rounds: int = 1, check: bool = False, seed: int = 0) -> Row:
    revise([one], critic(writer), RULES, rounds=rounds, seed=seed, check=check)
    return one


def better(text: str) -> str:
    """A critic's chance for a contest: it always knows the revision from the answer."""
    return text.split("|")[1].removeprefix("A:")


# Revision ------------------------------------------------------------------------------------------------------------


def test_every_step_is_kept_and_the_next_round_looks_at_the_last_revision() -> None:
    replies = {3: lambda p: f"bad {p[1]}", 4: lambda p: f"{p[1]}+"}
    writer = Scripted(lambda text: replies[len(text.split("|"))](text.split("|")))
    found = revised(row(), writer, rounds=3)
    assert [(step.critique, step.revision, step.fault) for step in found.steps] == [
        ("bad a0", "a0+", ""), ("bad a0+", "a0++", ""), ("bad a0++", "a0+++", ""),
    ]  # fmt: skip
    assert (found.final, found.fault, found.answers) == ("a0+++", "", ["a0"])
    assert sorted(step.principle for step in found.steps) == sorted(PRINCIPLES)


def test_principles_are_drawn_by_seed_and_row_by_weight_and_without_repeats() -> None:
    def drawn(seed: int, rounds: int, indices: range) -> list[tuple[str, ...]]:
        rows = [row(index) for index in indices]
        revise(rows, critic(Scripted(mending)), RULES, rounds=rounds, seed=seed, check=False)
        return [tuple(step.principle for step in one.steps) for one in rows]

    assert drawn(0, 3, range(40)) == drawn(0, 3, range(40))
    assert drawn(0, 3, range(10, 40)) == drawn(0, 3, range(40))[10:]
    assert drawn(0, 3, range(40)) != drawn(1, 3, range(40))
    assert all(len(set(one)) == 3 for one in drawn(0, 9, range(40)))
    share = Counter(one[0] for one in drawn(5, 1, range(800)))
    assert share["calm"] / 800 == pytest.approx(0.5, abs=0.06)
    assert share["brief"] / 800 == pytest.approx(0.25, abs=0.06)


@pytest.mark.parametrize(
    ("critique", "revision", "cut", "fault", "steps"),
    [
        ("No.", None, False, "nothing_found", 1),
        ("", None, False, "nothing_found", 1),
        ("bad", "  ", False, "empty", 1),
        ("bad", "better", True, "cut", 1),
        ("bad", "Critique: better", False, "leaked", 1),
        ("bad", " Q0 ", False, "repeated", 1),
        ("bad", "A0", False, "unchanged", 1),
        (None, None, False, "too_long", 0),
        ("bad", None, False, "too_long", 0),
        ("bad", "better", False, "", 1),
    ],
)
def test_each_fault_keeps_the_answer(
    critique: str | None, revision: str | None, cut: bool, fault: str, steps: int
) -> None:
    writer = Scripted(lambda text: critique if text.count("|") == 2 else revision, cut=(revision or "",) if cut else ())
    found = revised(row(), writer)
    assert (found.fault, len(found.steps)) == (fault, steps)
    assert fault in (*FAULTS, "")
    assert found.final == ("a0" if fault else "better")


def test_a_round_without_a_fault_does_not_undo_an_earlier_revision() -> None:
    order = [step.principle for step in revised(row(), Scripted(mending), rounds=2).steps]
    writer = Scripted(lambda text: "No." if text == f"q0|q0 better {order[0]}er|{order[1]}?" else mending(text))
    found = revised(row(), writer, rounds=2)
    assert (found.fault, found.final) == ("", f"q0 better {order[0]}er")
    assert [step.revision for step in found.steps] == [found.final, None]


def test_answers_that_are_not_whole_are_not_criticised() -> None:
    one, writer = row(), Scripted()
    one.fault = "unfinished"
    assert revised(one, writer).steps == writer.asked == []


@pytest.mark.parametrize(
    ("liked_first", "liked_second", "preferred", "fault"),
    [
        (0.9, 0.2, 0.85, ""),  # the revision stands first, then second: (0.9 + 1 - 0.2) / 2
        (0.6, 0.9, 0.35, "worse"),
        (0.7, 0.7, 0.5, ""),
        (None, 0.1, None, ""),
    ],
)
def test_the_check_averages_both_orders(
    liked_first: float | None, liked_second: float | None, preferred: float | None, fault: str
) -> None:
    writer = Scripted(mending, lambda text: liked_first if "A:q0 better" in text else liked_second)
    found = revised(row(), writer, check=True)
    assert found.preferred == (None if preferred is None else pytest.approx(preferred))
    assert found.fault == fault


def test_the_check_asks_under_the_principles_of_the_revisions_that_were_taken() -> None:
    writer = Scripted(lambda text: "" if text.endswith("plainer") else mending(text))
    found = revised(row(), writer, rounds=3, check=True)
    asked = [text.rsplit("|", 1)[1] for text in writer.asked if "|A:" in text]
    assert sorted(asked) == ["which is brief", "which is brief", "which is calm", "which is calm"]
    assert found.preferred == 0.5  # of a critic that always says A


# Comparison ----------------------------------------------------------------------------------------------------------


def compared(one: Row, writer: Scripted, *, panel: int = 1, most: float = 0.95) -> list[Comparison]:
    compare([one], critic(writer), RULES, panel=panel, most_confident=most, seed=0)
    return one.comparisons


@given(chance=st.floats(min_value=0, max_value=1))
def test_a_critic_that_always_says_a_comes_out_at_exactly_a_half(chance: float) -> None:
    contests = [[Contest(said("q"), "x", "y", principle) for principle in RULES.principles]]
    assert panel_probabilities(contests, critic(Scripted(chance=lambda _: chance))) == [0.5]


def test_each_pair_of_different_whole_answers_is_compared_once() -> None:
    found = compared(row(0, "x", "", "x", "y", "z"), Scripted())
    assert [(one.first, one.second) for one in found] == [(0, 3), (0, 4), (2, 3), (2, 4), (3, 4)]


def test_probabilities_are_averaged_over_orders_and_panel() -> None:
    table = {
        ("x", "which is calm"): 0.9, ("y", "which is calm"): 0.3,  # 0.8
        ("x", "which is plain"): 0.6, ("y", "which is plain"): 0.8,  # 0.4
        ("x", "which is brief"): 0.5, ("y", "which is brief"): 0.2,  # 0.65
    }  # fmt: skip
    writer = Scripted(chance=lambda text: table[better(text), text.rsplit("|", 1)[1]])
    (found,) = compared(row(0, "x", "y"), writer, panel=3)
    assert found.probability == pytest.approx((0.8 + 0.4 + 0.65) / 3)
    assert sorted(found.principles) == sorted(PRINCIPLES)


def test_a_principle_that_cannot_be_asked_in_both_orders_is_left_out_of_the_panel() -> None:
    table = {("x", "which is calm"): 0.9, ("y", "which is calm"): 0.3, ("x", "which is plain"): None}
    writer = Scripted(chance=lambda text: table.get((better(text), text.rsplit("|", 1)[1]), 0.8))
    (found,) = compared(row(0, "x", "y"), writer, panel=3)
    assert found.probability == pytest.approx((0.8 + 0.5) / 2)
    (unknown,) = compared(row(0, "x", "y"), Scripted(chance=lambda _: None), panel=2)
    assert unknown.probability is None


@pytest.mark.parametrize(("most", "bounded"), [(0.95, 0.95), (0.6, 0.6), (1.0, 1.0)])
def test_probabilities_are_kept_within_the_bounds(most: float, bounded: float) -> None:
    sure = Scripted(chance=lambda text: float(better(text) == "x"))
    ((up,), (down,)) = (compared(row(0, *pair), sure, most=most) for pair in (("x", "y"), ("y", "x")))
    assert up.probability == bounded
    assert down.probability == pytest.approx(1 - bounded)


# Results -------------------------------------------------------------------------------------------------------------


def finished_rows() -> list[Row]:
    """A revised row with comparisons, a faultless one, a worse one, and one whose prompt is too long."""
    good = Row(0, said("q0"), ["x", "y", "z"], {"answer": "7"}, [Step("calm", "bad", "better")], "better", "", 0.8)
    good.comparisons = [
        Comparison(0, 1, 0.25, ("calm",)), Comparison(0, 2, 0.5, ("calm",)), Comparison(1, 2, None, ("calm",)),
        Comparison(2, 1, 0.9, ("calm",)),
    ]  # fmt: skip
    faultless = Row(1, said("q1"), ["fine"], None, [Step("plain", "No.")], "fine", "nothing_found")
    worse = Row(2, said("q2"), ["ok"], None, [Step("calm", "bad", "bad words")], "bad words", "worse", 0.1)
    return [good, faultless, worse, Row(3, said("q3"), [""], fault="too_long")]


def test_revisions_over_answers_and_soft_comparisons_become_preferences() -> None:
    made = data_sets(finished_rows(), [], keep_faultless=False, revises=True)["preferences"]

    def pair(chosen: str, rejected: str, chance: float | None = None) -> Preference:
        answers = [(Message("assistant", text),) for text in (chosen, rejected)]
        return Preference(said("q0"), *answers, probability=chance, expected={"answer": "7"})

    assert made.train == [pair("better", "x"), pair("y", "x", 0.75), pair("z", "y", 0.9)]
    assert (made.kind, made.report.train_rows, made.test) == ("preference", 3, [])


@pytest.mark.parametrize(("keep", "expected"), [(False, ["better"]), (True, ["better", "fine"])])
def test_last_revisions_become_demonstrations_and_faultless_answers_if_they_are_kept(
    keep: bool, expected: list[str]
) -> None:
    made = data_sets(finished_rows()[:1], finished_rows(), keep_faultless=keep, revises=True)["sft"]
    found = [example for example in made.test if isinstance(example, Conversation)]
    assert [example.messages[-1].content for example in found] == expected
    assert found[0].expected == {"answer": "7"}
    assert found[0].messages[:-1] == said("q0")
    assert len(made.train) == 1


def test_without_revisions_there_are_comparisons_only() -> None:
    made = data_sets(finished_rows(), [], keep_faultless=False, revises=False)
    assert made["sft"].train == []
    assert len(made["preferences"].train) == 2


def test_the_counts_say_what_became_of_the_rows() -> None:
    assert counts(finished_rows(), RULES) == {
        "prompts": 4, "revised": 1, "apart": {"too_long": 1, "nothing_found": 1, "worse": 1},
        "principles": {"calm": {"asked": 2, "found": 2, "revised": 2}, "plain": {"asked": 1, "found": 0, "revised": 0}},
        "comparisons": 4, "undecided": 2,
    }  # fmt: skip


def test_held_out_numbers_of_the_critic_are_hand_worked() -> None:
    found = critic_metrics(finished_rows())
    values = {name: value["value"] if isinstance(value, dict) else value for name, value in found.items()}
    assert values["before.critic.violation_rate"] == pytest.approx(2 / 3)
    assert values["after.critic.preferred"] == 0.5
    assert values["before.words"] == values["after.words"] == 1
    assert critic_metrics([]) == {}


def test_a_judge_measures_the_critic_and_the_revisions(tmp_path: Path) -> None:
    (tmp_path / "judge.yaml").write_text(JUDGE)  # calm: no a; plain: no b; brief: no c
    judge = Judge.load(tmp_path / "judge.yaml")
    rows = [
        Row(0, said("q"), ["a"], None, [Step("calm", "bad", "ok"), Step("plain", "bad", "oh")], "oh"),
        Row(1, said("q"), ["b"], None, [Step("plain", "No.")], "b", "nothing_found"),
        Row(2, said("q"), ["ok"], None, [Step("brief", "No.")], "ok", "nothing_found"),
    ]
    found = {name: value["value"] for name, value in judge_metrics(rows, judge).items() if isinstance(value, dict)}
    assert found["before.judge.violation_rate"] == pytest.approx(2 / 3)
    assert found["after.judge.violation_rate"] == pytest.approx(1 / 3)
    assert found["before.critic.precision"] == 0.5  # of calm and plain in row 0 only calm was broken
    assert found["before.critic.recall"] == 0.5  # plain in row 1 was not seen
    assert found["before.critic.accuracy"] == 0.5
    shown = samples(rows, judge, 2)
    assert [(one["answer"], one["final"], len(one["steps"])) for one in shown] == [("a", "oh", 2)]
    assert shown[0]["before_verdict"]["violations"] == ("calm",)
