"""Immutable folders: made aside, synced, hashed, renamed into place. Knows files only; rows are the registry's affair.

The order is what a power cut asks for: the bytes of each file, then the folders that name them, then the rename, then
the folder that holds the new name. Whoever reads a folder under its final name reads all of it.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from align.errors import AlignError, StageFailed
from align.registry.hashing import Manifest, file_marks, folder_manifest, sha256_file

CLOCK_TICK_SECONDS = 0.02  # the coarsest step of file times on local file systems is 10 ms
NEW = ".new-"
REMOVED = ".removed-"


def seal(folder: Path) -> Manifest:
    """Makes the files of `folder` read-only, puts them on disk and hashes them.

    Raises AlignError for links and special files, StageFailed for an empty folder or a full disk.
    """
    files = _everything(folder)
    if strange := [path for path in files if path.is_symlink() or not path.is_file()]:
        raise AlignError(f"{strange[0]} is a link or a special file", "Put a plain copy of the file in its place.")
    if not files:
        raise StageFailed(f"there is nothing in {folder} to register")
    with disk_errors_explained(folder):
        for path in files:
            sync(path)
            path.chmod(0o444)
    time.sleep(CLOCK_TICK_SECONDS)  # an edit after the hashing is then sure to get another time than the files have now
    manifest = folder_manifest(folder)
    _sync_folders(folder)
    return manifest


def publish(folder: Path, target: Path, manifest: Manifest) -> Manifest:
    """Renames the sealed `folder` to `target` and returns the manifest of what lies there now.

    An equal folder that is there already stays, and ours goes. One that was damaged gives way: its content is its name,
    so ours is what it should have been.
    """
    with disk_errors_explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            if not problems(target, manifest, thorough=True):
                discard(folder)
                return folder_manifest(target)
            discard(target)
        folder.rename(target)
        sync(target.parent)
    return manifest


def problems(folder: Path, manifest: Manifest, *, thorough: bool) -> list[str]:
    """What is wrong with a published folder, one sentence a file; none when it is as it was registered.

    thorough: read every byte. Otherwise files whose size, inode and times are unchanged are trusted.
    """
    if not folder.is_dir():
        return [f"{folder} is missing"]
    present = {path.relative_to(folder).as_posix(): path for path in _everything(folder)}
    found = [f"{name} is missing" for name in manifest.files if name not in present]
    found += [f"{name} was added" for name in sorted(present) if name not in manifest.files]
    for name, entry in manifest.files.items():
        path = present.get(name)
        if path is None or (not thorough and file_marks(path) == (entry.size, entry.stamp)):
            continue
        if path.is_symlink() or not path.is_file():
            found.append(f"{name} is no longer a plain file")
        elif (size := path.stat().st_size) != entry.size:
            found.append(f"{name} has {size} bytes instead of {entry.size}")
        elif (now := sha256_file(path)) != entry.sha256:
            found.append(f"{name} has changed: its SHA-256 is {now[:16]}… instead of {entry.sha256[:16]}…")
    return found


def discard(folder: Path) -> None:
    """Removes a folder by way of another name, so that a crash half way leaves nothing half under the old one.

    Of a link only the link goes: what it points to is not ours.
    """
    if folder.is_symlink():
        folder.unlink(missing_ok=True)
    if not folder.is_dir():
        return
    doomed = folder.with_name(f"{REMOVED}{folder.name}-{os.getpid()}-{time.monotonic_ns()}")
    with suppress(FileNotFoundError):  # another process may be sweeping the same folder
        folder.rename(doomed)
        shutil.rmtree(doomed)


def write_synced(path: Path, text: str) -> None:
    """Replaces a small file, whole or not at all, on disk when this returns."""
    aside = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        sync(aside)
        aside.replace(path)
    except BaseException:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def folder_size(folder: Path) -> int:
    """Bytes of everything below `folder`, of what is there: its owner, or another process, may be sweeping it.

    Links are not followed; one in the place of the folder has nothing below it.
    """
    size = 0
    for place, folders, files in () if folder.is_symlink() else os.walk(folder):
        links = (name for name in folders if Path(place, name).is_symlink())
        for name in (*files, *links):
            with suppress(FileNotFoundError):
                size += Path(place, name).lstat().st_size
    return size


def _everything(folder: Path) -> list[Path]:
    """All that is no folder, links and special files included."""
    return [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]


def _sync_folders(folder: Path) -> None:
    for path in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Puts a file, or the names in a folder, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


NO_ROOM = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "allow larger files (ulimit -f), or set ALIGN_HOME to a disk that takes them",
}
WRITERS_WORDS = ("PytorchStreamWriter failed writing", "basic_ios::clear: iostream error")  # torch never says why


@contextmanager
def disk_errors_explained(place: Path) -> Iterator[None]:
    """Turns a full, broken or read-only disk below the block into StageFailed or AlignError; other errors pass."""
    try:
        yield
    except AlignError:
        raise
    except Exception as error:
        if why := _no_room(error):
            words, remedy = why
            hint = f"Nothing was registered and nothing is lost; {remedy} and resume."
            raise StageFailed(f"{place} cannot be written: {words}", hint) from error
        if not isinstance(error, OSError):
            raise
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            hint = "Set ALIGN_HOME to a folder that you may write."
            raise AlignError(f"{place} cannot be written: {error.strerror}", hint) from error
        if error.errno == errno.EIO:
            hint = "The disk reports an error; nothing was registered. Look at the disk, then resume."
            raise StageFailed(f"{place} cannot be read or written: {error.strerror}", hint) from error
        raise


def _no_room(error: BaseException | None) -> tuple[str, str] | None:
    """What a disk has no room for, and what to do, where an error, or what it came of, is that. Writers of tensors only say
    so in words."""
    if error is None:
        return None
    for number, remedy in NO_ROOM.items():
        if (isinstance(error, OSError) and error.errno == number) or os.strerror(number) in str(error):
            return os.strerror(number), remedy
    if any(words in str(error) for words in WRITERS_WORDS):
        return "the disk is full, or files may not be that large (ulimit -f)", "make room"
    return _no_room(error.__cause__ or error.__context__)
