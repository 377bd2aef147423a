"""Finished rows of a critique stage on disk: each is durable as soon as it is written, and read back after a stop."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from align.data.examples import Messages, messages_from
from align.errors import AlignError
from align.registry.artifacts import sync

Fault = str  # why a row is kept apart: a key of FAULTS
FAULTS = {
    "unfinished": "the answer was cut at max_new_tokens",
    "unanswered": "the answer is empty",
    "too_long": "the prompt, or a request about its answer, is longer than the model's context",
    "nothing_found": "the critic found nothing",
    "empty": "the revision is empty",
    "cut": "the revision was cut at max_new_tokens",
    "leaked": "the revision holds parts of the request",
    "repeated": "the revision repeats the prompt",
    "unchanged": "the revision is the answer once more",
    "worse": "the critic prefers the answer to its revision",
}


@dataclass(frozen=True, slots=True)
class Step:
    """One look at an answer. revision: None where none was asked for; fault: why the revision was not taken."""

    principle: str
    critique: str
    revision: str | None = None
    fault: Fault = ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two answers, by their places among the samples. probability: that the first is better, clamped; None: not known."""

    first: int
    second: int
    probability: float | None
    principles: tuple[str, ...]


@dataclass(slots=True)
class Row:
    """A prompt and all that was written about it.

    answers: sampled ones, "" for one that was cut; the first is what is revised. final: the last revision that was taken,
    or the answer. fault: why the revision is kept apart (see FAULTS), '' where it is not. preferred: probability, of the
    critic, that the revision is better than the answer; None: not asked.
    """

    index: int
    prompt: Messages
    answers: list[str]
    expected: Mapping[str, Any] | None = None
    steps: list[Step] = field(default_factory=list)
    final: str = ""
    fault: Fault = ""
    preferred: float | None = None
    comparisons: list[Comparison] = field(default_factory=list)

    @property
    def answer(self) -> str:
        """The answer that is revised."""
        return self.answers[0]

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**asdict(self), "prompt": [message.row() for message in self.prompt]}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Row:
        """The row behind its JSON form."""
        steps = [Step(**step) for step in found["steps"]]
        comparisons = [Comparison(**one | {"principles": tuple(one["principles"])}) for one in found["comparisons"]]
        return cls(**{**found, "prompt": messages_from(found["prompt"]), "steps": steps, "comparisons": comparisons})


class RowFile:
    """Rows in a file of JSON lines. A last line that a killed process left half-written is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self.rows = {row.index: row for row in self._read()}

    def add(self, rows: Iterable[Row]) -> None:
        """Appends rows and syncs them to disk; one that is there already is left as it is. Threads may call it."""
        with self._lock:
            new = [row for row in rows if row.index not in self.rows]
            _append(self.path, new)
            self.rows |= {row.index: row for row in new}

    def in_order(self) -> list[Row]:
        """All rows by their index, and so in the file too: threads finish them in any order."""
        order = sorted(self.rows)
        rows = [self.rows[index] for index in order]
        if order != list(self.rows) or not self.path.is_file():
            aside = self.path.with_suffix(".new")
            aside.unlink(missing_ok=True)
            _append(aside, rows)
            aside.replace(self.path)
            sync(self.path.parent)
            self.rows = {row.index: row for row in rows}
        return rows

    def _read(self) -> list[Row]:
        if not self.path.is_file():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return []
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        lines = whole.split(b"\n")[:-1]  # in a text other marks end lines too
        return [_row(self.path, number, line) for number, line in enumerate(lines, start=1)]


def _append(path: Path, rows: Iterable[Row]) -> None:
    """All of the rows, or none: half a line would spoil what is written after it."""
    lines = "".join(json.dumps(row.as_dict(), ensure_ascii=False) + "\n" for row in rows)
    before = path.stat().st_size if path.exists() else None
    try:
        with path.open("ab") as stream:
            stream.write(lines.encode("utf-8"))
            stream.flush()
            os.fsync(stream.fileno())
    except BaseException:
        with suppress(OSError):
            os.truncate(path, before or 0)
        raise
    if before is None:
        sync(path.parent)


def _row(path: Path, number: int, line: bytes) -> Row:
    try:
        return Row.from_dict(json.loads(line))
    except (ValueError, KeyError, TypeError) as error:
        raise AlignError(
            f"{path}, line {number}: this is no finished row", "Remove the line: its prompt is then asked once more."
        ) from error
