"""Rows that stay on disk: one canonical line each in a file, read when they are asked for. In memory, 8 bytes a row.

`Spool` takes the rows that are being prepared, `Rows` shows chosen ones of a file as examples in a chosen order.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import weakref
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, cast, overload

import numpy as np
from numpy.typing import NDArray

from align.data.examples import Example, example_from_row
from align.data.likeness import opening_key
from align.errors import OF_THE_MACHINE, AlignError, StageFailed

Numbers = NDArray[np.int64]  # places of rows
Keys = NDArray[np.void]  # 16 bytes each


def canonical_row(example: Example) -> str:
    """The one line of JSON that stands for an example; equal examples give equal lines."""
    return json.dumps(example.row(), sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


class LineFile:
    """An open file that is closed when nobody shows its lines any more. Readers share it: it has no position."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        weakref.finalize(self, _close, file)

    def read(self, start: int, end: int) -> bytes:
        """The bytes between two places."""
        return os.pread(self.file.fileno(), end - start, start)


def _close(file: BinaryIO) -> None:
    """What a full disk leaves unwritten is nobody's any more: the error was told when it was met."""
    with suppress(OSError):
        file.close()


class Rows(Sequence[Example]):
    """Examples of a file of lines. A slice is the same lines, chosen again; two are equal when their lines are."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, file: LineFile, starts: Numbers, numbers: Numbers | None = None) -> None:
        """starts: where each line of the file begins, and where the last one ends. numbers: lines that are shown."""
        self._file, self._starts = file, starts
        self._numbers = np.arange(len(starts) - 1) if numbers is None else numbers

    @classmethod
    def of_file(cls, path: Path) -> Rows:
        """All lines of a file of canonical rows. Raises AlignError when the last one has no end."""
        ends = array("q", [0])
        with path.open("rb") as stream:
            for line in stream:
                ends.append(ends[-1] + len(line))
                if not line.endswith(b"\n"):
                    raise AlignError(f"{path}: the last row is cut off", "Make the data set again.")
        return cls(LineFile(path.open("rb")), np.frombuffer(ends, dtype=np.int64))

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, place: int) -> Example: ...

    @overload
    def __getitem__(self, place: slice) -> Rows: ...

    def __getitem__(self, place: int | slice) -> Example | Rows:
        if isinstance(place, slice):
            return Rows(self._file, self._starts, self._numbers[place])
        return example_from_row(json.loads(self._line(self._numbers[place])))

    def __iter__(self) -> Iterator[Example]:
        return (example_from_row(json.loads(line)) for line in self.lines())

    def __eq__(self, other: object) -> bool:
        """With a plain sequence of examples, too."""
        if isinstance(other, Rows):
            return len(self) == len(other) and all(one == two for one, two in zip(self.lines(), other.lines()))
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other))

    def __repr__(self) -> str:
        return f"<{len(self)} rows of {self._file.file.name}>"

    def lines(self) -> Iterator[bytes]:
        """The rows as they stand in the file, each with its line end."""
        return map(self._line, self._numbers)

    def _line(self, number: int) -> bytes:
        return self._file.read(int(self._starts[number]), int(self._starts[number + 1]))


def lines_of(examples: Sequence[Example]) -> Iterator[bytes]:
    """Examples as canonical lines, wherever they are."""
    if isinstance(examples, Rows):
        return examples.lines()
    return (canonical_row(example).encode() + b"\n" for example in examples)


def rows_sha256(examples: Sequence[Example]) -> str:
    """Hash of the rows and their order, in hex."""
    found = hashlib.sha256()
    for line in lines_of(examples):
        found.update(line)
    return found.hexdigest()


class Spool:
    """Rows on their way: written one after the other into a file without a name, and known by their numbers."""

    def __init__(self) -> None:
        with _space_explained():
            self._file = LineFile(cast(BinaryIO, tempfile.TemporaryFile(prefix="align-rows-")))  # noqa: SIM115  # see there
        self._ends = array("q", [0])
        self._openings = bytearray()
        self._kinds: dict[str, int] = {}
        self._kind_of = array("B")

    def add(self, example: Example) -> int:
        """The number of the row that is written now."""
        line = canonical_row(example).encode() + b"\n"
        with _space_explained():
            self._file.file.write(line)
        self._ends.append(self._ends[-1] + len(line))
        self._openings += opening_key(example)
        self._kind_of.append(self._kinds.setdefault(example.kind, len(self._kinds)))
        return len(self._kind_of) - 1

    def rows(self, numbers: Numbers) -> Rows:
        """The rows with these numbers, in this order."""
        with _space_explained():
            self._file.file.flush()
        return Rows(self._file, np.array(self._ends, dtype=np.int64), numbers)

    def openings(self, numbers: Numbers) -> Keys:
        """The `opening_key` of each of these rows."""
        return np.frombuffer(bytes(self._openings), dtype="V16")[numbers]

    def kinds(self, numbers: Numbers) -> list[str]:
        """Kinds that occur among these rows, sorted."""
        present = np.unique(np.array(self._kind_of, dtype=np.uint8)[numbers])
        return sorted(kind for kind, code in self._kinds.items() if code in present)


@contextmanager
def _space_explained() -> Iterator[None]:
    """The folder for temporary files, when it is full or may not be written."""
    try:
        yield
    except OSError as error:
        failed = StageFailed if error.errno in OF_THE_MACHINE else AlignError
        hint = OF_THE_MACHINE.get(error.errno or 0, "Check its permissions.")
        raise failed(
            f"rows cannot be written to {tempfile.gettempdir()}: {error.strerror}",
            f"{hint} Or set TMPDIR to another folder.",
        ) from error
