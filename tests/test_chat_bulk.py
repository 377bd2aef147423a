"""Many rows: the same tokens from any number of processes and from what was kept, and nothing torn is ever used."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from align.chat import bulk
from align.chat.bulk import encode_rows, encoded
from align.chat.encoded import Encoded, EncodedPair, LengthReport
from align.chat.encoder import Encoder
from align.chat.stored import StoredRows, as_columns, read_stored, write_stored
from align.chat.templates import prepare_tokenizer
from align.data.examples import Conversation, Document, Example, Message, Preference, Rated
from align.errors import AlignError, StageFailed
from align.models.folders import load_tokenizer
from align.models.source import source_of
from align.progress import Bar, Progress


def said(role: Any, text: str) -> tuple[Message, ...]:
    return (Message(role, text),)


CONVERSATIONS = [Conversation(said("user", f"Q {n}") + said("assistant", "a" * (n % 40))) for n in range(1, 40)]
PAIRS = [
    Preference(said("user", f"Q {n}"), said("assistant", f"yes {n}"), said("assistant", "no"), *numbers)
    for n, numbers in enumerate([(), (0.5,), (None, 0.75)] * 5)
]
KINDS: list[list[Any]] = [
    CONVERSATIONS,
    PAIRS,
    [Document("word " * n) for n in range(1, 60)],
    [Rated(said("user", f"Q {n}"), said("assistant", "a"), n % 2 == 0) for n in range(5)],
]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerBase:
    found = load_tokenizer(source_of(tiny_llama))
    prepare_tokenizer(found)
    return found


class Counting(Progress):
    """Counts bars and the rows that went through them."""

    def __init__(self) -> None:
        self.bars, self.rows = 0, 0.0

    @contextmanager
    def bar(self, title: str, total: float) -> Iterator[Bar]:
        self.bars += 1
        yield self

    def advance(self, amount: float = 1, *, tokens: int = 0, note: str = "") -> None:
        self.rows += amount


def one_by_one(encoder: Encoder, examples: list[Example]) -> list[Any]:
    return [row for example in examples for row in encoded(encoder, example) if row is not None]


@pytest.mark.parametrize("examples", KINDS, ids=["conversations", "pairs", "documents", "rated"])
def test_kept_rows_are_those_of_the_encoder_one_by_one(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, examples: list[Example]
) -> None:
    monkeypatch.setattr(bulk, "CHUNK_ROWS", 7)
    plain, first, again = (Encoder(tokenizer, max_length=40) for _ in range(3))
    expected = one_by_one(plain, examples)
    progress = Counting()
    made = encode_rows(first, examples, tmp_path, progress)
    read = encode_rows(again, examples, tmp_path, progress)
    assert list(made) == list(read) == expected
    assert [read[n] for n in range(len(read))] == expected
    assert first.lengths == again.lengths == plain.lengths
    assert (progress.bars, progress.rows) == (1, len(examples))  # the second time there was nothing to do
    assert not encode_rows(Encoder(tokenizer, max_length=40), [], tmp_path, progress)


def test_several_processes_give_the_same_rows_in_the_same_order_and_name_the_row_that_is_wrong(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "CHUNK_ROWS", 4)
    alone, shared = Encoder(tokenizer, max_length=40), Encoder(tokenizer, max_length=40)
    one = encode_rows(alone, CONVERSATIONS, tmp_path / "one", Progress(), 1)
    two = encode_rows(shared, CONVERSATIONS, tmp_path / "two", Progress(), 2)
    assert list(one) == list(two)
    assert alone.lengths == shared.lengths
    names = sorted(file.relative_to(tmp_path / "one") for file in (tmp_path / "one").rglob("*") if file.is_file())
    assert names
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names)
    strict = Encoder(tokenizer, max_length=40, too_long="error")
    with pytest.raises(AlignError, match="row 3") as alone_error:
        one_by_one(strict, list(CONVERSATIONS))
    with pytest.raises(AlignError) as error:
        encode_rows(Encoder(tokenizer, max_length=40, too_long="error"), CONVERSATIONS, tmp_path / "x", Progress(), 2)
    assert str(error.value).endswith(str(alone_error.value))
    assert not list((tmp_path / "x").rglob("*.json"))


def test_a_worker_that_dies_ends_the_stage_and_leaves_nothing(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "_piece_of_worker", _dies)
    with pytest.raises(StageFailed, match="was killed"):
        encode_rows(Encoder(tokenizer, max_length=40), CONVERSATIONS, tmp_path, Progress(), 2)
    assert not [*tmp_path.glob("tokens/*"), *tmp_path.glob("tokens/.*")]


def _dies(*_: Any) -> None:
    os._exit(9)


def test_small_data_stays_in_this_process_and_large_data_goes_to_several(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def alone(encoder: Encoder, chunks: Any, processes: int) -> Iterator[Any]:
        asked.append(processes)
        return (bulk._piece(encoder, *chunk) for chunk in chunks)

    monkeypatch.setattr(bulk, "_in_processes", alone)
    monkeypatch.setattr(bulk, "this_machine", lambda: type("Machine", (), {"usable_cores": 2.5}))
    encode_rows(Encoder(tokenizer, max_length=40), CONVERSATIONS, None, Progress())
    assert asked == []
    monkeypatch.setattr(bulk, "ROWS_A_PROCESS", len(CONVERSATIONS) // 4)
    encode_rows(Encoder(tokenizer, max_length=40), CONVERSATIONS, None, Progress())
    assert asked == [2]


def test_rows_are_made_anew_for_other_rows_another_tokenizer_or_another_policy(
    tokenizer: PreTrainedTokenizerBase, tiny_llama: Path, tmp_path: Path
) -> None:
    other = load_tokenizer(source_of(tiny_llama))
    prepare_tokenizer(other)
    other.chat_template = "{# the same #}" + other.chat_template
    grown = load_tokenizer(source_of(tiny_llama))
    prepare_tokenizer(grown)
    grown.add_tokens(["yes"])
    asked: list[tuple[Any, list[Example], dict[str, Any]]] = [
        (tokenizer, CONVERSATIONS, {}),
        (tokenizer, CONVERSATIONS[:-1], {}),
        (tokenizer, CONVERSATIONS[::-1], {}),
        (tokenizer, CONVERSATIONS, {"max_length": 39}),
        (tokenizer, CONVERSATIONS, {"too_long": "cut"}),
        (tokenizer, CONVERSATIONS, {"cut_prompt": True}),
        (tokenizer, CONVERSATIONS, {"train_on": "all"}),
        (other, CONVERSATIONS, {}),
        (grown, CONVERSATIONS, {}),
    ]
    progress = Counting()
    for number, (one, examples, policy) in enumerate(asked, start=1):
        encode_rows(Encoder(one, **{"max_length": 40, **policy}), examples, tmp_path, progress)
        assert progress.bars == number
    assert len(list(tmp_path.glob("tokens/*"))) == len(asked)


def test_rows_that_are_cut_off_or_half_written_are_made_anew(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    expected = list(encode_rows(Encoder(tokenizer, max_length=40), CONVERSATIONS, tmp_path, Progress()))
    (folder,) = tmp_path.glob("tokens/*")
    (tmp_path / "tokens" / ".new-0").mkdir()  # a crash left it
    for damage in ("ids", "trained", "about.json"):
        file = folder / damage
        file.write_bytes(file.read_bytes()[:-1])
        assert read_stored(folder) is None
        assert list(encode_rows(Encoder(tokenizer, max_length=40), CONVERSATIONS, tmp_path, Progress())) == expected
        assert read_stored(folder) is not None


def test_where_another_process_was_first_its_rows_stay(tmp_path: Path) -> None:
    piece = (as_columns([Encoded([5, 6], [False, True])]), LengthReport(rows=1, trained_tokens=1))
    first = write_stored(tmp_path / "rows", [piece])
    inode = (tmp_path / "rows" / "ids").stat().st_ino
    second = write_stored(tmp_path / "rows", [piece])
    assert list(first) == list(second) == [Encoded([5, 6], [False, True])]
    assert (tmp_path / "rows" / "ids").stat().st_ino == inode
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]


def test_slices_and_sides_are_views_of_the_same_rows(tmp_path: Path) -> None:
    pairs = [
        EncodedPair(Encoded([n, 70000], [False, True]), Encoded([n, 8, 9], [False, True, True]), 1, None, None)
        for n in range(6)
    ]
    stored = write_stored(
        tmp_path / "rows", [(as_columns(pairs[:4]), LengthReport()), (as_columns(pairs[4:]), LengthReport())]
    )
    assert list(stored[1:5:2]) == pairs[1:5:2]
    assert stored[-1] == pairs[-1]
    sides = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    assert list(stored.sides()) == sides
    assert list(stored[2:4].sides()) == sides[4:8]
    assert list(stored.sides().sides()) == sides
    assert isinstance(stored[:2], StoredRows)
    with pytest.raises(IndexError):
        stored[6]


def test_a_report_on_parts_adds_up_to_that_on_all(tokenizer: PreTrainedTokenizerBase) -> None:
    whole, parts = Encoder(tokenizer, max_length=24), [Encoder(tokenizer, max_length=24) for _ in range(2)]
    one_by_one(whole, list(CONVERSATIONS))
    total = LengthReport()
    for part, examples in zip(parts, (CONVERSATIONS[:20], CONVERSATIONS[20:]), strict=True):
        one_by_one(part, list(examples))
        total.add(part.lengths)
    assert whole.lengths.dropped > 0
    assert asdict(total) == asdict(whole.lengths)
    assert json.dumps(total.as_dict()) == json.dumps(whole.lengths.as_dict())
