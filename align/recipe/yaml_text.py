"""YAML text -> a tree that remembers where each value was written. Bounded, without tags, and without YAML 1.1's surprises.

Built on the events of PyYAML's safe parser, so no Python object is ever made from a tag. What differs from PyYAML:

* scalars follow YAML 1.2: `1e-5` is a number, `on`, `yes`, `1:30` and dates are text, `010` is refused (8 or 10?);
* a key that stands twice is refused; keys are always text;
* size, depth and the number of values after expanding aliases are limited, so no file can take the machine down.

Left out: several documents in one file, tags, hexadecimal and octal numbers, keys that are lists or mappings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from align.errors import AlignError

MAX_CHARACTERS = 256 * 1024
MAX_DEPTH = 32
MAX_VALUES = 20_000
MAX_DIGITS = 30
MAX_SHOWN = 80

Scalar = str | int | float | bool | None

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"(?:(true|True|TRUE)|false|False|FALSE)")
_INT = re.compile(r"[-+]?[0-9]+")
_OCTAL_LOOK = re.compile(r"[-+]?0[0-9]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_INFINITE = re.compile(r"([-+]?)\.(inf|Inf|INF|nan|NaN|NAN)")


class Place(NamedTuple):
    """Where something was written: a file with a line from 1, or a command-line option (line 0)."""

    source: str
    line: int

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


@dataclass(frozen=True, slots=True)
class Node:
    """A value and its place. `text` is a scalar as written; `size` counts the values in it, aliases expanded."""

    value: Scalar | list[Node] | dict[str, Node]
    place: Place
    key_place: Place
    text: str = ""
    size: int = 1

    def plain(self) -> Any:
        """The value without places, as `yaml.safe_load` would give it."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def shown(self) -> str:
        """The value as an error message quotes it: short, control characters escaped."""
        is_number = isinstance(self.value, int | float) and not isinstance(self.value, bool)
        return self.text[:MAX_SHOWN] if is_number or (self.value is None and self.text) else shown(self.plain())


def shown(value: Any) -> str:
    """`value` for an error message: YAML's words for true, false and null, control characters escaped, cut when long."""
    if value is None or isinstance(value, bool):
        return {None: "empty", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def parse_yaml(text: str, source: str, *, numbered: bool = True) -> Node | None:
    """The tree behind YAML text, or None when there is nothing but comments.

    source: what error messages call the text; numbered: whether they add the line to it.
    Raises AlignError naming the line.
    """
    if len(text) > MAX_CHARACTERS:
        raise AlignError(
            f"{source} has {len(text):,} characters; at most {MAX_CHARACTERS:,} are read.",
            "Is this the right file? Data belongs into files of its own, named under `data:`.",
        )
    try:
        return _Composer(yaml.parse(text, Loader=yaml.SafeLoader), source, numbered).document()
    except yaml.reader.ReaderError as error:
        where = Place(source, text.count("\n", 0, error.position) + 1 if numbered else 0)
        raise AlignError(f"{where}: {_character(error.character)} does not belong into YAML.", "Remove it.") from None
    except yaml.MarkedYAMLError as error:
        raise _not_yaml(error, text, source, numbered) from None


def decoded(content: bytes, file: Path) -> str:
    """The text of a YAML file. Raises AlignError naming the line that is not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise AlignError(
            f"{file}:{line}: byte 0x{content[error.start]:02x} at offset {error.start} is not UTF-8.",
            f"Save the file as UTF-8, for example: iconv -f latin1 -t utf-8 {file.name}",
        ) from None


def scalar(text: str, place: Place) -> Scalar:
    """The value of an unquoted scalar by YAML 1.2's core schema, decimal numbers only."""
    if _NULL.fullmatch(text):
        return None
    if match := _BOOL.fullmatch(text):
        return match[1] is not None
    if _INT.fullmatch(text):
        return _whole_number(text, place)
    if _FLOAT.fullmatch(text):
        return float(text)
    if match := _INFINITE.fullmatch(text):
        return float(match[1] + match[2].lower())
    return text


def _whole_number(text: str, place: Place) -> int:
    if _OCTAL_LOOK.fullmatch(text):
        raise AlignError(
            f"{place}: {text[:40]} starts with 0: some YAML readers take it for an octal number.",
            f"Write {text[:40].lstrip('+-0') or '0'}, or '{text[:40]}' in quotes if it is text.",
        )
    if len(text) > MAX_DIGITS:
        raise AlignError(f"{place}: a number of {len(text)} digits.", "Put it in quotes if it is text.")
    return int(text)


class _Composer:
    """Builds nodes from parser events. The parser streams, so a limit stops it before it has read what lies beyond."""

    def __init__(self, events: Iterator[yaml.Event], source: str, numbered: bool) -> None:
        self.events = events
        self.source = source
        self.numbered = numbered
        self.anchors: dict[str, Node | None] = {}

    def document(self) -> Node | None:
        """The only document of the text."""
        root: Node | None = None
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent):
                if root is not None:
                    raise AlignError(f"{self.place(event)}: a second document starts here.", "Use one file for each.")
                root = self.node(next(self.events), 1)
        return None if root is None or (root.value is None and not root.text) else root

    def place(self, event: yaml.Event) -> Place:
        assert event.start_mark is not None
        return Place(self.source, event.start_mark.line + 1 if self.numbered else 0)

    def node(self, event: yaml.Event, depth: int) -> Node:
        place = self.place(event)
        if depth > MAX_DEPTH:
            raise AlignError(
                f"{place}: lists and mappings are nested more than {MAX_DEPTH} deep.", "Is this the right file?"
            )
        if isinstance(event, yaml.AliasEvent):
            return self.alias(event.anchor, place)
        assert isinstance(event, yaml.ScalarEvent | yaml.SequenceStartEvent | yaml.MappingStartEvent)
        if event.tag is not None:
            raise AlignError(
                f"{place}: the tag {shown(event.tag)} is not allowed here.",
                "Write the plain value; quotes make it text.",
            )
        if event.anchor:
            self.anchors[event.anchor] = None
        node = self.bounded(self.untagged(event, place, depth))
        if event.anchor:
            self.anchors[event.anchor] = node
        return node

    def untagged(self, event: yaml.Event, place: Place, depth: int) -> Node:
        if isinstance(event, yaml.ScalarEvent):
            text = _whole_characters(event.value, place)
            return Node(scalar(text, place) if event.style is None else text, place, place, text)
        if isinstance(event, yaml.SequenceStartEvent):
            return self.sequence(place, depth)
        return self.mapping(place, depth)

    def alias(self, anchor: str | None, place: Place) -> Node:
        if anchor is None or anchor not in self.anchors:
            raise AlignError(
                f"{place}: *{anchor} has no &{anchor} above it.",
                f"Mark the value it repeats with &{anchor}, or quote it.",
            )
        node = self.anchors[anchor]
        if node is None:
            raise AlignError(f"{place}: *{anchor} stands inside of its own &{anchor}.", "Write the value out.")
        return node

    def bounded(self, node: Node) -> Node:
        if node.size > MAX_VALUES:
            raise AlignError(
                f"{node.place}: more than {MAX_VALUES:,} values, aliases expanded.", "Write less, or fewer aliases."
            )
        return node

    def sequence(self, place: Place, depth: int) -> Node:
        items: list[Node] = []
        size = 1
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            items.append(self.node(event, depth + 1))
            size += items[-1].size
            if size > MAX_VALUES:
                break
        return Node(items, place, place, size=size)

    def mapping(self, place: Place, depth: int) -> Node:
        entries: dict[str, Node] = {}
        merged: list[Node] = []
        size = 1
        while not isinstance(event := next(self.events), yaml.MappingEndEvent) and size <= MAX_VALUES:
            key, key_place = self.key(event), self.place(event)
            is_merge = key == "<<" and isinstance(event, yaml.ScalarEvent) and event.style is None
            node = replace(self.node(next(self.events), depth + 1), key_place=key_place)
            size += node.size
            if is_merge:
                merged.append(node)
            elif key in entries:
                first = entries[key].key_place
                raise AlignError(
                    f"{key_place}: key {shown(key)} stands twice in one mapping, first at line {first.line}.",
                    "Remove one of them." if self.numbered else "",
                )
            else:
                entries[key] = node
        for node in merged:
            entries = {**_merged_entries(node), **entries}
        return Node(entries, place, place, size=size)

    def key(self, event: yaml.Event) -> str:
        if not isinstance(event, yaml.ScalarEvent) or event.tag is not None:
            raise AlignError(
                f"{self.place(event)}: a key has to be plain text.", "Put it in quotes if it starts oddly."
            )
        return _whole_characters(event.value, self.place(event))


def _whole_characters(text: str, place: Place) -> str:
    """Joins escaped surrogate pairs, as JSON writes characters beyond U+FFFF. Raises AlignError on half a pair, and on NUL."""
    if "\0" in text:
        raise AlignError(f"{place}: \\0, the character U+0000, does not belong into a setting.", "Remove it.")
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise AlignError(
            f"{place}: half of a surrogate pair (\\ud800 to \\udfff) is no character.",
            "Remove it, or write both halves.",
        ) from None


def _merged_entries(node: Node) -> Mapping[str, Node]:
    """Entries that `<<:` brings in, from one mapping or a list of them; earlier ones win."""
    parts = node.value if isinstance(node.value, list) else [node]
    entries: dict[str, Node] = {}
    for part in parts:
        if not isinstance(part.value, dict):
            raise AlignError(f"{node.key_place}: `<<` takes a mapping, as in `<<: *name`, not {part.shown()}.")
        entries = {**part.value, **entries}
    return entries


def _not_yaml(error: yaml.MarkedYAMLError, text: str, source: str, numbered: bool) -> AlignError:
    """The parser's complaint with the line it stumbled over and a caret under the character."""
    mark = error.problem_mark or error.context_mark
    problem = " ".join(part for part in (error.context, error.problem) if part)
    if mark is None:
        return AlignError(f"{source}: not valid YAML: {problem}.")
    if "'\\t'" in problem:
        problem = "a tab character; indent with spaces"
    place = Place(source, mark.line + 1 if numbered else 0)
    lines = text.split("\n")
    start = max(0, mark.column - 60)
    excerpt = "".join(c if c.isprintable() else " " for c in lines[min(mark.line, len(lines) - 1)][start : start + 100])
    return AlignError(f"{place}: not valid YAML: {problem}.", f"{excerpt}\n  {' ' * (mark.column - start)}^")


def _character(code: int | str) -> str:
    return f"the character U+{code if isinstance(code, int) else ord(code):04X}"
