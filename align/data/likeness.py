"""When two rows are the same, ask the same, or nearly so: the keys and word sets that filters and split go by."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator

from align.data.examples import Document, Example, Messages, Preference, Rated, prompt_of

WORD = re.compile(r"\w+")
EDGE_MARKS = " .,;:!?\"'"


def row_key(example: Example) -> bytes:
    """Equal for rows with the same content, whatever file they come from; 16 bytes."""
    return _digest(json.dumps(example.row(), sort_keys=True))


def opening_key(example: Example) -> bytes:
    """Equal for rows that begin with the same question, but for case, space and marks around it; 16 bytes.

    It is the first user turn that counts, so the branches of one conversation belong together. For plain text it is
    the text.
    """
    text = example.text if isinstance(example, Document) else _user_texts(prompt_of(example))[0]
    plain = unicodedata.normalize("NFKC", text).casefold().replace("’", "'")
    return _digest(" ".join(plain.split()).strip(EDGE_MARKS) or text)


def words(text: str) -> list[str]:
    """The words of a text in small letters, without punctuation."""
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def asked_text(example: Example) -> str:
    """All that the user says before the answer; the text itself for plain text."""
    return example.text if isinstance(example, Document) else "\n".join(_user_texts(prompt_of(example)))


def whole_text(example: Example) -> str:
    """Every turn of the example, answers included."""
    return "\n".join(_texts(example))


def _texts(example: Example) -> Iterator[str]:
    if isinstance(example, Document):
        yield example.text
        return
    if isinstance(example, Preference):
        turns = example.prompt + example.chosen + example.rejected
    elif isinstance(example, Rated):
        turns = example.prompt + example.completion
    else:
        turns = example.messages
    for turn in turns:
        yield turn.content


def _user_texts(turns: Messages) -> list[str]:
    return [turn.content for turn in turns if turn.role == "user"]


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
