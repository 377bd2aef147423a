"""The five things a row of data can be. Every stage reads these and nothing else.

An example knows how it looks as a JSON row (`row`) and back (`example_from_row`); this canonical form is what the
registry stores and hashes, whatever the user's file looked like.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `extra` holds what some templates use besides text (tool_calls, name), as plain JSON."""

    role: Role
    content: str
    extra: Mapping[str, Any] | None = None

    def row(self) -> dict[str, Any]:
        """The form that chat templates read."""
        return {"role": self.role, "content": self.content, **(self.extra or {})}


Messages = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Document:
    """Plain text of which every token is trained."""

    text: str

    kind = "text"

    def row(self) -> dict[str, Any]:
        """Canonical JSON row."""
        return {"text": self.text}


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns that end with the assistant's. `expected` is what a judge needs to know, passed through untouched."""

    messages: Messages
    tools: tuple[Mapping[str, Any], ...] = ()
    expected: Mapping[str, Any] | None = None

    kind = "conversation"

    def row(self) -> dict[str, Any]:
        """Canonical JSON row."""
        return _without_empty(messages=_rows(self.messages), tools=list(self.tools), expected=self.expected)


@dataclass(frozen=True, slots=True)
class Preference:
    """Two replies to one prompt. margin: by how much chosen is better; probability: that it is the better one, (0, 1]."""

    prompt: Messages
    chosen: Messages
    rejected: Messages
    margin: float | None = None
    probability: float | None = None
    expected: Mapping[str, Any] | None = None

    kind = "preference"

    def row(self) -> dict[str, Any]:
        """Canonical JSON row."""
        return _without_empty(
            prompt=_rows(self.prompt), chosen=_rows(self.chosen), rejected=_rows(self.rejected),
            margin=self.margin, probability=self.probability, expected=self.expected,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rated:
    """One reply with a thumb up or down (KTO)."""

    prompt: Messages
    completion: Messages
    desirable: bool
    expected: Mapping[str, Any] | None = None

    kind = "rated"

    def row(self) -> dict[str, Any]:
        """Canonical JSON row."""
        return _without_empty(
            prompt=_rows(self.prompt), completion=_rows(self.completion), label=self.desirable, expected=self.expected
        )


@dataclass(frozen=True, slots=True)
class Prompt:
    """Turns that end with the user's; the answer is still to come."""

    messages: Messages
    expected: Mapping[str, Any] | None = None

    kind = "prompt"

    def row(self) -> dict[str, Any]:
        """Canonical JSON row."""
        return _without_empty(prompt=_rows(self.messages), expected=self.expected)


Question = Conversation | Preference | Rated | Prompt  # what has a prompt that can be answered
Example = Document | Question


def example_from_row(row: Mapping[str, Any]) -> Example:
    """The example behind a canonical row; the inverse of `.row()`."""
    expected = row.get("expected")
    if "text" in row:
        return Document(row["text"])
    if "messages" in row:
        return Conversation(messages_from(row["messages"]), tuple(row.get("tools", ())), expected)
    prompt = messages_from(row["prompt"])
    if "chosen" in row:
        return Preference(
            prompt, messages_from(row["chosen"]), messages_from(row["rejected"]),
            row.get("margin"), row.get("probability"), expected,
        )  # fmt: skip
    if "completion" in row:
        return Rated(prompt, messages_from(row["completion"]), row["label"], expected)
    return Prompt(prompt, expected)


def prompt_of(example: Example) -> Messages:
    """The turns that a model would be asked to go on from: all before the last assistant turn. A document has none."""
    if isinstance(example, Document):
        return ()
    if isinstance(example, Preference | Rated):
        return example.prompt
    if isinstance(example, Prompt):
        return example.messages
    return example.messages[:-1]


def messages_from(rows: list[Mapping[str, Any]]) -> Messages:
    """Messages behind the rows of a canonical `messages` list."""
    return tuple(
        Message(r["role"], r["content"], {k: v for k, v in r.items() if k not in ("role", "content")} or None)
        for r in rows
    )


def _rows(messages: Messages) -> list[dict[str, Any]]:
    return [message.row() for message in messages]


def _without_empty(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None and value != []}
