"""JSON, JSONL and CSV files, read by ourselves so that every row knows its line. UTF-8 only.

A JSON file that begins with `[` is one array and is read whole, up to a limit; every other JSON file is read line by
line, so its size does not matter. What is wrong with a row is yielded in its place and reading goes on, as far as the
format allows. Packed files are unpacked by packed.py; Parquet, Arrow and the hub are in sources.py.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from align.data.packed import open_bytes, without_packing
from align.data.problems import Problem, Row, RowError, shown, text_flaw
from align.errors import AlignError

if TYPE_CHECKING:
    from _csv import Reader

MAX_LINE_BYTES = 16 * 2**20  # a longer line is no row of text but a broken file
MAX_ARRAY_BYTES = 4 * 2**30  # an array is held in memory, twice
PIECE_BYTES = 2**20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
CSV_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def read_json(path: Path, name: str) -> Iterator[Row | Problem]:
    """Rows of a JSON array or of JSON lines, whichever the file holds; `name` stands in the places."""
    with open_bytes(path, name) as stream:
        if _begins_with_array(stream):
            yield from _array_rows(_whole_array(stream, name), name)
        else:
            yield from _line_rows(stream, name)


def read_csv(path: Path, name: str) -> Iterator[Row | Problem]:
    """Rows of a CSV or TSV file with a header; a row's line is the one it begins on."""
    csv.field_size_limit(MAX_LINE_BYTES)
    with open_bytes(path, name) as stream:
        reader = csv.reader(
            _csv_lines(stream), delimiter=CSV_DELIMITERS[without_packing(path).suffix.lower()], strict=True
        )
        yield from _csv_rows(reader, name)


def _begins_with_array(stream: io.BufferedReader) -> bool:
    return stream.peek(64).removeprefix(BYTE_ORDER_MARK).lstrip()[:1] == b"["


def _whole_array(stream: io.BufferedReader, name: str) -> bytes:
    data = bytearray()
    while piece := stream.read(PIECE_BYTES):  # a read of the limit would take that much memory for the smallest file
        data += piece
        if len(data) > MAX_ARRAY_BYTES:
            raise AlignError(
                f"{name}: an array of more than {MAX_ARRAY_BYTES / 2**30:g} GiB, which would have to be held in memory",
                "Write one object a line (.jsonl): such a file can have any size.",
            )
    return bytes(data)


# Lines ---------------------------------------------------------------------------------------------------------------


def _lines(stream: BinaryIO) -> Iterator[tuple[int, str | RowError]]:
    """Line number (from 1) and text of every line, or what is wrong with it; a byte order mark is taken off."""
    offset = 0
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        length = len(line)
        if length > MAX_LINE_BYTES and not line.endswith(b"\n"):
            offset += length + _skip_line(stream)
            yield number, RowError(f"the line is longer than {MAX_LINE_BYTES // 2**20} MiB")
            continue
        start = len(BYTE_ORDER_MARK) if number == 1 and line.startswith(BYTE_ORDER_MARK) else 0
        yield number, _decoded(line[start:], offset + start)
        offset += length


def _skip_line(stream: BinaryIO) -> int:
    skipped = 0
    while piece := stream.readline(2**20):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped


def _decoded(data: bytes, offset: int) -> str | RowError:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return _not_utf8(error, offset)


def _not_utf8(error: UnicodeDecodeError, offset: int) -> RowError:
    start = error.object[:2]
    hint = "; this looks like UTF-16" if offset == 0 and start in (b"\xff\xfe", b"\xfe\xff") else ""
    byte = error.object[error.start]
    return RowError(f"not UTF-8: byte 0x{byte:02x} at offset {offset + error.start} of the file{hint}")


# JSON ----------------------------------------------------------------------------------------------------------------


class _Broken(RowError):
    """Text that is no JSON; `position` counts characters from the start of the text."""

    def __init__(self, message: str, position: int) -> None:
        super().__init__(message)
        self.position = position


def _line_rows(stream: BinaryIO, name: str) -> Iterator[Row | Problem]:
    for number, line in _lines(stream):
        place = f"{name}:{number}"
        try:
            if isinstance(line, RowError):
                raise line
            if line.strip():
                yield Row(place, _one_object(line))
        except _Broken as error:
            yield Problem(place, f"broken JSON at column {error.position + 1}: {error}")
        except RowError as error:
            yield Problem(place, str(error))


def _one_object(line: str) -> dict[str, Any]:
    value, end = _parsed(line, _skip_space(line, 0))
    if line[end:].strip():
        raise RowError(f"a second value begins at column {_skip_space(line, end) + 1}; one JSON object a line")
    return _checked_object(value, "\\u" in line)


def _array_rows(data: bytes, name: str) -> Iterator[Row | Problem]:
    start = len(BYTE_ORDER_MARK) if data.startswith(BYTE_ORDER_MARK) else 0
    try:
        text = data[start:].decode()
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        yield Problem(f"{name}:{line}", str(_not_utf8(error, start)))
        return
    del data
    try:
        yield from _elements(text, name)
    except _Broken as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        yield Problem(f"{name}:{line}", f"broken JSON at column {column}: {error}")


def _elements(text: str, name: str) -> Iterator[Row | Problem]:
    """Raises _Broken where the array itself cannot be followed any further."""
    position, line, counted = _skip_space(text, 0) + 1, 1, 0
    while (position := _skip_space(text, position)) < len(text) and text[position] != "]":
        line, counted = line + text.count("\n", counted, position), position
        value, end = _parsed(text, position)
        try:
            yield Row(f"{name}:{line}", _checked_object(value, text.find("\\u", position, end) >= 0))
        except RowError as error:
            yield Problem(f"{name}:{line}", str(error))
        position = _skip_space(text, end)
        if text[position : position + 1] == ",":
            position = _skip_space(text, position + 1)
            if text[position : position + 1] == "]":
                raise _Broken("a comma before the closing ']'", position)
        elif text[position : position + 1] != "]":
            raise _Broken("expected ',' or ']' after the element", position)
    if text[position + 1 :].strip() or position >= len(text):
        raise _Broken("the array does not end with the file", min(position + 1, len(text)))


def _skip_space(text: str, position: int) -> int:
    while text[position : position + 1] in _JSON_SPACE:
        position += 1
    return position


def _parsed(text: str, position: int) -> tuple[Any, int]:
    """The JSON value that begins at `position` and the position after it."""
    try:
        return _DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        raise _Broken(error.msg, error.pos) from None
    except RecursionError:
        raise _Broken("nested too deeply", position) from None
    except RowError as error:
        raise _Broken(str(error), position) from None
    except ValueError as error:
        raise _Broken(str(error).partition(";")[0], position) from None


def _checked_object(value: Any, escapes: bool) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RowError(f"a row must be a JSON object, not {shown(value)}")
    if escapes and (flaw := text_flaw(value)):
        raise RowError(flaw)
    return value


def _without_double_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RowError(f"key {shown(next(k for k in keys if keys.count(k) > 1))} stands twice in one object")
    return result


def _no_constant(name: str) -> NoReturn:
    raise RowError(f"{name} is no JSON number")


_JSON_SPACE = (" ", "\n", "\r", "\t")
_DECODER = json.JSONDecoder(object_pairs_hook=_without_double_keys, parse_constant=_no_constant)


# CSV -----------------------------------------------------------------------------------------------------------------


def _csv_lines(stream: BinaryIO) -> Iterator[str]:
    for _, line in _lines(stream):
        if isinstance(line, RowError):
            raise line
        yield line


def _csv_rows(reader: Reader, name: str) -> Iterator[Row | Problem]:
    line = 1
    header: list[str] | None = None
    try:
        for cells in reader:
            place, line = f"{name}:{line}", reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = _checked_header(cells, place)
            elif problem := _cell_problem(cells, header):
                yield Problem(place, problem)
            else:
                yield Row(place, dict(zip(header, cells)))
    except (RowError, csv.Error) as error:  # nothing after this can be trusted
        where = reader.line_num + 1 if isinstance(error, RowError) else line
        yield Problem(f"{name}:{where}", f"broken CSV: {error}" if isinstance(error, csv.Error) else str(error))


def _checked_header(cells: list[str], place: str) -> list[str]:
    twice = next((cell for cell in cells if cells.count(cell) > 1), None)
    if twice is not None:
        raise AlignError(
            f"{place}: column {shown(twice)} stands twice in the header", "Give every column its own name."
        )
    return cells


def _cell_problem(cells: list[str], header: list[str]) -> str | None:
    if len(cells) != len(header):
        return f"{len(cells)} cells, but the header has {len(header)} columns"
    return text_flaw(cells)
