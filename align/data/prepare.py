"""Data of a recipe made ready for a stage: read, checked, cleaned, mixed, split. The way in to this package.

    prepare(name, data, folder=..., seed=...)      -> PreparedData
    source_key(name, data, folder=..., seed=...)   -> hash of all that `prepare` depends on

A part of a mixture is prepared as if it stood alone, so that its held-out rows are the same in every mixture.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import random
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from align.data.examples import Example
from align.data.filters import Contamination, EqualPairs, ExactDuplicates, Filter, NearDuplicates
from align.data.mixture import by_weight, joined_report
from align.data.personal import masked
from align.data.prepared import DataReport, PreparedData, read_prepared, write_prepared
from align.data.reading import Reading, source_of
from align.data.rows import Numbers, Spool, canonical_row
from align.data.sources import content_sha256
from align.data.split import ALWAYS_HELD_OUT_ROWS, asked_in, held_out
from align.errors import AlignError, did_you_mean
from align.recipe.settings import DataSettings

__all__ = [
    "PREPARE_VERSION", "DataReport", "PreparedData", "canonical_row", "prepare", "read_prepared", "source_key",
    "write_prepared",
]  # fmt: skip

PREPARE_VERSION = 2  # raised whenever the same files and settings would give other rows
MANY_DROPPED = 0.5  # share of rows above which a report warns

Data = Mapping[str, DataSettings]


def prepare(name: str, data: Data, *, folder: Path, seed: int) -> PreparedData:
    """The data set `name` of a recipe that lies in `folder`. Raises AlignError for everything the user can mend."""
    _check_settings(name, data)
    spool = Spool()
    sides = _sides(name, data, folder, seed, spool)
    return PreparedData(sides.report.kind, spool.rows(sides.train), spool.rows(sides.test), sides.report)


def source_key(name: str, data: Data, *, folder: Path, seed: int) -> str:
    """Hash of the bytes of every file that `prepare` would read, of the settings, the seed and the code's version.

    Raises AlignError for a file that is not there.
    """
    _check_settings(name, data)
    content = json.dumps([PREPARE_VERSION, seed, _content(name, data, folder)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class _Sides:
    """Numbers, in the spool, of the rows of one data set."""

    train: Numbers
    test: Numbers
    report: DataReport


def _sides(name: str, data: Data, folder: Path, seed: int, spool: Spool) -> _Sides:
    return (_mixture if data[name].mix else _single)(name, data, folder, seed, spool)


# One source ----------------------------------------------------------------------------------------------------------


def _single(name: str, data: Data, folder: Path, seed: int, spool: Spool) -> _Sides:
    settings = data[name]
    report = DataReport()
    filters = _filters(name, data, folder)
    reading = Reading(source_of(settings, folder), settings)
    rows = _cleaned(reading, report, filters, spool, most=None if settings.shuffle else settings.limit)
    report.format = reading.format
    if settings.shuffle:
        rows, report.unused = _first(_shuffled(rows, seed), settings.limit)
    if settings.test is None:
        held = held_out(spool.openings(rows), settings.test_fraction, seed)
        test = rows[held]
    else:
        test = _test_rows(settings, folder, report, spool)
        held = asked_in(spool.openings(rows), spool.openings(test))
        report.test_overlap = int(held.sum())
    return _reported(name, _Sides(rows[~held], test, report), spool, held_out=settings.test_fraction > 0)


def _cleaned(
    reading: Reading, report: DataReport, filters: Mapping[str, Filter], spool: Spool, most: int | None
) -> Numbers:
    """The first `most` rows that pass every filter, counted in the report; rows after them are not looked at."""
    kept = array("q")
    for example in reading.examples():
        if reading.settings.mask_personal_data:
            example, count = masked(example)
            report.masked += count
        if _passes(example, filters):
            kept.append(spool.add(example))
            if len(kept) == most:
                break
    if warning := reading.finish():
        report.unusable += reading.problems.count
        report.warnings.append(warning)
    report.rows_read += reading.rows
    _count_dropped(report, filters)
    return _numbers(kept)


def _test_rows(settings: DataSettings, folder: Path, report: DataReport, spool: Spool) -> Numbers:
    """The rows of the file of held-out rows."""
    filters: dict[str, Filter] = {"equal_pairs": EqualPairs(), "duplicates": ExactDuplicates()}
    return _cleaned(Reading(source_of(settings, folder, settings.test), settings), report, filters, spool, most=None)


def _shuffled(rows: Numbers, seed: int) -> Numbers:
    order = array("q", rows.tobytes())
    random.Random(seed).shuffle(order)
    return _numbers(order)


def _first(rows: Numbers, most: int | None) -> tuple[Numbers, int]:
    """At most the first `most` rows, and how many are left over."""
    kept = rows[:most]
    return kept, len(rows) - len(kept)


def _numbers(rows: Iterable[int]) -> Numbers:
    return np.fromiter(rows, dtype=np.int64)


# Mixtures ------------------------------------------------------------------------------------------------------------


def _mixture(name: str, data: Data, folder: Path, seed: int, spool: Spool) -> _Sides:
    settings = data[name]
    parts = {part.data: _sides(part.data, data, folder, seed, spool) for part in settings.mix}
    report = joined_report({part: sides.report for part, sides in parts.items()})
    filters = _filters(name, data, folder)
    test = _passing(np.concatenate([sides.test for sides in parts.values()]), filters, spool)
    rows = {}
    for part, sides in parts.items():
        asked = asked_in(spool.openings(sides.train), spool.openings(test))
        report.test_overlap += int(asked.sum())
        rows[part] = _passing(sides.train[~asked], filters, spool)
    _count_dropped(report, filters)
    taken = by_weight(name, rows, {part.data: part.weight for part in settings.mix}, seed)
    train, left = _first(_shuffled(np.concatenate(list(taken.values())), seed), settings.limit)
    report.unused += left + sum(len(rows[part]) - len(taken[part]) for part in rows)
    report.parts = {part: len(numbers) for part, numbers in taken.items()}
    return _reported(name, _Sides(train, test, report), spool, held_out=True)


# Filters and report --------------------------------------------------------------------------------------------------


def _filters(name: str, data: Data, folder: Path) -> dict[str, Filter]:
    """Filters in the order in which rows pass them, under the names of their figures in the report."""
    settings = data[name]
    filters: dict[str, Filter] = {"equal_pairs": EqualPairs()}
    if settings.deduplicate:
        filters["duplicates"] = ExactDuplicates()
    if settings.decontaminate:
        others = (_evaluation(other, name, data, folder) for other in settings.decontaminate)
        filters["contaminated"] = Contamination(example for examples in others for example in examples)
    if settings.near_duplicates is not None:
        filters["near_duplicates"] = NearDuplicates(settings.near_duplicates)
    return filters


def _passes(example: Example, filters: Mapping[str, Filter]) -> bool:
    return all(one.keeps(example) for one in filters.values())


def _passing(rows: Numbers, filters: Mapping[str, Filter], spool: Spool) -> Numbers:
    return _numbers(number for number, example in zip(rows, spool.rows(rows), strict=True) if _passes(example, filters))


def _count_dropped(report: DataReport, filters: Mapping[str, Filter]) -> None:
    for figure, one in filters.items():
        setattr(report, figure, getattr(report, figure) + one.dropped)


def _evaluation(other: str, name: str, data: Data, folder: Path) -> Iterator[Example]:
    """All rows, untouched, of a data set of the recipe or of a file that data `name` must have nothing of."""
    for settings in _evaluation_settings(other, name, data, folder):
        for path in filter(None, (settings.path, settings.test)):
            reading = Reading(source_of(settings, folder, path), settings)
            yield from reading.examples()
            reading.finish()


def _evaluation_settings(other: str, name: str, data: Data, folder: Path) -> list[DataSettings]:
    if other == name:
        raise AlignError(f"data '{name}': `decontaminate:` names the data set itself")
    if other not in data:
        if not (folder / other).exists() and difflib.get_close_matches(other, data, n=1):
            raise AlignError(f"data '{name}': `decontaminate:` knows no '{other}'", did_you_mean(other, data))
        return [DataSettings(path=other)]
    if not data[other].mix:
        return [data[other]]
    return [one for part in data[other].mix for one in _evaluation_settings(part.data, name, data, folder)]


def _reported(name: str, sides: _Sides, spool: Spool, *, held_out: bool) -> _Sides:
    """The same, with a full report. Raises AlignError for rows of several kinds, or none."""
    train, test, report = sides.train, sides.test, sides.report
    kinds = spool.kinds(np.concatenate([train, test]))
    if len(kinds) > 1:
        raise AlignError(
            f"data '{name}': rows of several kinds: {', '.join(kinds)}", "Keep them in data sets of their own."
        )
    if not kinds:
        raise AlignError(f"data '{name}': no rows are left ({_dropped(report) or 'there were none'})")
    report.kind = kinds[0]
    report.train_rows, report.test_rows = len(train), len(test)
    report.shared_prompts = sum(len(rows) - len(np.unique(spool.openings(rows))) for rows in (train, test))
    if report.equal_pairs:
        report.warnings.append(
            f"{report.equal_pairs} pairs with equal answers were dropped: nothing is learnt from them"
        )
    if report.test_overlap:
        report.warnings.append(f"{report.test_overlap} training rows ask what held-out rows ask and were dropped")
    if held_out and not len(test):
        why = "every row asks the same" if len(train) >= ALWAYS_HELD_OUT_ROWS else f"there are only {len(train)}"
        report.warnings.append(f"no rows are held out: {why}")
    if len(train) + len(test) < (1 - MANY_DROPPED) * (report.rows_read - report.unused):
        report.warnings.append(f"most rows were dropped: {_dropped(report)}")
    return sides


def _dropped(report: DataReport) -> str:
    return ", ".join(
        f"{getattr(report, figure)} {figure.replace('_', ' ')}" for figure in DROPPED if getattr(report, figure)
    )


DROPPED = ("unusable", "equal_pairs", "duplicates", "near_duplicates", "contaminated", "test_overlap")


# Settings ------------------------------------------------------------------------------------------------------------

OF_A_SOURCE = ("format", "columns", "split", "subset", "revision", "test", "test_fraction", "mask_personal_data")


def _check_settings(name: str, data: Data, chain: tuple[str, ...] = ()) -> None:
    """Raises AlignError for a name that is not there, a mixture of itself, and settings that would have no effect."""
    if name in chain:
        raise AlignError(f"data: a mixture of itself: {' -> '.join((*chain, name))}")
    if name not in data:
        raise AlignError(f"there is no data set '{name}' in the recipe", did_you_mean(name, data))
    settings = data[name]
    parts = [part.data for part in settings.mix]
    idle = [key for key in OF_A_SOURCE if parts and getattr(settings, key) != _default(key)]
    if idle:
        raise AlignError(f"data '{name}': `{idle[0]}:` has no effect on a mixture", "Set it on the parts.")
    if settings.test and settings.test_fraction != _default("test_fraction"):
        raise AlignError(f"data '{name}': both `test:` and `test_fraction:` are given", "Keep one of them.")
    for part in parts:
        if parts.count(part) > 1:
            raise AlignError(f"data '{name}': part '{part}' stands twice in `mix:`", "Give it once, with its weight.")
        _check_settings(part, data, (*chain, name))


def _default(key: str) -> Any:
    return DataSettings.model_fields[key].default


def _content(name: str, data: Data, folder: Path) -> dict[str, Any]:
    """All that the rows of a data set depend on besides the seed, as JSON."""
    settings = data[name]
    return settings.model_dump(exclude={"path", "mix", "test", "decontaminate"}) | {
        "path": _path_content(settings, folder, settings.path),
        "test": _path_content(settings, folder, settings.test),
        "mix": [[part.data, part.weight, _content(part.data, data, folder)] for part in settings.mix],
        "decontaminate": [
            [
                one.model_dump(exclude={"path", "test"}),
                *(_path_content(one, folder, path) for path in (one.path, one.test)),
            ]
            for other in settings.decontaminate
            for one in _evaluation_settings(other, name, data, folder)
        ],
    }


def _path_content(settings: DataSettings, folder: Path, path: str | None) -> str | None:
    return content_sha256(source_of(settings, folder, path)) if path else None
