"""Finished rows on disk: nothing is lost or there twice after a stop, and every text comes back as it was."""

from __future__ import annotations

import dataclasses
import errno
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.critique.rows import FAULTS, Comparison, Row, RowFile, Step
from align.data.examples import Message
from align.errors import AlignError
from tests.critique_kit import said


def full_row(index: int = 0, text: str = "an answer") -> Row:
    """A row with something in every field."""
    return Row(
        index, (Message("system", "s", {"name": "n"}), *said("q")), [text, "other"], {"answer": ["1"], "refuse": False},
        [Step("calm", "bad", text, "cut"), Step("plain", "no")], text, "worse", 0.1 + 0.2,
        [Comparison(0, 1, 1 / 3, ("calm", "plain")), Comparison(0, 2, None, ("calm",))],
    )  # fmt: skip


def test_a_row_with_all_its_steps_comes_back_as_it_was(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "new" / "rows.jsonl")
    file.add([full_row(3)])
    assert RowFile(file.path).rows == {3: full_row(3)}


def test_no_field_of_a_row_is_left_at_its_default_in_these_tests() -> None:
    assert all(getattr(full_row(1), field.name) not in ("", None, []) for field in dataclasses.fields(Row))
    assert full_row().fault in FAULTS


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r", "\n", "\0", "é"])
def test_a_text_with_any_mark_comes_back(tmp_path: Path, mark: str) -> None:
    file = RowFile(tmp_path / "rows.jsonl")
    file.add([full_row(0, f"one{mark}two"), full_row(1)])
    assert RowFile(file.path).rows == {0: full_row(0, f"one{mark}two"), 1: full_row(1)}
    assert file.path.read_bytes().count(b"\n") == 2


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(max_size=12), min_size=1, max_size=4), lost=st.integers(min_value=1, max_value=400))
def test_a_file_cut_anywhere_goes_on_to_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], lost: int
) -> None:
    rows = [full_row(index, text) for index, text in enumerate(texts)]
    file = RowFile(tmp_path_factory.mktemp("rows") / "rows.jsonl")
    file.add(rows)
    whole = file.path.read_bytes()
    file.path.write_bytes(whole[:-lost] if lost < len(whole) else b"")
    again = RowFile(file.path)
    assert list(again.rows.values()) == rows[: len(again.rows)]
    again.add(rows)
    assert again.path.read_bytes() == whole


def test_a_row_that_is_there_already_is_left_as_it_is(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "rows.jsonl")
    file.add([full_row(0)])
    file.add([full_row(0, "another"), full_row(1)])
    assert RowFile(file.path).rows == {0: full_row(0), 1: full_row(1)}


def test_rows_of_many_threads_are_all_whole(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "rows.jsonl")
    threads = [threading.Thread(target=file.add, args=([full_row(index, "x" * 3000)],)) for index in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(RowFile(file.path).rows) == list(range(24))


def test_a_row_is_on_disk_before_add_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(Path(f"/proc/self/fd/{number}").readlink()))
    file = RowFile(tmp_path / "rows.jsonl")
    file.add([full_row(0)])
    assert synced == [file.path, tmp_path], "the row, and the name of a new file"


def test_a_row_that_could_not_be_written_leaves_nothing_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = RowFile(tmp_path / "rows.jsonl")
    file.add([full_row(0)])

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            file.add([full_row(1), full_row(2)])
    file.add([full_row(2)])
    assert RowFile(file.path).rows == {0: full_row(0), 2: full_row(2)}
    assert file.path.read_bytes().count(b"\n") == 2


def test_a_line_that_is_no_row_is_refused_by_its_number(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "rows.jsonl")
    file.add([full_row(index) for index in range(3)])
    lines = file.path.read_bytes().splitlines(keepends=True)
    file.path.write_bytes(b"".join([lines[0], lines[1][:40] + b"\n", lines[2]]))
    with pytest.raises(AlignError, match=r"rows\.jsonl, line 2: this is no finished row"):
        RowFile(file.path)
