"""Everything that can go wrong in a way we foresaw, as one tree.

    AlignError            exit 2   the user's input: what is wrong, where, what to do
    ├── StageFailed       exit 1   the work itself failed (loss not finite, disk full)
    └── CheckFailed       exit 3   a check that the user asked for did not hold (parity, verify)

Interrupted, exit 129, 130 or 143, stands apart: stopped by a signal, state saved. It can come out of any line, so it is no
Exception, or whoever looks for a failure there would take it for one.

Anything else that reaches the command line is a bug of ours and shows its traceback.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable


class _InWords(BaseException):
    """What ends a command in words: what it was, and a hint, which may be empty."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class AlignError(_InWords, Exception):
    """A problem that the user can mend. `hint` says how."""

    exit_code = 2


class StageFailed(AlignError):
    """The input was right and the work failed all the same."""

    exit_code = 1


class CheckFailed(AlignError):
    """A check that the user asked for did not hold."""

    exit_code = 3


class Interrupted(_InWords):
    """Stopped by a signal (1, 2 or 15), with the state of the last complete step saved."""

    def __init__(self, signal_number: int, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.exit_code = 128 + signal_number


NOT_A_PLACE = {
    errno.EACCES: "Check its permissions.",
    errno.EPERM: "Check its permissions.",
    errno.EROFS: "Name a place that can be written.",
    errno.EISDIR: "Name a file.",
    errno.ENOTDIR: "A part of its path is a file, not a folder.",
    errno.ELOOP: "A link on its path leads back to itself.",
}
OF_THE_MACHINE = {
    errno.ENOSPC: "Free some space; what was complete is kept.",
    errno.EDQUOT: "Free some space; what was complete is kept.",
    errno.EFBIG: "Allow larger files (ulimit -f), or name a disk that takes them; what was complete is kept.",
    errno.EIO: "The disk reports an error: look at it, then try again.",
    errno.EMFILE: "Allow more open files: ulimit -n.",
}


def of_the_file_system(error: OSError) -> AlignError | None:
    """What the user or the machine can mend, where nothing nearer has explained it; None: it may be a fault of ours."""
    number, place = error.errno, error.filename
    if number == errno.ENAMETOOLONG:
        message = f"{str(place)[:60]!r}... is too long for the name of a file"
        return AlignError(message, "Is it the name of a file, or its text?")
    if number in NOT_A_PLACE and place:
        return AlignError(f"{place}: {str(error.strerror).lower()}", NOT_A_PLACE[number])
    if number in OF_THE_MACHINE:
        return StageFailed(f"{place or 'a file'}: {str(error.strerror).lower()}", OF_THE_MACHINE[number])
    return None


NO_MEMORY = (  # as torch says it
    "can't allocate memory",
    "Cannot allocate memory",
    "not enough memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that there was too little memory, on whatever device. torch's own is known by its name."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


NOT_LOADED = "failed to map segment from shared object"  # what the system's loader says of a library then


def of_the_memory(error: BaseException | None) -> StageFailed | None:
    """What is to be said of an error that nothing nearer has explained, where it, or what it came of, is too little memory."""
    if error is None:
        return None
    if NOT_LOADED in str(error):
        return StageFailed("there is too little memory to load the libraries", "Free some, or allow more: ulimit -v.")
    if lacks_memory(error):
        return StageFailed("out of memory", "Free some, or allow more: ulimit -v.")
    return of_the_memory(error.__cause__ or error.__context__)


MOST_NAMED = 30  # known words that one sentence lists: more than the keys of any stage but ppo
FEW_NAMED = 5


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence that names the nearest known word; when none is near, all of them, or the least far of many."""
    options = sorted(known)
    near = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    if near:
        return f"Did you mean '{near[0]}'?"
    if len(options) > MOST_NAMED:
        nearest = difflib.get_close_matches(word, options, n=FEW_NAMED, cutoff=0)
        return f"Known: {', '.join(nearest)} and {len(options) - FEW_NAMED} more."
    return "Known: " + ", ".join(options) + "." if options else "There are none."
