"""Which rows are kept: no exact and no near duplicates, nothing of an evaluation set, no pair of equals.

Each filter is asked row by row, in order, and counts what it drops, so that a file of any length can pass through.
"""

from __future__ import annotations

import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

from align.data.examples import Example, Preference
from align.data.likeness import asked_text, opening_key, row_key, whole_text, words

SHINGLE_WORDS = 5
PERMUTATIONS = 128
LOOSER = 0.15  # candidates are looked for this far below the threshold, so that few true ones are missed
GRAM_WORDS = 8
GRAM_SHARE = 0.5  # of the 8-grams of an evaluation prompt; single ones are shared by innocent rows (Lambert 2024)


class Filter(Protocol):
    """Decides row by row; `dropped` counts."""

    dropped: int

    def keeps(self, example: Example) -> bool:
        """Whether the row stays, given all rows that were asked about before."""


class EqualPairs:
    """Drops pairs whose two answers are the same: nothing can be learnt from them."""

    def __init__(self) -> None:
        self.dropped = 0

    def keeps(self, example: Example) -> bool:
        """Whether the two answers differ."""
        equal = isinstance(example, Preference) and example.chosen == example.rejected
        self.dropped += equal
        return not equal


class ExactDuplicates:
    """Drops rows that equal an earlier one."""

    def __init__(self) -> None:
        self.dropped = 0
        self._seen: set[bytes] = set()

    def keeps(self, example: Example) -> bool:
        """Whether no earlier row has the same content."""
        key = row_key(example)
        new = key not in self._seen
        self._seen.add(key)
        self.dropped += not new
        return new


class NearDuplicates:
    """Drops rows whose 5-word shingles overlap those of an earlier kept row by more than `threshold` (Jaccard).

    MinHash (Broder 1997) finds the candidates; the similarity itself is then counted, not estimated.
    """

    def __init__(self, threshold: float) -> None:
        from datasketch import MinHash, MinHashLSH

        self.dropped = 0
        self.threshold = threshold
        self._empty = MinHash(num_perm=PERMUTATIONS, hashfunc=int)
        self._index = MinHashLSH(threshold=max(threshold - LOOSER, 0.05), num_perm=PERMUTATIONS)
        self._kept: list[array[int]] = []  # a tenth of the memory of sets

    def keeps(self, example: Example) -> bool:
        """Whether no earlier kept row is too similar."""
        shingles = _shingles(whole_text(example))
        sketch = self._empty.copy()
        sketch.update_batch(shingles)
        if any(
            _jaccard(shingles, frozenset(self._kept[other])) > self.threshold for other in self._index.query(sketch)
        ):
            self.dropped += 1
            return False
        self._index.insert(len(self._kept), sketch)
        self._kept.append(array("I", shingles))
        return True


class Contamination:
    """Drops rows that contain a prompt of `evaluation`: the same opening, or more than half of its 8-grams."""

    def __init__(self, evaluation: Iterable[Example]) -> None:
        self.dropped = 0
        self._openings: set[bytes] = set()
        self._prompts_with: dict[int, list[int]] = {}
        self._sizes: list[int] = []
        for example in evaluation:
            self._openings.add(opening_key(example))
            grams = _grams(asked_text(example), GRAM_WORDS)
            for gram in grams:
                self._prompts_with.setdefault(gram, []).append(len(self._sizes))
            self._sizes.append(len(grams))

    def keeps(self, example: Example) -> bool:
        """Whether the row has nothing of the evaluation set."""
        clean = opening_key(example) not in self._openings and not self._overlaps(example)
        self.dropped += not clean
        return clean

    def _overlaps(self, example: Example) -> bool:
        shared: Counter[int] = Counter()
        for gram in _grams(whole_text(example), GRAM_WORDS):
            shared.update(self._prompts_with.get(gram, ()))
        return any(count > GRAM_SHARE * self._sizes[prompt] for prompt, count in shared.items())


def _shingles(text: str) -> frozenset[int]:
    """The set of 5-word runs of a text, hashed; a shorter text is one run."""
    return _grams(text, SHINGLE_WORDS) or frozenset([_hashed(words(text) or [text])])


def _grams(text: str, size: int) -> frozenset[int]:
    found = words(text)
    return frozenset(_hashed(found[i : i + size]) for i in range(len(found) - size + 1))


def _hashed(run: Sequence[str]) -> int:
    """The same on every machine and in every process, which Python's own hash is not; 32 bits, as MinHash wants."""
    return zlib.crc32(" ".join(run).encode())


def _jaccard(one: frozenset[int], other: frozenset[int]) -> float:
    both = len(one & other)
    return both / (len(one) + len(other) - both)
