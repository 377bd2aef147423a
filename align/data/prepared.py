"""Data that is ready for a stage: examples for training, held-out examples, and what happened on the way.

On disk it is a folder: train.jsonl and test.jsonl with canonical rows, report.json. Nothing of `align` is needed to read
it. The examples are read when they are asked for, never all at once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from align.data.examples import Example
from align.data.rows import Rows, lines_of
from align.errors import AlignError

FILES = ("train.jsonl", "test.jsonl", "report.json")


@dataclass(slots=True)
class DataReport:
    """What was read, dropped and kept; all figures are rows unless they say otherwise."""

    format: str = ""
    kind: str = ""
    rows_read: int = 0
    unusable: int = 0  # bad rows that were dropped, as `bad_rows` or the format allows
    masked: int = 0  # personal data replaced, places
    equal_pairs: int = 0
    duplicates: int = 0
    near_duplicates: int = 0
    contaminated: int = 0
    test_overlap: int = 0  # left out of train because test asks the same
    unused: int = 0  # left out by the weights of a mixture or by `limit`
    shared_prompts: int = 0  # ask what an earlier kept row asks, on the same side
    train_rows: int = 0
    test_rows: int = 0
    parts: dict[str, int] = field(default_factory=dict)  # training rows of each part of a mixture
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class PreparedData:
    """Examples of one kind, ready for a stage."""

    kind: str
    train: Sequence[Example]
    test: Sequence[Example]
    report: DataReport


def write_prepared(prepared: PreparedData, folder: Path) -> None:
    """Write the prepared data into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    train, test, report = (folder / name for name in FILES)
    _write_rows(train, prepared.train)
    _write_rows(test, prepared.test)
    report.write_text(
        json.dumps(prepared.report.as_dict(), indent=1, sort_keys=True, ensure_ascii=False) + "\n", "utf-8"
    )


def read_prepared(folder: Path) -> PreparedData:
    """The data that `write_prepared` wrote. Raises AlignError when the folder is not complete."""
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise AlignError(f"{folder} is no prepared data: {', '.join(missing)} missing")
    train, test, report = (folder / name for name in FILES)
    values = json.loads(report.read_text("utf-8"))
    known = {item.name for item in fields(DataReport)}
    report_read = DataReport(**{key: value for key, value in values.items() if key in known})
    return PreparedData(report_read.kind, Rows.of_file(train), Rows.of_file(test), report_read)


def _write_rows(path: Path, examples: Sequence[Example]) -> None:
    with path.open("wb") as stream:
        stream.writelines(lines_of(examples))
