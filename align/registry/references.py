"""What a user may write for a checkpoint, a run or a data set, and the answer when it names nothing, or too much.

recipe/stage          the newest of that name
recipe/stage@1a2b     the one of that name whose id begins so
a-tag                 what the tag points to
1a2b3c                the id, or enough of its beginning
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

from align.errors import AlignError, did_you_mean

WORD = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}"
NAME = re.compile(rf"{WORD}(/{WORD})*")
TAG = re.compile(WORD)
REFERENCE = re.compile(rf"(?P<name>{WORD}(/{WORD})*)(@(?P<id>[0-9a-f]+))?")
ID = re.compile(r"[0-9a-f]{64}")
RUN_PREFIX = re.compile(r"[0-9a-f]{1,12}")
ID_PREFIX = re.compile(r"[0-9a-f]{4,64}")


class Named(Protocol):
    """A record that has an id; the newest comes first in every list here."""

    @property
    def id(self) -> str:
        """Content hash or run id."""


Record = TypeVar("Record", bound=Named)


def ids_in(json_text: str) -> set[str]:
    """Every content hash that a JSON text mentions."""
    return set(ID.findall(json_text))


def check_name(name: str) -> str:
    """The name itself. Raises AlignError for what could be mistaken for a path out of the registry, or an option."""
    return _checked(NAME, name, "name")


def check_tag(tag: str) -> str:
    """The tag itself. Raises AlignError for anything but one word."""
    return _checked(TAG, tag, "tag")


def parse_reference(reference: str) -> tuple[str, str]:
    """Name and id prefix ('' when there is none). Raises AlignError when the text cannot be a reference."""
    match = REFERENCE.fullmatch(reference)
    if match is None:
        raise AlignError(
            f"'{printable(reference)}' is no name of a checkpoint",
            "Write recipe/stage, recipe/stage@id, a tag, or the beginning of an id.",
        )
    return match["name"], match["id"] or ""


def is_id(name: str, prefix: str) -> bool:
    """Whether a parsed reference can be the beginning of an id."""
    return not prefix and ID_PREFIX.fullmatch(name) is not None


def starting(prefix: str) -> dict[str, str]:
    """The bounds of all ids that begin so, for SQL's BETWEEN, which an index answers."""
    return {"id": prefix, "end": f"{prefix}g"}  # the letter after the last of a hexadecimal number


def chosen(named: Sequence[Record], prefix: str, what: str, reference: str) -> Record:
    """Of the records of one name, the newest, or the one whose id begins with `prefix`. Raises as `only_one` does."""
    if not prefix:
        return named[0]
    matching = [record for record in named if record.id.startswith(prefix)]
    name = reference.partition("@")[0]
    return only_one(matching, what, reference, lambda: (f"{name}@{record.id[:8]}" for record in named))


def only_one(found: Sequence[Record], what: str, reference: str, known: Callable[[], Iterable[str]]) -> Record:
    """The newest of the records found, when they all have one id.

    known: names, asked for only where there is none. Raises AlignError then, with the nearest of them, or when there are
    several ids.
    """
    if not found:
        raise AlignError(f"no {what} '{printable(reference)}'", did_you_mean(reference, set(known())))
    ids = list(dict.fromkeys(record.id for record in found))
    if len(ids) > 1:
        listed = ", ".join(name[:16] for name in ids[:5]) + (", …" if len(ids) > 5 else "")
        raise AlignError(f"'{reference}' is the beginning of {len(ids)} ids: {listed}", "Write more of the id.")
    return found[0]


def printable(text: str) -> str:
    """The text with control characters written out, so that it cannot steer a terminal."""
    return "".join(char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in text)


def _checked(pattern: re.Pattern[str], text: str, what: str) -> str:
    if pattern.fullmatch(text) is None:
        raise AlignError(
            f"'{printable(text)}' cannot be a {what}",
            "Letters, digits, '_', '.' and '-', beginning with a letter or digit"
            + ("; '/' between the words." if what == "name" else "."),
        )
    return text
