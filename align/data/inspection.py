"""What is in a data file, found without a recipe: form, number and length of its rows, repeats, and every bad row."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from align.data.filters import EqualPairs, ExactDuplicates
from align.data.likeness import opening_key, whole_text, words
from align.data.problems import Problem, Problems
from align.data.reading import Reading, source_of
from align.recipe.settings import DataSettings


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, 95th percentile and largest of some whole numbers."""

    median: int
    p95: int
    largest: int


@dataclass(frozen=True, slots=True)
class FileReport:
    """What a file holds. bad_rows: every one, in order; usable: whether a recipe could use the file as it is."""

    path: str
    format: str
    kinds: tuple[str, ...]
    rows: int
    bad_rows: tuple[Problem, ...]
    usable: bool
    duplicates: int
    equal_pairs: int
    shared_prompts: int
    words: Spread
    characters: Spread

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON."""
        return asdict(self)


def inspect(settings: DataSettings, folder: Path) -> FileReport:
    """The report on a file or hub data set, from one pass over it.

    Raises AlignError when the source cannot be read at all or no format fits it.
    """
    reading = Reading(source_of(settings, folder), settings, Problems(keep=None))
    duplicates, equal_pairs = ExactDuplicates(), EqualPairs()
    kinds: set[str] = set()
    openings: set[bytes] = set()
    counted_words, characters = array("q"), array("q")
    for example in reading.examples():
        kinds.add(example.kind)
        openings.add(opening_key(example))
        duplicates.keeps(example)
        equal_pairs.keeps(example)
        text = whole_text(example)
        counted_words.append(len(words(text)))
        characters.append(len(text))
    return FileReport(
        path=reading.source.name,
        format=reading.format,
        kinds=tuple(sorted(kinds)),
        rows=reading.rows,
        bad_rows=tuple(reading.problems.kept),
        usable=bool(characters) and reading.tolerable(),
        duplicates=duplicates.dropped,
        equal_pairs=equal_pairs.dropped,
        shared_prompts=len(characters) - len(openings),
        words=_spread(counted_words),
        characters=_spread(characters),
    )


def _spread(values: Sequence[int]) -> Spread:
    if not values:
        return Spread(0, 0, 0)
    ordered = sorted(values)
    last = len(ordered) - 1
    return Spread(ordered[last // 2], ordered[round(0.95 * last)], ordered[-1])
