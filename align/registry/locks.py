"""Locks that the kernel gives back when their owner dies, however it dies. Nobody ever has to remove a lock file.

The file itself means nothing; only the `flock` on it does. It holds the owner's process id for the person who looks.
"""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from align.errors import StageFailed

PATIENCE_SECONDS = 600  # a damaged artifact of some hundred GB may be read again under the lock

_held: set[int] = set()


def _close_in_child() -> None:
    """A forked worker would keep its dead parent's lock alive."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


class FileLock:
    """A lock on a file, held until `release`, the end of the block, or the death of the process.

    shared: many may hold it together, but none beside a holder that does not share.
    """

    def __init__(self, path: Path, *, shared: bool = False) -> None:
        self._path = path
        self._mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        self._descriptor: int | None = None

    def acquire(self, *, wait_seconds: float = 2.0) -> bool:
        """Whether the lock was got in time. Two seconds outlast the glance of another process's `is_held`."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        deadline, pause = time.monotonic() + wait_seconds, 0.001
        while not _try_lock(descriptor, self._mode):
            if time.monotonic() >= deadline:
                os.close(descriptor)
                return False
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        if self._mode == fcntl.LOCK_EX:
            with suppress(OSError):  # a full disk: the lock is held all the same
                os.truncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._descriptor = descriptor
        _held.add(descriptor)
        return True

    def release(self) -> None:
        """Gives the lock back; harmless when it is not held."""
        if self._descriptor is not None and self._descriptor in _held:
            _held.discard(self._descriptor)
            os.close(self._descriptor)
        self._descriptor = None

    def __enter__(self) -> FileLock:
        if not self.acquire(wait_seconds=PATIENCE_SECONDS):
            owner = self._path.read_text().strip()
            raise StageFailed(f"{self._path} stayed locked by process {owner} for {PATIENCE_SECONDS} s", "Try again.")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def is_held(path: Path) -> bool:
    """Whether a living process holds the lock. Works on a read-only disk too; a missing file is a free lock."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        return not _try_lock(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, mode: int) -> bool:
    try:
        fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
