"""Saved states written one at a time: at once, or in a thread beside the training, where that would wait for the disk.

Where weights lie on an accelerator they are copied to the host anyway, and a thread can write, hash and sync the copy while
the accelerator goes on. On a CPU the thread would take its time from the training, and its memory twice.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from align.errors import Interrupted


class Saves:
    """Does one write at a time. aside: in a thread. Leaving its block waits for the last one, unless told to stop at once."""

    def __init__(self, *, aside: bool) -> None:
        self.aside = aside
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def begin(self, write: Callable[[], None]) -> None:
        """Calls `write`, now or in the thread. Raises what the write before failed with; what this one does, now or later."""
        if not self.aside:
            write()
            return
        self.wait()
        self._thread = Thread(target=self._run, args=(write,), name="saved state", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises what a write has failed with."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Until nothing is being written. Raises what it failed with."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def __enter__(self) -> Saves:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None and not issubclass(kind, Interrupted):
            self._thread.join()  # the error at hand is what people are told of

    def _run(self, write: Callable[[], None]) -> None:
        try:
            write()
        except BaseException as error:  # raised where the training waits for it
            self._error = error


def copied(state: Any) -> Any:
    """A nested state with its tensors as they are now, on the host."""
    return tree_map(lambda part: part.detach().to("cpu", copy=True) if isinstance(part, Tensor) else part, state)


def waits_for_disk(device: torch.device) -> bool:
    """Whether training on this device could go on while a state is written."""
    return device.type != "cpu"
