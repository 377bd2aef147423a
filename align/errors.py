"""Everything that can go wrong in a way we foresaw, as one tree.

    AlignError            exit 2   the user's input: what is wrong, where, what to do
    ├── StageFailed       exit 1   the work itself failed (loss not finite, disk full)
    ├── CheckFailed       exit 3   a check that the user asked for did not hold (parity, verify)
    └── Interrupted       exit 130 or 143   stopped by a signal, state saved

Anything else that reaches the command line is a bug of ours and shows its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AlignError(Exception):
    """A problem that the user can mend. `hint` says how; it may be empty."""

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class StageFailed(AlignError):
    """The input was right and the work failed all the same."""

    exit_code = 1


class CheckFailed(AlignError):
    """A check that the user asked for did not hold."""

    exit_code = 3


class Interrupted(AlignError):
    """Stopped by a signal (2 or 15), with the state of the last complete step saved."""

    def __init__(self, signal_number: int, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.exit_code = 128 + signal_number


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence that names the nearest known word, or all of them when none is near."""
    options = sorted(known)
    near = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    if near:
        return f"Did you mean '{near[0]}'?"
    return "Known: " + ", ".join(options) + "." if options else "There are none."
