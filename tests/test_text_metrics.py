"""Text metrics give the numbers that their papers' tools give, offline, through `evaluate`'s frame."""

from __future__ import annotations

import json

import evaluate
import pytest
import sacrebleu

from align.errors import AlignError
from align.evaluation.text_metrics import (
    METRICS,
    TextMetric,
    bleu,
    exact_match,
    final_number,
    numeric_match,
    text_numbers,
    token_f1,
)

SAID = ["The heron came to the pier at dawn.", "Six crates of figs", "nothing alike", "yes"]
RIGHT = ["The heron came to the pier at noon.", "six crates, of figs!", "quite other words", "no"]


def test_exact_match_ignores_case_punctuation_and_articles_only():
    assert exact_match("The  heron!", "heron") == 1
    assert exact_match("herons", "heron") == 0
    assert exact_match("", "") == 1


def test_f1_equals_the_worked_example():
    # said: heron came to pier at dawn (6 words), right: heron came to pier at noon; 5 shared: 2 * 5 / 12
    assert token_f1(SAID[0], RIGHT[0]) == pytest.approx(10 / 12)
    assert token_f1("", "word") == 0
    assert token_f1("the", "a") == 1


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7.\n#### 18", 18),
        ("#### -1,250.50", -1250.5),
        ("It costs $2,000.", 2000),
        ("first 3, then 4.5", 4.5),
        ("range 10-20", 20),
        ("it was -3", -3),
        (".5", 0.5),
        ("no number", None),
    ],
)
def test_the_final_number_is_found(text, number):
    assert final_number(text) == number


def test_numeric_match_needs_a_number_on_both_sides():
    assert numeric_match("She makes 18 dollars.", "9 * 2 = 18\n#### 18") == 1
    assert numeric_match("18.0", "#### 18") == 1
    assert numeric_match("none", "none") == 0


def test_bleu_equals_sacrebleu_on_the_corpus():
    estimate = bleu(SAID, RIGHT)
    assert estimate.value == pytest.approx(sacrebleu.corpus_bleu(SAID, [RIGHT]).score)
    assert estimate.low <= estimate.value <= estimate.high
    assert bleu(RIGHT, RIGHT).value == pytest.approx(100)


def test_rouge_equals_the_worked_example():
    numbers = text_numbers(["six crates of figs"], ["six figs of crates"], ["rouge"])
    assert numbers["rouge1"].value == 1
    assert numbers["rouge2"].value == 0
    assert numbers["rougel"].value == pytest.approx(0.5)  # longest common subsequence: two words of four


def test_all_metrics_at_once_with_intervals():
    numbers = text_numbers(SAID, RIGHT)
    assert set(numbers) == {"exact_match", "f1", "bleu", "rouge1", "rouge2", "rougel", "numeric_match"}
    assert numbers["exact_match"].value == 0.25
    assert all(number.low <= number.value <= number.high and number.n == 4 for number in numbers.values())
    assert text_numbers([], []) == {}


def test_modules_work_in_the_frame_of_evaluate_and_leave_no_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    f1 = TextMetric(token_f1, "f1", "words")
    exact = TextMetric(exact_match, "exact_match", "all")
    together = evaluate.combine([f1, exact])
    found = together.compute(predictions=SAID, references=RIGHT)
    assert found["exact_match"] == 0.25
    assert found["f1"] == pytest.approx(text_numbers(SAID, RIGHT, ["f1"])["f1"].value)
    assert list(tmp_path.rglob("*")) == []


def test_an_unknown_metric_is_named_with_the_nearest():
    with pytest.raises(AlignError, match="Did you mean 'rouge'"):
        text_numbers(SAID, RIGHT, ["rogue"])
    assert set(METRICS) == {"exact_match", "f1", "bleu", "rouge", "numeric_match"}


def test_gsm8k_references_carry_their_number(shared):
    rows = [json.loads(line) for line in (shared / "data" / "eval" / "gsm8k_300.jsonl").open()]
    assert all(numeric_match(row["answer"], row["answer"]) == 1 for row in rows)
