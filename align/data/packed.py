"""Bytes of a file, unpacked where it is .gz or .zst, and never more of them than a file of text can hold.

A few kilobytes can unpack to as many gigabytes as their writer likes. Text shrinks to a fifth or a tenth; what shrinks
more than a hundredfold, and is large, is refused when it has shown so much.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from align.errors import AlignError

PACKED = (".gz", ".zst")
MOST_SHRUNK = 100
UNREADABLE = "Check its permissions, and the disk it lies on."
ALWAYS_READ_BYTES = 2**30  # a smaller file may be as repetitive as it likes


@contextmanager
def open_bytes(path: Path, name: str) -> Iterator[io.BufferedReader]:
    """The file's bytes, unpacked when it is .gz or .zst; `name` stands in the errors.

    Raises AlignError for a file that cannot be opened or unpacked, or unpacks to far more than text does.
    """
    import zstandard

    try:
        with path.open("rb") as packed:
            yield io.BufferedReader(_unpacked(packed, path, name))
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise AlignError(f"{name}: cannot be unpacked: {error}", "The file is damaged or incomplete.") from error
    except OSError as error:
        raise AlignError(f"{name}: cannot be read: {error.strerror or error}", UNREADABLE) from error


def without_packing(path: Path) -> Path:
    """The path without the ending that says how the file is packed."""
    return path.with_suffix("") if path.suffix.lower() in PACKED else path


def _unpacked(packed: BinaryIO, path: Path, name: str) -> Any:
    suffix = path.suffix.lower()
    if suffix not in PACKED:
        return packed
    if suffix == ".gz":
        stream: Any = gzip.GzipFile(fileobj=packed)
    else:
        import zstandard

        stream = zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=True)
    return _Bounded(stream, max(ALWAYS_READ_BYTES, MOST_SHRUNK * path.stat().st_size), name)


class _Bounded(io.RawIOBase):
    """A stream of which no more than `most` bytes are read."""

    def __init__(self, stream: Any, most: int, name: str) -> None:
        self._stream, self._left, self._most, self._name = stream, most, most, name

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count: int = self._stream.readinto(buffer)
        self._left -= count
        if self._left < 0:
            raise AlignError(
                f"{self._name}: unpacks to more than {self._most / 2**30:.3g} GiB, over {MOST_SHRUNK} times its size",
                "Text does not shrink so much: the file is broken, or made to fill memory and disk. If it is good, unpack "
                "it and name the plain file.",
            )
        return count
