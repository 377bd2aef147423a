"""Rows on disk: a sequence like any other, and the same rows in the same order as when all of them were lists."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.data.examples import Conversation, Example, Message
from align.data.likeness import opening_key, row_key
from align.data.prepare import prepare, read_prepared, write_prepared
from align.data.rows import Rows, Spool, canonical_row, lines_of, rows_sha256
from align.data.split import without_questions_of
from align.errors import AlignError
from align.recipe.settings import DataSettings


def asked(question: int, answer: str) -> Conversation:
    return Conversation((Message("user", f"Question {question}?"), Message("assistant", answer)))


def spooled(examples: list[Conversation]) -> Rows:
    spool = Spool()
    return spool.rows(np.array([spool.add(example) for example in examples], dtype=np.int64))


EXAMPLES = [asked(number, f"é\u2028 {number} {'x' * number}") for number in range(20)]


def test_rows_are_a_sequence_of_the_examples_that_went_in() -> None:
    rows = spooled(EXAMPLES)
    assert (len(rows), rows[0], rows[-1]) == (20, EXAMPLES[0], EXAMPLES[-1])
    assert list(rows) == EXAMPLES
    assert rows == EXAMPLES
    assert rows[3:15:4] == EXAMPLES[3:15:4]
    assert rows[::-1][2:][0] == EXAMPLES[17]
    assert rows[:5] != rows[1:6]
    assert not rows[20:]
    with pytest.raises(IndexError):
        rows[20]


def test_only_what_is_asked_for_is_read_and_writing_may_go_on(tmp_path: Path) -> None:
    spool = Spool()
    first = spool.rows(np.array([spool.add(EXAMPLES[0])]))
    second = spool.rows(np.array([spool.add(EXAMPLES[1]), 0]))
    assert list(first) == EXAMPLES[:1]
    assert list(second) == [EXAMPLES[1], EXAMPLES[0]]
    file = tmp_path / "rows.jsonl"
    file.write_text(canonical_row(EXAMPLES[0]) + "\nno JSON at all\n" + canonical_row(EXAMPLES[2]) + "\n")
    rows = Rows.of_file(file)
    assert rows[2] == EXAMPLES[2]
    with pytest.raises(json.JSONDecodeError):
        rows[1]


def test_a_file_whose_end_is_missing_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(canonical_row(EXAMPLES[0]) + "\n" + canonical_row(EXAMPLES[1])[:20])
    with pytest.raises(AlignError, match="the last row is cut off"):
        Rows.of_file(file)


def test_the_hash_is_of_the_rows_and_their_order_wherever_they_are() -> None:
    rows = spooled(EXAMPLES)
    assert rows_sha256(rows) == rows_sha256(EXAMPLES)
    assert rows_sha256(rows) == hashlib.sha256(b"".join(lines_of(EXAMPLES))).hexdigest()
    assert len({rows_sha256(rows), rows_sha256(rows[::-1]), rows_sha256(rows[1:])}) == 3


def test_questions_that_are_trained_on_are_not_asked() -> None:
    rows = spooled(EXAMPLES)
    assert list(without_questions_of(rows[:15], rows[10:])) == EXAMPLES[15:]
    assert without_questions_of(EXAMPLES[:5], held := rows[10:]) is held


# As lists ------------------------------------------------------------------------------------------------------------


def place(example: Example, seed: int) -> int:
    salt = seed.to_bytes(16, "little", signed=True)
    return int.from_bytes(hashlib.blake2b(opening_key(example), digest_size=7, salt=salt).digest(), "big")


def split_lists(examples: list[Any], fraction: float, seed: int) -> tuple[list[Any], list[Any]]:
    """Rows whose question's place is below the fraction are held out; with ten rows, at least one question."""
    held = {opening_key(e) for e in examples if place(e, seed) / 2**56 < fraction}
    if not held and len(examples) >= 10:
        held = {opening_key(min(examples, key=lambda e: place(e, seed)))}
    return [e for e in examples if opening_key(e) not in held], [e for e in examples if opening_key(e) in held]


def distinct(examples: list[Any]) -> list[Any]:
    first: dict[bytes, Any] = {}
    for example in examples:
        first.setdefault(row_key(example), example)
    return list(first.values())


def rows_of_part(seed: int, start: int) -> list[Conversation]:
    drawn = random.Random(seed)
    return [asked(start + drawn.randrange(40), str(drawn.randrange(3))) for _ in range(120)]


def mixed_lists(parts: dict[str, list[Any]], weights: dict[str, float], seed: int) -> tuple[list[Any], list[Any]]:
    sides = {name: split_lists(distinct(rows), 0.1, seed) for name, rows in parts.items()}
    test = distinct([e for _, held in sides.values() for e in held])
    openings, seen = {opening_key(e) for e in test}, {row_key(e) for e in test}
    left: dict[str, list[Any]] = {}
    for name, (train, _) in sides.items():
        fresh = [e for e in train if opening_key(e) not in openings and row_key(e) not in seen]
        seen |= {row_key(e) for e in fresh}
        left[name] = fresh
    scale = min(len(left[name]) / weight for name, weight in weights.items())
    train = []
    for name, rows in left.items():
        train += random.Random(f"{seed} {name}").sample(rows, min(len(rows), int(scale * weights[name] + 1e-6)))
    random.Random(seed).shuffle(train)
    return train, test


@pytest.mark.parametrize("seed", range(4))
def test_rows_order_and_bytes_are_those_of_the_same_work_on_lists(tmp_path: Path, seed: int) -> None:
    parts = {"a": rows_of_part(seed, 0), "b": rows_of_part(seed + 100, 25)}
    for name, rows in parts.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(canonical_row(row) + "\n" for row in rows))
    weights = {"a": 1.0, "b": 2.0}
    data = {name: DataSettings(path=f"{name}.jsonl") for name in parts} | {
        "mixed": DataSettings(mix=[{"data": name, "weight": weight} for name, weight in weights.items()]),
        "shuffled": DataSettings(path="a.jsonl", shuffle=True, limit=30, deduplicate=False),
    }
    shuffled = list(parts["a"])
    random.Random(seed).shuffle(shuffled)
    expected = {
        "a": split_lists(distinct(parts["a"]), 0.1, seed),
        "mixed": mixed_lists(parts, weights, seed),
        "shuffled": split_lists(shuffled[:30], 0.1, seed),
    }
    for name, (train, test) in expected.items():
        write_prepared(prepare(name, data, folder=tmp_path, seed=seed), tmp_path / name)
        for file, rows in (("train.jsonl", train), ("test.jsonl", test)):
            assert (tmp_path / name / file).read_bytes() == b"".join(lines_of(rows)), (name, file)
        assert read_prepared(tmp_path / name).train == train
