"""A source as a stream of checked examples: format found, columns renamed, every bad row collected with its place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import NoReturn

from align.data.examples import Example
from align.data.formats import FORMATS, detect, read_row, renamed
from align.data.problems import Problem, Problems, Row, RowError
from align.data.sources import Source, find_source, read_rows
from align.errors import AlignError
from align.recipe.settings import DataSettings

SAMPLE_ROWS = 50  # rows that a format is detected from


def source_of(settings: DataSettings, folder: Path, path: str | None = None) -> Source:
    """The source of these settings; `path` (the file of held-out rows, say) instead of theirs. Raises AlignError."""
    return find_source(
        path or settings.path or "", folder, split=settings.split, subset=settings.subset, revision=settings.revision
    )


@dataclass(slots=True)
class Reading:
    """One pass over a source. Figures and problems grow as `examples` is consumed; `finish` judges them."""

    source: Source
    settings: DataSettings
    problems: Problems = field(default_factory=Problems)
    format: str = ""
    rows: int = 0

    def examples(self) -> Iterator[Example]:
        """The good rows of the source as examples."""
        rows = read_rows(self.source)
        sample = list(islice(rows, SAMPLE_ROWS))
        self.format = self._format(sample)
        for row in chain(sample, rows):
            self.rows += 1
            if isinstance(row, Problem):
                self.problems.add(row)
                continue
            try:
                yield read_row(self.format, renamed(row.fields, self.settings.columns))
            except RowError as error:
                self.problems.add(Problem(row.place, str(error)))

    def tolerable(self) -> bool:
        """Whether there are no bad rows, no more than the format is known to hold, or the recipe drops them."""
        if self.settings.bad_rows == "drop":
            return self.problems.count < self.rows
        return self.problems.count <= FORMATS[self.format].bad_share * self.rows

    def finish(self) -> str | None:
        """A warning about rows that were passed over, if the format allows so many; raises AlignError if it does not."""
        count = self.problems.count
        if not count:
            return None
        if not self.tolerable():
            raise AlignError(*self.problems.summary(self.rows))
        return f"{count} of {self.rows} rows are unusable and were dropped, the first: {self.problems.kept[0]}"

    def _format(self, sample: list[Row | Problem]) -> str:
        """The stated format, else the detected one. Raises AlignError when no row of the sample is readable."""
        if self.settings.format != "auto":
            return self.settings.format
        readable = []
        for row in sample:
            try:
                if isinstance(row, Row):
                    readable.append(renamed(row.fields, self.settings.columns))
            except RowError as error:
                self.problems.add(Problem(row.place, str(error)))
        if not readable:
            self._only_problems(sample)
        self.problems = Problems(self.problems.keep)
        try:
            return detect(readable)
        except AlignError as error:
            error.message = f"{self.source.name}: {error.message}"
            raise

    def _only_problems(self, sample: list[Row | Problem]) -> NoReturn:
        for row in sample:
            if isinstance(row, Problem):
                self.problems.add(row)
        raise AlignError(*self.problems.summary(len(sample)))
