"""Sources: every row has its place, every damage is named, nothing is looked up on the hub that is a local typo."""

from __future__ import annotations

import gzip
import json
import socket
import tracemalloc
from pathlib import Path

import pytest
import zstandard

from align.data import text_files
from align.data.problems import Problem, Row
from align.data.sources import content_sha256, find_source, read_rows, resolved_commit
from align.errors import AlignError

GOOD = b'{"prompt": "a", "completion": "b"}'


def rows_of(folder: Path, name: str, data: bytes) -> list[Row | Problem]:
    (folder / name).write_bytes(data)
    return list(read_rows(find_source(name, folder)))


def places(rows: list[Row | Problem]) -> list[str]:
    return [row.place for row in rows]


def only_problem(rows: list[Row | Problem]) -> Problem:
    (problem,) = [row for row in rows if isinstance(row, Problem)]
    return problem


def test_rows_of_lines_know_their_line_and_blank_lines_count(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "a.jsonl", GOOD + b"\n\n" + GOOD + b"\n")
    assert places(rows) == ["a.jsonl:1", "a.jsonl:3"]


def test_rows_of_an_array_know_the_line_they_begin_on(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "a.json", b'[\n {"text": "a"},\n\n {"text":\n "b"}, {"text": "c"}\n]\n')
    assert places(rows) == ["a.json:2", "a.json:4", "a.json:5"]
    assert [row.fields for row in rows] == [{"text": "a"}, {"text": "b"}, {"text": "c"}]


def test_json_lines_in_a_json_file_and_an_array_in_a_jsonl_file_are_read_as_what_they_are(tmp_path: Path) -> None:
    assert len(rows_of(tmp_path, "a.json", GOOD + b"\n" + GOOD)) == 2
    assert len(rows_of(tmp_path, "b.jsonl", b"[" + GOOD + b"," + GOOD + b"]")) == 2


@pytest.mark.parametrize(
    ("data", "place", "words"),
    [
        (GOOD + b'\n{"prompt": "a", \n' + GOOD, "a.jsonl:2", "broken JSON at column 18"),
        (GOOD + b"\n" + GOOD + b" " + GOOD + b"\n", "a.jsonl:2", "a second value begins at column 36"),
        (GOOD + b'\n["a"]\n', "a.jsonl:2", "a row must be a JSON object"),
        (GOOD + b'\n{"prompt": "a\x00b"}\n', "a.jsonl:2", "broken JSON"),
        (GOOD + b'\n{"prompt": "a\\u0000b"}\n', "a.jsonl:2", "a NUL character at position 1"),
        (GOOD + b'\n{"prompt": ["x", "\\ud83d!"]}\n', "a.jsonl:2", "half a surrogate pair (\\ud83d) at position 0"),
        (GOOD + b'\n{"a": 1, "a": 2}\n', "a.jsonl:2", "key 'a' stands twice"),
        (GOOD + b'\n{"a": NaN}\n', "a.jsonl:2", "NaN is no JSON number"),
        (GOOD + b'\n{"a": ' + b"[" * 100_000 + b"\n", "a.jsonl:2", "nested too deeply"),
        (GOOD + b'\n{"a": ' + b"1" * 5000 + b"}\n", "a.jsonl:2", "limit (4300 digits)"),
        (GOOD + b'\n{"a": "\xff"}\n' + GOOD, "a.jsonl:2", "not UTF-8: byte 0xff at offset 42 of the file"),
    ],
)  # fmt: skip
def test_a_broken_line_in_the_middle_is_named_and_the_rest_is_read(
    tmp_path: Path, data: bytes, place: str, words: str
) -> None:
    rows = rows_of(tmp_path, "a.jsonl", data)
    problem = only_problem(rows)
    assert problem.place == place
    assert words in problem.text
    assert len(rows) == data.count(b"\n" + GOOD) + 2 - data.count(GOOD + b" " + GOOD)


@pytest.mark.parametrize(
    ("data", "place", "words"),
    [
        (b'[\n{"a": 1},\n{"a": 2,}\n]', "a.json:3", "broken JSON"),
        (b'[\n{"a": 1}\n{"a": 2}\n]', "a.json:3", "expected ',' or ']'"),
        (b'[\n{"a": 1},\n]', "a.json:3", "a comma before the closing ']'"),
        (b'[\n{"a": 1}\n', "a.json:3", "expected ',' or ']'"),
        (b'[\n{"a": 1}\n] {"a": 2}', "a.json:3", "the array does not end with the file"),
        (b'[\n{"a": 1}, 5]', "a.json:2", "a row must be a JSON object, not 5"),
        (b'[\n{"a": 1}, {"a": "\xe4"}]', "a.json:2", "not UTF-8: byte 0xe4 at offset 19 of the file"),
    ],
)
def test_a_damaged_array_is_named_with_its_line(tmp_path: Path, data: bytes, place: str, words: str) -> None:
    problem = only_problem(rows_of(tmp_path, "a.json", data))
    assert problem.place == place
    assert words in problem.text


def test_a_byte_order_mark_windows_line_ends_and_line_separators_inside_text_are_accepted(tmp_path: Path) -> None:
    text = '{"text": "one\u2028two\u0085three"}'
    for name, mark in (("a.jsonl", b"\xef\xbb\xbf"), ("b.jsonl", b"")):
        rows = rows_of(tmp_path, name, mark + text.encode() + b"\r\n" + text.encode() + b"\r\n")
        assert [row.fields for row in rows] == [{"text": "one\u2028two\u0085three"}] * 2


def test_utf_16_is_recognised_in_the_error(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "a.jsonl", '{"text": "a"}\n'.encode("utf-16"))
    assert "this looks like UTF-16" in str(rows[0])


def test_the_offset_of_a_bad_byte_is_that_of_the_file_whatever_stands_before_it(tmp_path: Path) -> None:
    before = b"\xef\xbb\xbf" + '{"text": "ä€"}\r\n'.encode()
    (problem,) = rows_of(tmp_path, "a.jsonl", before + b'{"text": "\xc3("}')[1:]
    assert f"offset {len(before) + 10} of the file" in str(problem)


def test_a_line_beyond_the_limit_is_refused_without_being_held_and_the_next_one_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "MAX_LINE_BYTES", 2**20)
    giant = b'{"text": "' + b"x" * (3 * 2**20) + b'"}\n'
    rows = rows_of(tmp_path, "a.jsonl", GOOD + b"\n" + giant + GOOD + b"\n" + b'{"text": "\xff"}')
    assert [type(row) for row in rows] == [Row, Problem, Row, Problem]
    assert "longer than 1 MiB" in str(rows[1])
    assert f"offset {2 * len(GOOD) + 2 + len(giant) + 10} " in str(rows[3])


def test_an_array_takes_memory_for_what_it_holds_and_not_for_the_limit(tmp_path: Path) -> None:
    """A limit on memory, such as `ulimit -v`, refuses what is asked for, used or not."""
    text = "x" * text_files.PIECE_BYTES
    tracemalloc.start()
    (row,) = rows_of(tmp_path, "a.json", json.dumps([{"text": text}]).encode())
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(row, Row)
    assert row.fields == {"text": text}
    assert most < 20 * text_files.PIECE_BYTES


def test_an_array_beyond_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = b"[" + GOOD + b"]"
    monkeypatch.setattr(text_files, "MAX_ARRAY_BYTES", len(array))
    assert len(rows_of(tmp_path, "a.json", array)) == 1
    with pytest.raises(AlignError, match="would have to be held in memory"):
        rows_of(tmp_path, "a.json", array + b" ")


@pytest.mark.parametrize("data", [b"", b"\n \n", b"\xef\xbb\xbf", b"[]", b" [ ] "])
def test_a_file_without_rows_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(AlignError, match="there are no rows in it"):
        rows_of(tmp_path, "a.jsonl", data)


def test_packed_files_give_the_same_rows_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    data = (GOOD + b"\n") * 2000
    gz = gzip.compress(data)
    zst = zstandard.ZstdCompressor().compress(data) + zstandard.ZstdCompressor().compress(GOOD)  # two frames
    assert len(rows_of(tmp_path, "a.jsonl.gz", gz)) == 2000
    assert len(rows_of(tmp_path, "a.jsonl.zst", zst)) == 2001
    assert places(rows_of(tmp_path, "b.json.gz", gz))[-1] == "b.json.gz:2000"
    for name, damaged in (("c.jsonl.gz", gz[:-20]), ("d.jsonl.gz", data), ("e.jsonl.zst", data)):
        with pytest.raises(AlignError, match=r"[cde]\.jsonl.* cannot be unpacked"):
            rows_of(tmp_path, name, damaged)


# CSV -----------------------------------------------------------------------------------------------------------------


def test_csv_rows_know_the_line_they_begin_on_also_behind_cells_with_line_breaks(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "a.csv", b'\xef\xbb\xbfprompt,note\r\n"one\ntwo",x\r\n\r\n"say ""hi""",y\r\n')
    assert places(rows) == ["a.csv:2", "a.csv:5"]
    assert [row.fields for row in rows] == [{"prompt": "one\ntwo", "note": "x"}, {"prompt": 'say "hi"', "note": "y"}]


def test_tab_separated_and_packed_tables_are_read(tmp_path: Path) -> None:
    assert rows_of(tmp_path, "a.tsv", b"prompt\tnote\na,b\tc\n")[0].fields == {"prompt": "a,b", "note": "c"}
    assert len(rows_of(tmp_path, "a.csv.gz", gzip.compress(b"prompt\na\nb\n"))) == 2


@pytest.mark.parametrize(
    ("data", "place", "words"),
    [
        (b"a,b\n1,2\n1,2,3\n1,2\n", "a.csv:3", "3 cells, but the header has 2 columns"),
        (b'a,b\n1,2\n1,"2\n1,2\n', "a.csv:3", "broken CSV"),
        (b'a,b\n1,2\n"1"x,2\n', "a.csv:3", "broken CSV"),
        (b"a,b\n1,2\n1,\x002\n", "a.csv:3", "NUL"),
        (b"a,b\n1,2\n1,\xff\n", "a.csv:3", "not UTF-8: byte 0xff at offset 10"),
    ],
)
def test_a_broken_csv_row_is_named(tmp_path: Path, data: bytes, place: str, words: str) -> None:
    problem = only_problem(rows_of(tmp_path, "a.csv", data))
    assert problem.place == place
    assert words in problem.text


def test_a_csv_header_with_a_column_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AlignError, match="column 'a' stands twice"):
        rows_of(tmp_path, "a.csv", b"a,a\n1,2\n")


# Tables --------------------------------------------------------------------------------------------------------------


def test_parquet_and_arrow_give_the_same_rows_with_their_numbers(tmp_path: Path) -> None:
    import datasets

    table = datasets.Dataset.from_list([{"prompt": f"p{i}", "completion": None if i == 1 else "c"} for i in range(3)])
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "arrow")
    datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(tmp_path / "both")
    for name in ("a.parquet", "arrow", "both"):
        rows = list(read_rows(find_source(name, tmp_path)))
        assert places(rows) == [f"{name}: row {n}" for n in (1, 2, 3)]
        assert rows[1].fields == {"prompt": "p1", "completion": None}
    assert len(list(read_rows(find_source("both", tmp_path, split="test")))) == 1
    with pytest.raises(AlignError, match="no split 'dev'") as error:
        list(read_rows(find_source("both", tmp_path, split="dev")))
    assert "test, train" in str(error.value)


def test_a_nul_in_a_table_is_named_and_no_table_at_all_is_refused(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list([{"text": "a"}, {"text": "b\0"}]).to_parquet(tmp_path / "a.parquet")
    problem = only_problem(list(read_rows(find_source("a.parquet", tmp_path))))
    assert problem.place == "a.parquet: row 2"
    with pytest.raises(AlignError, match="cannot be read as Parquet"):
        rows_of(tmp_path, "b.parquet", b"PAR1 nothing")
    with pytest.raises(AlignError, match="cannot be read as Arrow"):
        rows_of(tmp_path, "b.arrow", b"nothing")


# Names ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("instructons.jsonl", "Did you mean 'instructions.jsonl'?"),
        ("data/chats.json", "Did you mean 'data/chats.jsonl'?"),
        ("data/chat", "Did you mean 'data/chats.jsonl'?"),
        ("instructions", "Did you mean 'instructions.jsonl'?"),
        ("data/nothing-like-it", "Files are looked for in"),
        ("./rows", "Files are looked for in"),
        ("~/rows", "Files are looked for in"),
        ("/tmp/no/such.jsonl", "Files are looked for in"),
        ("a/b/c", "Files are looked for in"),
        ("rows.parquet", "Files are looked for in"),
    ],
)
def test_a_mistyped_path_is_refused_at_once_and_never_taken_for_a_hub_id(tmp_path: Path, text: str, hint: str) -> None:
    (tmp_path / "instructions.jsonl").write_bytes(GOOD)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "chats.jsonl").write_bytes(GOOD)
    with pytest.raises(AlignError, match="there is no file") as error:
        find_source(text, tmp_path)
    assert hint in error.value.hint


@pytest.mark.usefixtures("no_network")
def test_a_hub_id_is_taken_as_one_and_can_be_written_so_that_no_file_is_meant(tmp_path: Path) -> None:
    (tmp_path / "owner").mkdir()
    assert find_source("someone/rows", tmp_path, subset="main", revision="v1").hub_id == "someone/rows"
    assert find_source("hf://datasets/owner/rows", tmp_path).hub_id == "owner/rows"
    with pytest.raises(AlignError, match="neither a file nor a hub id"):
        find_source("hf://datasets/a/b/c", tmp_path)


def test_a_hub_data_set_is_read_at_the_commit_that_its_revision_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    asked = {}

    def load(*where: object, **how: object) -> object:
        asked.update(where=where, **how)
        return datasets.Dataset.from_list([{"text": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = find_source("someone/rows", tmp_path, subset="small", split="dev", revision="a" * 40)
    assert places(list(read_rows(source))) == ["someone/rows: row 1"]
    assert asked == {"where": ("someone/rows", "small"), "split": "dev", "revision": "a" * 40}


def test_a_hub_data_set_that_cannot_be_reached_is_the_users_error_and_the_cache_answers_for_known_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(AlignError, match="cannot be read from the hub"):
        content_sha256(find_source("someone/rows", tmp_path / "none"))
    refs = tmp_path / "datasets--someone--rows" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("b" * 40)
    assert resolved_commit(find_source("someone/rows", tmp_path / "none")) == "b" * 40


def test_folders_and_unknown_kinds_of_files_are_refused_with_what_to_give_instead(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "part.jsonl").write_bytes(GOOD)
    (tmp_path / "rows.txt").write_bytes(b"text")
    with pytest.raises(AlignError, match="is a folder") as error:
        find_source("rows", tmp_path)
    assert "part.jsonl" in error.value.hint
    with pytest.raises(AlignError, match="a kind of file that is not known"):
        find_source("rows.txt", tmp_path)


def test_the_content_hash_sees_every_byte_of_a_folder_and_no_name_or_time(tmp_path: Path) -> None:
    import datasets

    table = datasets.Dataset.from_list([{"text": "a"}])
    table.save_to_disk(tmp_path / "one")
    before = content_sha256(find_source("one", tmp_path))
    (tmp_path / "one").rename(tmp_path / "two")
    assert content_sha256(find_source("two", tmp_path)) == before
    state = json.loads((tmp_path / "two" / "state.json").read_text())
    (tmp_path / "two" / "state.json").write_text(json.dumps(state | {"_split": "other"}))
    assert content_sha256(find_source("two", tmp_path)) != before
