"""Rows as they come from a source, and all that is wrong with them, each with its place.

A place is what an editor can jump to: `file:line`, or `file: row n` where a file has no lines. What a good row means
is the business of formats.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SHOWN = 20  # problems that an error lists in full


class RowError(ValueError):
    """What is wrong with one row, said without its place."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row as its source holds it."""

    place: str
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Problem:
    """One bad row."""

    place: str
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


@dataclass(slots=True)
class Problems:
    """Bad rows met so far: all are counted, the first `keep` are kept (None: all of them)."""

    keep: int | None = SHOWN
    count: int = 0
    kept: list[Problem] = field(default_factory=list)

    def add(self, problem: Problem) -> None:
        """Count one more bad row."""
        self.count += 1
        if self.keep is None or len(self.kept) < self.keep:
            self.kept.append(problem)

    def summary(self, rows: int) -> tuple[str, str]:
        """Message and hint of the error about them: the first ones, how many more, and what to do. rows: all that were read."""
        lines = [str(problem) for problem in self.kept[:SHOWN]]
        if self.count > len(lines):
            lines.append(f"and {self.count - len(lines)} more bad rows")
        total = f"{self.count} bad of {rows} rows; nothing was written."
        return "\n".join(
            lines
        ), f"{total} Mend or remove them, or set `bad_rows: drop`; `format:` and `columns:` set how rows are read."


def shown(value: object, limit: int = 60) -> str:
    """A value as an error message quotes it: on one line, control characters escaped, at most `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def text_flaw(value: Any) -> str | None:
    """The first NUL character or lone surrogate in the strings of a JSON value, described; None: there is none."""
    if isinstance(value, str):
        return _string_flaw(value)
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        return next((flaw for flaw in map(text_flaw, value) if flaw), None)
    return None


def _string_flaw(text: str) -> str | None:
    if "\0" in text:
        return f"a NUL character at position {text.index(chr(0))} of {shown(text)}"
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"half a surrogate pair (\\u{ord(text[error.start]):04x}) at position {error.start} of {shown(text)}"
    return None
