"""Standard output and standard error that outlive whoever reads them.

In `align run recipe.yaml | head`, or when a terminal closes, there is nobody left to tell, which is no reason to end a run in
its middle: from then on what is said is dropped, and the work ends with its own exit code. So it is from the start where a
stream is closed, or only open for reading.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from pathlib import Path
from typing import Any, TextIO, cast

NOBODY_READS = (errno.EPIPE, errno.EBADF)  # the reader has gone; the descriptor is itself one to read from


def outlive_readers() -> None:
    """Lets this process write on when its reader has gone. A full disk is said once, and only of standard output."""
    if sys.stdin is None:
        sys.stdin = _nowhere("r")
    sys.stdout = _outliving(sys.stdout, sys.__stdout__, "standard output")
    sys.stderr = _outliving(sys.stderr, sys.__stderr__, None)


class Outlet(io.FileIO):
    """A descriptor to write to, which leads nowhere after its first error.

    title: what an error names; None: nobody is to be told. That nobody reads it is never an error.
    """

    def __init__(self, descriptor: int, title: str | None) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.title = title
        self.terminal = self.isatty()  # asked while it is there

    def write(self, data: Any) -> int:
        """data: bytes of any kind. Raises OSError, with the stream's title, for what cannot be written."""
        try:
            while (written := super().write(data)) is None:  # its pipe is full, and whoever shares it has it not block
                self._wait()
        except OSError as error:
            self._lead_nowhere()
            if self.title is None or error.errno in NOBODY_READS or (error.errno == errno.EIO and self.terminal):
                return memoryview(data).nbytes
            raise OSError(error.errno, error.strerror, self.title) from error
        return written

    def _wait(self) -> None:
        """Until something can be written, or its reader has gone."""
        ready = select.poll()
        ready.register(self.fileno(), select.POLLOUT)
        ready.poll()

    def _lead_nowhere(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


def _outliving(stream: TextIO | None, own: TextIO | None, title: str | None) -> TextIO:
    """What is said from now on goes through this; who has put another stream in the place of Python's own keeps it."""
    if stream is None:
        return _nowhere("w")
    return _over(stream, title) if stream is own else stream


def _over(stream: TextIO, title: str | None) -> TextIO:
    """The same text stream, over an outlet."""
    assert isinstance(stream, io.TextIOWrapper)
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(Outlet(stream.fileno(), title)),
        encoding=stream.encoding, errors=stream.errors, line_buffering=stream.line_buffering or stream.write_through,
    )  # fmt: skip


def _nowhere(mode: str) -> TextIO:
    """In place of a stream that was closed before Python began. In their order each takes its own number, the lowest that is
    free: a file opened later would get it, and with it all that a library writes there.
    """
    return cast(TextIO, Path(os.devnull).open(mode, encoding="utf-8"))
