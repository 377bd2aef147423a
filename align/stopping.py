"""Ctrl-C, SIGTERM and SIGHUP: the first asks to stop at the next step boundary, the second stops now.

Work that can save its state runs inside `stops_at_boundary()` and looks at `stop_requested()`; anywhere else the first
signal raises Interrupted at once, since nothing there needs saving. A terminal that closes may send SIGHUP twice, by the
shell and by the system: only its first counts. A signal that is ignored when a run begins stays so.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from align.errors import Interrupted

_requested = 0
_adopted = 0  # of another process: not a first signal to this one
_at_boundary = False


def stopping_signals() -> list[signal.Signals]:
    """Those that stop a run: none that whoever started us has it ignore, as nohup does SIGHUP and a script's `&` SIGINT."""
    known = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    return [number for number in known if signal.getsignal(number) is not signal.SIG_IGN]


def stop_requested() -> int:
    """Number of the signal that asked to stop; 0 when none did."""
    return _requested or _adopted


def adopt_stop(number: int) -> None:
    """Stop here as well, since another process of this run was asked to."""
    global _adopted
    _adopted = number


@contextmanager
def stops_at_boundary() -> Iterator[None]:
    """In this block the first signal only sets the request."""
    global _at_boundary
    before, _at_boundary = _at_boundary, True
    try:
        yield
    finally:
        _at_boundary = before


@contextmanager
def signals_handled() -> Iterator[None]:
    """Handle the stopping signals in this block as the module says."""
    global _requested, _adopted
    _requested = _adopted = 0
    before = {number: signal.signal(number, _handle) for number in stopping_signals()}
    try:
        yield
    finally:
        _requested = _adopted = 0
        for number, handler in before.items():
            signal.signal(number, handler)


def _handle(number: int, _frame: FrameType | None) -> None:
    global _requested
    if number == signal.SIGHUP and _requested:
        return
    again, _requested = bool(_requested), number
    if again or not _at_boundary:
        raise Interrupted(number, f"stopped by {signal.Signals(number).name}", "The same command starts where it can.")
