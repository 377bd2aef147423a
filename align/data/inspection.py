"""What is in a data file, found without a recipe: form, number and length of its rows, repeats, and every bad row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from align.data.examples import Example
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


def inspect(settings: DataSettings, folder: Path) -> tuple[FileReport, list[Example]]:
    """The report on a file or hub data set, and its good rows.

    Raises AlignError when the source cannot be read at all or no format fits it.
    """
    reading = Reading(source_of(settings, folder), settings, Problems(keep=None))
    examples = list(reading.examples())
    texts = [whole_text(example) for example in examples]
    report = FileReport(
        path=reading.source.name,
        format=reading.format,
        kinds=tuple(sorted({example.kind for example in examples})),
        rows=reading.rows,
        bad_rows=tuple(reading.problems.kept),
        usable=bool(examples) and reading.tolerable(),
        duplicates=sum(not new for new in map(ExactDuplicates().keeps, examples)),
        equal_pairs=sum(not differs for differs in map(EqualPairs().keeps, examples)),
        shared_prompts=len(examples) - len(set(map(opening_key, examples))),
        words=_spread([len(words(text)) for text in texts]),
        characters=_spread([len(text) for text in texts]),
    )
    return report, examples


def _spread(values: Sequence[int]) -> Spread:
    if not values:
        return Spread(0, 0, 0)
    ordered = sorted(values)
    last = len(ordered) - 1
    return Spread(ordered[last // 2], ordered[round(0.95 * last)], ordered[-1])
