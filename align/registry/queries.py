"""Rows of the registry as records. All reading of tables is here; it is plain SQL, so that no listing loads SQLAlchemy."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from align.registry.hashing import Manifest
from align.registry.locks import is_held
from align.registry.records import CheckpointRecord, DataRecord, MetricRow, RunRecord, Status

if TYPE_CHECKING:
    from align.registry.database import Database, Row

AnyRecord = TypeVar("AnyRecord", CheckpointRecord, DataRecord, RunRecord)

PAGE_ROWS = 500
ALL = "1 = 1"
EVERYTHING = 2**62  # as a LIMIT; `LIMIT ALL` is not SQLite's, -1 not PostgreSQL's

CHECKPOINTS = """
    SELECT c.*, a.path, a.size, r.recipe, r.stage, r.key, r.settings
    FROM checkpoints c JOIN artifacts a ON a.id = c.artifact JOIN runs r ON r.id = c.run
    WHERE {condition} ORDER BY c.number DESC LIMIT {limit}
"""
LINES = """
    SELECT c.number, c.artifact AS id, c.name, c.kind, a.path, a.size AS bytes, r.stage, c.run, r.key, c.template_sha256,
        c.tokenizer_sha256, c.created, c.parents, c.data, c.metrics, c.versions, coalesce({recipe}, r.settings) AS recipe
    FROM checkpoints c JOIN artifacts a ON a.id = c.artifact JOIN runs r ON r.id = c.run
    WHERE c.number < :last ORDER BY c.number DESC LIMIT {limit}
"""
WRITTEN = ("parents", "data", "recipe", "metrics", "versions")  # columns that are JSON already
DATA = """
    SELECT d.*, a.path, a.size FROM datasets d JOIN artifacts a ON a.id = d.artifact
    WHERE {condition} ORDER BY d.number DESC LIMIT {limit}
"""
RUNS = "SELECT * FROM runs r WHERE {condition} ORDER BY r.number DESC LIMIT {limit}"

NEWEST = "{row}.number IN (SELECT max(number) FROM {table} WHERE name LIKE :names GROUP BY name)"


def checkpoints(
    database: Database, home: Path, condition: str = ALL, limit: int | None = None, **values: Any
) -> list[CheckpointRecord]:
    """Checkpoints for which the SQL condition holds, newest first. Tables: c, a (artifacts), r (runs)."""
    rows = database.read(CHECKPOINTS.format(condition=condition, limit=limit or EVERYTHING), **values)
    tags = tags_by_checkpoint(database) if rows else {}
    return [_checkpoint(row, home, tuple(tags.get(row["number"], ()))) for row in rows]


def datasets(
    database: Database, home: Path, condition: str = ALL, limit: int | None = None, **values: Any
) -> list[DataRecord]:
    """Data sets for which the SQL condition holds, newest first. Tables: d, a (artifacts)."""
    rows = database.read(DATA.format(condition=condition, limit=limit or EVERYTHING), **values)
    return [_data(row, home) for row in rows]


def runs(
    database: Database, home: Path, condition: str = ALL, limit: int | None = None, **values: Any
) -> list[RunRecord]:
    """Runs for which the SQL condition holds, newest first, with the status that is true now. Table: r."""
    return [
        _run(row, home) for row in database.read(RUNS.format(condition=condition, limit=limit or EVERYTHING), **values)
    ]


def by_pages(read: Callable[..., list[AnyRecord]], table: str, limit: int | None) -> Iterator[AnyRecord]:
    """The newest `limit` records, all without one, newest first, read a page at a time.

    Memory does not grow with the registry, and no reader holds on to an old state of it while somebody looks at a page.
    """
    last, left = EVERYTHING, limit or EVERYTHING
    while left and (page := read(f"{table}.number < :last", last=last, limit=min(left, PAGE_ROWS))):
        yield from page
        last, left = page[-1].number, left - len(page)


def checkpoint_lines(database: Database, home: Path, limit: int | None) -> Iterator[str]:
    """The newest `limit` checkpoints, each as the JSON text of its `as_dict`, read a page at a time.

    What the table has as JSON is put in as it stands: parsing it and writing it anew takes most of a long listing's time.
    """
    tags = tags_by_checkpoint(database)
    last, left = EVERYTHING, limit or EVERYTHING
    recipe = database.json_part("r.settings", "recipe")
    while left and (page := database.read(LINES.format(recipe=recipe, limit=min(left, PAGE_ROWS)), last=last)):
        last, left = page[-1]["number"], left - len(page)
        yield from (_line(row, home, tags.get(row["number"], [])) for row in page)


def _line(row: Row, home: Path, tags: list[str]) -> str:
    written = "".join(f', "{name}": {row.pop(name)}' for name in WRITTEN)
    del row["number"]
    line = f"{json.dumps({**row, 'path': str(home / row['path']), 'tags': tags})[:-1]}{written}}}"
    return line if line.isascii() else json.dumps(json.loads(line))  # nothing in it acts on a terminal


def metrics(database: Database, run_id: str) -> list[MetricRow]:
    """Metrics of a run, by step and name."""
    rows = database.read("SELECT step, name, value FROM metrics WHERE run = :run ORDER BY step, name", run=run_id)
    return [MetricRow(row["step"], row["name"], math.nan if row["value"] is None else row["value"]) for row in rows]


def tags_by_checkpoint(database: Database) -> dict[int, list[str]]:
    """Tags of each checkpoint, by its number."""
    found: dict[int, list[str]] = {}
    for row in database.read("SELECT tag, checkpoint FROM tags ORDER BY tag"):
        found.setdefault(row["checkpoint"], []).append(row["tag"])
    return found


def manifest(database: Database, artifact: str) -> Manifest:
    """Files of an artifact, as they were registered."""
    return Manifest.from_json(database.read("SELECT files FROM artifacts WHERE id = :id", id=artifact)[0]["files"])


def artifact_paths(database: Database) -> set[str]:
    """Folders of all artifacts, relative to home."""
    return {row["path"] for row in database.read("SELECT path FROM artifacts")}


def _checkpoint(row: Row, home: Path, tags: tuple[str, ...]) -> CheckpointRecord:
    return CheckpointRecord(
        number=row["number"], id=row["artifact"], name=row["name"], kind=row["kind"], path=home / row["path"],
        size=row["size"], stage=row["stage"], run=row["run"], key=row["key"], parents_json=row["parents"],
        data_json=row["data"], settings_json=row["settings"], template_sha256=row["template_sha256"],
        tokenizer_sha256=row["tokenizer_sha256"], metrics_json=row["metrics"], samples_json=row["samples"],
        versions_json=row["versions"], tags=tags, created=row["created"],
    )  # fmt: skip


def _data(row: Row, home: Path) -> DataRecord:
    return DataRecord(
        number=row["number"], id=row["artifact"], name=row["name"], key=row["key"], path=home / row["path"],
        size=row["size"], info_json=row["info"], run=row["run"], created=row["created"],
    )  # fmt: skip


def _run(row: Row, home: Path) -> RunRecord:
    work = home / "runs" / row["id"]
    return RunRecord(
        number=row["number"], id=row["id"], recipe=row["recipe"], stage=row["stage"], kind=row["kind"], key=row["key"],
        seed=row["seed"], status=_status(row, work / "lock"), message=row["message"], work=work, host=row["host"],
        started=row["started"], ended=row["ended"], settings_json=row["settings"], inputs_json=row["inputs"],
    )  # fmt: skip


def _status(row: Row, lock: Path) -> Status:
    """A run that says it is running is believed only while the kernel says that its lock is held.

    Of a run on another machine whose folder is not here, only the row can be believed.
    """
    stored: Status = row["status"]
    if stored != "running" or is_held(lock) or (row["host"] != os.uname().nodename and not lock.exists()):
        return stored
    return "crashed"
