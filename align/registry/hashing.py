"""Names for content: the SHA-256 of a file, of a JSON value, and of a whole folder. Knows nothing of the registry.

The identity of a folder is the hash of its sorted (relative path, file hash) pairs: neither times, nor order, nor the
place where the folder lies can change it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a folder: its hash, its size in bytes, and the marks by which a later change shows without reading it.

    stamp: inode, modification time and status-change time (ns). A program can set the second back, but not the third.
    """

    sha256: str
    size: int
    stamp: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Manifest:
    """The files of a folder by relative path ('/' as separator), sorted."""

    files: Mapping[str, FileEntry]

    @property
    def id(self) -> str:
        """Content hash of the folder."""
        return sha256_json([[path, entry.sha256] for path, entry in self.files.items()])

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files.values())

    def as_json(self) -> str:
        """Text for the registry; `from_json` reads it."""
        return json.dumps({path: [entry.sha256, entry.size, *entry.stamp] for path, entry in self.files.items()})

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """The inverse of `as_json`."""
        return cls({path: FileEntry(sha, size, tuple(stamp)) for path, (sha, size, *stamp) in json.loads(text).items()})


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of a JSON value, as hex; the order of keys does not matter. Raises TypeError for what is not JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def folder_manifest(folder: Path) -> Manifest:
    """Hashes every file below `folder`; a link counts as the file it points to. Raises as `plain_files` does."""
    return Manifest({path.relative_to(folder).as_posix(): file_entry(path) for path in plain_files(folder)})


def file_entry(path: Path) -> FileEntry:
    """Hashes one file; the marks are taken first, so that a change during the hashing shows afterwards."""
    size, stamp = file_marks(path)
    return FileEntry(sha256_file(path), size, stamp)


def file_marks(path: Path) -> tuple[int, tuple[int, int, int]]:
    """Size and stamp of a file, without reading it."""
    status = path.lstat()
    return status.st_size, (status.st_ino, status.st_mtime_ns, status.st_ctime_ns)


def plain_files(folder: Path) -> list[Path]:
    """All files below `folder`, sorted by relative path.

    Raises ValueError for what has no bytes to hash: a socket, a pipe, a link to a folder or to nothing.
    """
    found = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    if strange := [path for path in found if not path.is_file()]:
        raise ValueError(f"{strange[0]} is no plain file")
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())
