"""Encoded rows as flat arrays in a folder: written piece by piece, mapped into memory, made into rows when asked for.

The folder appears under its name when it is whole. Its columns are plain numbers, one file each; about.json says how
many there are, so that a file which was cut off shows.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from align.chat.encoded import Encoded, EncodedPair, LengthReport

Columns = Mapping[str, NDArray[Any]]

# per token: ids, trained; per sequence: lengths; per pair (of two sequences): the others, NaN for a number it has not
COLUMNS: dict[str, type[np.generic]] = {
    "ids": np.uint32, "trained": np.bool_, "lengths": np.int32,
    "prompts": np.int32, "margins": np.float64, "probabilities": np.float64,
}  # fmt: skip
ABOUT = "about.json"
ASIDE = ".new-"


class StoredRows(Sequence[Any]):
    """Rows (Encoded) or pairs (EncodedPair) behind flat columns; a slice is a view."""

    def __init__(self, columns: Columns, report: LengthReport, numbers: NDArray[np.int64] | None = None) -> None:
        """report: what the length policy did to all of them. numbers: rows that are shown; None: all."""
        self.report = report
        self._columns = columns
        self._pairs = len(columns["prompts"]) > 0
        self._ends = np.cumsum(columns["lengths"], dtype=np.int64)
        count = len(columns["prompts"]) if self._pairs else len(columns["lengths"])
        self._numbers = np.arange(count) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, place: int) -> Any: ...

    @overload
    def __getitem__(self, place: slice) -> StoredRows: ...

    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            return StoredRows(self._columns, self.report, self._numbers[place])
        number = int(self._numbers[place])
        return self._pair(number) if self._pairs else self._sequence(number)

    def __iter__(self) -> Iterator[Any]:
        return (self[place] for place in range(len(self)))

    def sides(self) -> StoredRows:
        """Every sequence as a row of its own; those of a pair side by side, chosen first."""
        if not self._pairs:
            return self
        numbers = np.column_stack([2 * self._numbers, 2 * self._numbers + 1]).ravel()
        return StoredRows({**self._columns, "prompts": np.empty(0, np.int32)}, self.report, numbers)

    def _sequence(self, number: int) -> Encoded:
        end = int(self._ends[number])
        start = end - int(self._columns["lengths"][number])
        return Encoded(self._columns["ids"][start:end].tolist(), self._columns["trained"][start:end].tolist())

    def _pair(self, number: int) -> EncodedPair:
        margin, probability = (float(self._columns[name][number]) for name in ("margins", "probabilities"))
        return EncodedPair(
            self._sequence(2 * number), self._sequence(2 * number + 1), int(self._columns["prompts"][number]),
            None if math.isnan(margin) else margin, None if math.isnan(probability) else probability,
        )  # fmt: skip


def as_columns(rows: Sequence[Encoded | EncodedPair]) -> Columns:
    """Rows of one kind as columns."""
    pairs = [row for row in rows if isinstance(row, EncodedPair)]
    sides = [side for row in rows for side in _sides(row)]
    values: dict[str, Iterable[Any]] = {
        "ids": chain.from_iterable(side.ids for side in sides),
        "trained": chain.from_iterable(side.trained for side in sides),
        "lengths": (len(side.ids) for side in sides),
        "prompts": (pair.prompt_length for pair in pairs),
        "margins": (math.nan if pair.margin is None else pair.margin for pair in pairs),
        "probabilities": (math.nan if pair.probability is None else pair.probability for pair in pairs),
    }
    return {name: np.fromiter(values[name], dtype=kind) for name, kind in COLUMNS.items()}


def read_stored(folder: Path) -> StoredRows | None:
    """The rows in a folder, or None where it is not there or not whole. Its time says when it was last used."""
    try:
        about = json.loads((folder / ABOUT).read_text("utf-8"))
        columns = {name: _mapped(folder / name, kind, about["sizes"][name]) for name, kind in COLUMNS.items()}
    except (OSError, ValueError, KeyError):
        return None
    with suppress(OSError):
        os.utime(folder)
    return StoredRows(columns, LengthReport(**about["report"], lengths=columns["lengths"].tolist()))


def write_stored(folder: Path, pieces: Iterable[tuple[Columns, LengthReport]]) -> StoredRows:
    """Keeps the rows of all pieces in `folder`, in their order, and opens it. Where another process was first, its stay."""
    aside = folder.with_name(f"{ASIDE}{os.urandom(8).hex()}")
    aside.mkdir(parents=True)
    try:
        _write(aside, pieces)
        if read_stored(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)  # what a crash left
            with suppress(OSError):  # another process was first
                aside.rename(folder)
        stored = read_stored(folder if folder.exists() else aside)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    assert stored is not None, "it was written just now"
    return stored


@contextmanager
def short_lived() -> Iterator[Path]:
    """A folder for rows that are not kept: what is mapped stays readable when its name is gone."""
    with tempfile.TemporaryDirectory(prefix="align-tokens-") as place:
        yield Path(place) / "rows"


def _write(folder: Path, pieces: Iterable[tuple[Columns, LengthReport]]) -> None:
    sizes, total = dict.fromkeys(COLUMNS, 0), LengthReport()
    files = {name: (folder / name).open("wb") for name in COLUMNS}
    try:
        for columns, report in pieces:
            total.add_counts(report)
            for name, file in files.items():
                columns[name].tofile(file)
                sizes[name] += len(columns[name])
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    finally:
        for file in files.values():
            file.close()
    (folder / ABOUT).write_text(json.dumps({"sizes": sizes, "report": total.counts()}), "utf-8")


def _mapped(file: Path, kind: type[np.generic], size: int) -> NDArray[Any]:
    """Raises ValueError for a file of another size."""
    if file.stat().st_size != size * np.dtype(kind).itemsize:
        raise ValueError(f"{file} is cut off")
    return np.memmap(file, dtype=kind, mode="r") if size else np.empty(0, kind)


def _sides(row: Encoded | EncodedPair) -> tuple[Encoded, ...]:
    return (row.chosen, row.rejected) if isinstance(row, EncodedPair) else (row,)
