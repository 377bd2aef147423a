"""Text -> token ids, piece by piece, such that the pieces together are what the tokenizer makes of the whole.

A prompt and its reply are tokenised apart (a merge across the seam would be a context that generation never sees),
and text from the data never becomes a control token. Both need the ids of a piece from the middle of a text, and some
tokenizers (SentencePiece and its kin) put a space before whatever they are given: a piece is therefore tokenised
behind an anchor, which is taken off again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from align.errors import AlignError

# Noncharacters of Unicode: never valid in text that is exchanged, so they can mark what came from the data as text.
LITERAL_START, LITERAL_END = "\ufdd0", "\ufdd1"
_LITERAL = re.compile(f"{LITERAL_START}([^{LITERAL_START}{LITERAL_END}]*){LITERAL_END}|[{LITERAL_START}{LITERAL_END}]")


@dataclass(frozen=True, slots=True)
class _Part:
    """A stretch of one piece that is tokenised at once. literal: control tokens in it are plain text."""

    piece: int
    text: str
    literal: bool


class PieceTokenizer:
    """Tokenises a text that was cut into pieces. Never adds BOS or EOS: those are the template's."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._added = {token.content: i for i, token in added.items()}
        self._control = {i for i, token in added.items() if token.special} - {tokenizer.unk_token_id}
        newline, letter, both = self._encode(["\n", "a", "\na"])
        self._prefixes = both[len(newline) :] != letter

    def ids(self, pieces: Sequence[str]) -> list[list[int]]:
        """Token ids of each piece. Joined, the pieces are one text; what stands between LITERAL marks is only text."""
        parts = [part for index, piece in enumerate(pieces) for part in _parts(index, piece)]
        anchors = [self._anchor(before, part) for before, part in zip([None, *parts[:-1]], parts, strict=True)]
        texts = [anchor + part.text for anchor, part in zip(anchors, parts, strict=True)]
        plain = iter(self._encode([text for text, part in zip(texts, parts, strict=True) if not part.literal]))
        ids: list[list[int]] = [[] for _ in pieces]
        for part, text, anchor in zip(parts, texts, anchors, strict=True):
            anchored = self.literal(text) if part.literal else next(plain)
            ids[part.piece] += self._without(anchor, anchored, part)
        return ids

    def literal(self, text: str) -> list[int]:
        """Token ids of `text`, none of which is a control token, whatever the text says. Raises AlignError if one is."""
        ids = self._encode([text], literal=True)[0]
        if not self._control.isdisjoint(ids):
            raise AlignError(
                f"the tokenizer reads {text[:80]!r} as a control token even where it is plain text",
                "Mend or drop the rows whose text contains the tokenizer's control tokens.",
            )
        return ids

    def _anchor(self, before: _Part | None, part: _Part) -> str:
        """What is put before `part` so that it is tokenised as in the middle of its text; "" where nothing need be."""
        if before is None:
            return ""
        if not before.literal and not part.literal:
            token = next((token for token in self._added if before.text.endswith(token)), "")
            if token:
                return token
        if not self._prefixes:
            return ""
        return "a" if part.text[0].isspace() else "\n"

    def _without(self, anchor: str, anchored: list[int], part: _Part) -> list[int]:
        if not anchor:
            return anchored
        head = [self._added[anchor]] if anchor in self._added else self._encode([anchor])[0]
        if anchored[: len(head)] == head:
            return anchored[len(head) :]
        return self._encode([part.text], literal=part.literal)[0]  # the anchor merged with the text

    def _encode(self, texts: list[str], *, literal: bool = False) -> list[list[int]]:
        if not texts:
            return []
        encoded = self._tokenizer(texts, add_special_tokens=False, split_special_tokens=literal, verbose=False)
        return list(encoded["input_ids"])


def _parts(index: int, piece: str) -> list[_Part]:
    texts = _LITERAL.split(piece) if LITERAL_START in piece or LITERAL_END in piece else [piece]
    return [_Part(index, text, literal=i % 2 == 1) for i, text in enumerate(texts) if text]
