"""Standard output and standard error that outlive whoever reads them.

In `align run recipe.yaml | head`, or when a terminal closes, there is nobody left to tell, which is no reason to end a run in
its middle: from then on what is said is dropped, and the work ends with its own exit code.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any, TextIO


def outlive_readers() -> None:
    """Lets this process write on when its reader has gone. A full disk is said once, and only of standard output."""
    if sys.stdout is sys.__stdout__ and sys.stdout is not None:
        sys.stdout = _over(sys.stdout, "standard output")
    if sys.stderr is sys.__stderr__ and sys.stderr is not None:
        sys.stderr = _over(sys.stderr, None)


class Outlet(io.FileIO):
    """A descriptor to write to, which leads nowhere after its first error.

    title: what an error names; None: nobody is to be told. A reader that has gone is never an error.
    """

    def __init__(self, descriptor: int, title: str | None) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.title = title
        self.terminal = self.isatty()  # asked while it is there

    def write(self, data: Any) -> int:
        """data: bytes of any kind. Raises OSError, with the stream's title, for what cannot be written."""
        try:
            return super().write(data)
        except OSError as error:
            self._lead_nowhere()
            if self.title is None or error.errno == errno.EPIPE or (error.errno == errno.EIO and self.terminal):
                return memoryview(data).nbytes
            raise OSError(error.errno, error.strerror, self.title) from error

    def _lead_nowhere(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


def _over(stream: TextIO, title: str | None) -> TextIO:
    """The same text stream, over an outlet."""
    assert isinstance(stream, io.TextIOWrapper)
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(Outlet(stream.fileno(), title)),
        encoding=stream.encoding, errors=stream.errors, line_buffering=stream.line_buffering or stream.write_through,
    )  # fmt: skip
