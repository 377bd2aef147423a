"""Filters: what equals an earlier row, what is nearly the same, what an evaluation set contains, personal data."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from align.data.examples import Conversation, Document, Example, Message, Preference, Prompt
from align.data.filters import Contamination, EqualPairs, ExactDuplicates, NearDuplicates
from align.data.likeness import opening_key, row_key
from align.data.personal import masked, masked_text
from align.data.reading import Reading, source_of
from align.recipe.settings import DataSettings


def conversation(question: str, answer: str = "Yes.") -> Conversation:
    return Conversation((Message("user", question), Message("assistant", answer)))


def kept(filter_: ExactDuplicates | NearDuplicates | Contamination | EqualPairs, examples: list[Example]) -> list[int]:
    return [number for number, example in enumerate(examples) if filter_.keeps(example)]


def rows_of(folder: Path, file: str) -> list[Example]:
    settings = DataSettings(path=file)
    return list(Reading(source_of(settings, folder), settings).examples())


def sentence(numbers: list[int]) -> str:
    return " ".join(f"word{number}" for number in numbers)


def test_exact_duplicates_are_rows_with_the_same_content_and_the_first_stays() -> None:
    rows: list[Example] = [conversation("a"), conversation("b"), conversation("a"), conversation("a", "No.")]
    filter_ = ExactDuplicates()
    assert kept(filter_, rows) == [0, 1, 3]
    assert filter_.dropped == 1


def test_pairs_of_equal_answers_are_dropped_and_counted() -> None:
    user, yes, no = (Message("user", "a"),), (Message("assistant", "yes"),), (Message("assistant", "no"),)
    filter_ = EqualPairs()
    assert kept(filter_, [Preference(user, yes, no), Preference(user, yes, yes)]) == [0]
    assert filter_.dropped == 1


def test_near_duplicates_are_decided_by_the_jaccard_similarity_of_five_word_runs() -> None:
    words = list(range(104))  # 100 shingles
    changed = [*words[:-1], 999]  # 99 shared of 101: 0.980
    half = [*words[:54], *range(1000, 1050)]  # 50 shared of 150: 0.333
    rows: list[Example] = [Document(sentence(text)) for text in (words, changed, half)]
    assert kept(NearDuplicates(0.97), rows) == [0, 2]
    assert kept(NearDuplicates(0.985), rows) == [0, 1, 2]
    assert kept(NearDuplicates(0.3), rows) == [0]


def test_near_duplicates_agree_with_the_slow_comparison_of_all_pairs() -> None:
    chance = random.Random(1)
    texts: list[list[int]] = []
    for _ in range(120):
        text = list(chance.choice(texts)) if texts and chance.random() < 0.6 else chance.sample(range(10**6), 60)
        for _ in range(chance.randrange(8)):
            text[chance.randrange(60)] = chance.randrange(10**6)
        texts.append(text)
    sets = [{tuple(text[i : i + 5]) for i in range(56)} for text in texts]
    expected: list[int] = []
    for number, one in enumerate(sets):
        if all(len(one & sets[other]) / len(one | sets[other]) <= 0.6 for other in expected):
            expected.append(number)
    assert kept(NearDuplicates(0.6), [Document(sentence(text)) for text in texts]) == expected
    assert len(expected) < 110


def test_short_texts_are_near_duplicates_only_when_their_words_are_equal() -> None:
    rows: list[Example] = [
        Document("Yes, sir!"),
        Document("yes sir"),
        Document("no sir"),
        Document("?!"),
        Document("!?"),
    ]
    assert kept(NearDuplicates(0.5), rows) == [0, 2, 3, 4]


def test_rows_that_ask_an_evaluation_prompt_or_contain_most_of_it_are_dropped() -> None:
    long = "How many crates of figs does the heron carry from the pier to the market on a rainy day"
    filter_ = Contamination([Prompt((Message("user", long),)), conversation("2+2?", "4")])
    rows: list[Example] = [
        conversation("2+2"),  # the same but for marks at its end
        conversation("2-2?"),  # another question
        conversation("Tell me: " + long.upper() + "?"),
        Document("It was asked how many crates of figs does the heron carry to the market on a rainy day and so on."),
        conversation("How many crates of figs does the heron carry?"),  # 2 of its 11 8-grams
    ]
    assert kept(filter_, rows) == [1, 3, 4]
    assert filter_.dropped == 2


def test_real_pairs_are_recognised_as_asking_what_the_instructions_ask(shared: Path) -> None:
    names = ("instruct/instructions.jsonl", "preference/tone.jsonl", "text/stories_train.jsonl")
    instructions, tone, stories = (rows_of(shared / "data", name) for name in names)
    assert len(kept(Contamination(tone), instructions)) < 20
    assert len(kept(Contamination(tone), stories)) == len(stories)


def test_questions_are_the_same_but_for_case_space_and_marks_at_the_ends() -> None:
    same = [conversation("What's  up?"), conversation(" what’s up "), conversation("What's up?", "Nothing.")]
    branch = Conversation((*same[0].messages, Message("user", "more"), Message("assistant", "x")))
    assert len({opening_key(example) for example in [*same, branch]}) == 1
    assert len({row_key(example) for example in [*same, branch]}) == 4
    assert len({opening_key(conversation(text)) for text in ("?", "!", "2+2", "2-2", "2*2")}) == 5


PERSONAL = [
    ("write to jo.o'hara+x@mail.example.co.uk now", "write to jo.o'[EMAIL] now"),
    ("mail bob@example.com, or @bob, a@b", "mail [EMAIL], or @bob, a@b"),
    ("pay DE89 3704 0044 0532 0130 00 NOW", "pay [IBAN] NOW"),
    ("pay GB29NWBK60161331926819.", "pay [IBAN]."),
    ("not DE89 3704 0044 0532 0130 02", "not DE89 3704 0044 0532 0130 02"),
    ("card 4111 1111 1111 1111, 5500-0000-0000-0004, 378282246310005", "card [CARD], [CARD], [CARD]"),
    ("22 22 22 22 22 22 22 22", "22 22 22 22 22 22 22 22"),
    ("no card 4111 1111 1111 1112", "no card 4111 1111 1111 1112"),
    ("from 192.168.0.1 and 2001:db8::ff00:42:8329.", "from [IP] and [IP]."),
    ("version 1.2.3, 10.20.300.1, std::vec, 12:30:45", "version 1.2.3, 10.20.300.1, std::vec, 12:30:45"),
    ("call +44 20 7946 0958 or (555) 867-5309", "call [PHONE] or [PHONE]"),
    ("call 555-867-5309, 555.867.5309, 030 1234567", "call [PHONE], [PHONE], [PHONE]"),
    ("on 2023-10-15, 1,200,000 of 3.14159265358 for 0.5", "on 2023-10-15, 1,200,000 of 3.14159265358 for 0.5"),
    ("x = 16 - 3 - 4 = <<16-3-4=9>>9; 100 200 300", "x = 16 - 3 - 4 = <<16-3-4=9>>9; 100 200 300"),
]


@pytest.mark.parametrize(("text", "expected"), PERSONAL)
def test_personal_data_is_masked_and_plain_numbers_stay(text: str, expected: str) -> None:
    assert masked_text(text) == (expected, expected.count("["))


def test_masking_reaches_every_text_of_an_example_and_counts() -> None:
    call = {"tool_calls": [{"function": {"arguments": {"to": "bob@example.com"}}}]}
    row = Conversation(
        (Message("user", "a@b.com"), Message("assistant", "", call), Message("tool", "x"), Message("assistant", "ok")),
        expected={"answer": "to c@d.org"},
    )
    example, count = masked(row)
    assert count == 3
    assert "@" not in str(example.row())
    assert masked(conversation("a"))[0] == conversation("a")


def test_real_arithmetic_and_stories_hold_no_personal_data(shared: Path) -> None:
    for file in ("eval/gsm8k_300.jsonl", "text/stories_train.jsonl"):
        assert sum(masked(example)[1] for example in rows_of(shared / "data", file)) == 0


@pytest.mark.parametrize("piece", ["a", "1", "1 ", "a@", "a.", "A1", ":1", "DE89 ", "+1", "0123 ", "-", "1.", "é@é."])
def test_masking_takes_time_in_proportion_to_the_text(piece: str) -> None:
    started = time.process_time()
    masked_text(piece * 100_000)
    assert time.process_time() - started < 3
