"""What can go, and why: checkpoints and data sets that nothing needs any more, caches, and what crashes left behind.

Kept: the newest of every name, everything tagged, the inputs of runs that run or can be resumed, and whatever any of
these was made from.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from align.registry import queries
from align.registry.artifacts import discard, folder_size
from align.registry.leftovers import DAY_SECONDS, leftovers
from align.registry.locks import FileLock
from align.registry.records import CheckpointRecord, DataRecord, RunRecord
from align.registry.references import ids_in
from align.registry.registration import clear_work, disposable, home_lock, is_uncleared

if TYPE_CHECKING:
    from align.registry.database import Database

CACHED_DAYS = 30  # for which what can be made again is kept since it was last used

AnyRecord = TypeVar("AnyRecord", CheckpointRecord, DataRecord)


@dataclass(frozen=True, slots=True)
class Removal:
    """One thing that goes. numbers: its rows, none for a mere folder; size in bytes."""

    what: Literal["checkpoint", "data", "leftover", "state", "cache"]
    id: str
    name: str
    path: Path
    size: int
    why: str
    numbers: tuple[int, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "what": self.what, "id": self.id, "name": self.name, "path": str(self.path), "bytes": self.size,
            "why": self.why,
        }  # fmt: skip


def collect(database: Database, home: Path, *, dry_run: bool) -> list[Removal]:
    """Removes what nothing needs and returns it; with `dry_run`, only returns it."""
    if dry_run:
        return _removals(database, home)
    with home_lock(home):
        removals = _removals(database, home)
        delete_rows(database, [r.numbers for r in removals if r.what == "checkpoint"], "checkpoints")
        delete_rows(database, [r.numbers for r in removals if r.what == "data"], "datasets")
        for removal in removals:
            if removal.what == "state":
                _clear_unless_held(removal.path)
            elif removal.path.is_file():
                removal.path.unlink(missing_ok=True)
            else:
                discard(removal.path)
    return removals


def _clear_unless_held(work: Path) -> None:
    """Drops the state of a run that nobody works on now."""
    lock = FileLock(work / "lock")
    if work.is_dir() and lock.acquire(wait_seconds=0):
        try:
            clear_work(work)
        finally:
            lock.release()


def delete_rows(database: Database, groups: Iterable[Sequence[int]], table_name: str) -> None:
    """Deletes rows by number, then the artifacts that no row points to any more. The folders are the caller's affair."""
    from sqlalchemy import delete, select

    from align.registry import schema

    numbers = [number for group in groups for number in group]
    if not numbers:
        return
    table = schema.metadata.tables[table_name]
    used = select(schema.checkpoints.c.artifact).union_all(select(schema.datasets.c.artifact))
    with database.write() as connection:
        for number in numbers:
            connection.execute(delete(table).where(table.c.number == number))
        connection.execute(delete(schema.artifacts).where(schema.artifacts.c.id.not_in(used)))


def pinning_runs(database: Database, home: Path) -> list[RunRecord]:
    """Runs whose inputs must stay: those that run, and those unfinished ones that are the last word on their key."""
    last = database.read("SELECT id FROM runs r WHERE number = (SELECT max(number) FROM runs o WHERE o.key = r.key)")
    newest = {row["id"] for row in last}
    return [
        run
        for run in queries.runs(database, home, "r.status <> 'finished'")
        if run.status == "running" or (run.id in newest and run.work.is_dir())
    ]


def _removals(database: Database, home: Path) -> list[Removal]:
    checkpoints = queries.checkpoints(database, home)
    data = queries.datasets(database, home)
    runs = queries.runs(database, home)
    pins = pinning_runs(database, home)  # after all that is to be judged: what began meanwhile keeps its inputs
    inputs = {found for run in pins for found in ids_in(run.inputs_json)}
    made_data = {record.run for record in data}
    makers = {run.id: ids_in(run.inputs_json) for run in runs if run.id in made_data}
    roots = inputs | {r.id for r in checkpoints if r.tags} | _newest(checkpoints) | _newest(data)
    kept = _reachable(roots, _origins(checkpoints, data, makers))
    return [
        *_superseded(checkpoints, kept, "checkpoint"),
        *_superseded(data, kept, "data"),
        *(
            Removal("leftover", path.name, "", path, folder_size(path), "it was never registered: a crash left it")
            for path in leftovers(database, home)
        ),
        *_dead_state([run for run in runs if run.status != "running"], {run.id for run in pins}),
        *_unused(home),
    ]


def _newest(records: Sequence[CheckpointRecord] | Sequence[DataRecord]) -> set[str]:
    newest: dict[str, str] = {}
    for record in records:
        newest.setdefault(record.name, record.id)
    return set(newest.values())


def _origins(
    checkpoints: Sequence[CheckpointRecord], data: Sequence[DataRecord], makers: dict[str, set[str]]
) -> dict[str, set[str]]:
    """For each id, the ids it was made from; rows of equal content count together."""
    origins: dict[str, set[str]] = {}
    for record in checkpoints:
        origins.setdefault(record.id, set()).update(record.parents, (use.id for use in record.data))
    for dataset in data:
        origins.setdefault(dataset.id, set()).update(makers.get(dataset.run or "", ()))
    return origins


def _reachable(roots: set[str], origins: dict[str, set[str]]) -> set[str]:
    kept: set[str] = set()
    waiting = list(roots)
    while waiting:
        if (node := waiting.pop()) not in kept:
            kept.add(node)
            waiting.extend(origins.get(node, ()))
    return kept


def _superseded(records: Sequence[AnyRecord], kept: set[str], what: Literal["checkpoint", "data"]) -> list[Removal]:
    gone: dict[str, list[AnyRecord]] = {}
    for record in records:
        if record.id not in kept:
            gone.setdefault(record.id, []).append(record)
    return [
        Removal(
            what, rows[0].id, rows[0].name, rows[0].path, rows[0].size, "superseded; nothing kept needs it",
            tuple(row.number for row in rows),
        )
        for rows in gone.values()
    ]  # fmt: skip


def _dead_state(ended: Sequence[RunRecord], pinned: set[str]) -> list[Removal]:
    return [
        Removal("state", run.id, f"{run.recipe}/{run.stage}", run.work, _state_size(run), _why_dead(run))
        for run in ended
        if run.id not in pinned and is_uncleared(run.work)
    ]


def _unused(home: Path) -> list[Removal]:
    """Tokens and log-probabilities that nobody read for a while; whoever reads them sets their time."""
    removals = []
    for path in sorted(path for path in home.glob("cache/*/*") if not path.parent.is_symlink()):
        try:
            idle = time.time() - path.lstat().st_mtime
            size = path.lstat().st_size if path.is_file() else folder_size(path)
        except FileNotFoundError:
            continue
        if idle > CACHED_DAYS * DAY_SECONDS:
            why = f"not used for {CACHED_DAYS} days; it is made again where it is needed"
            removals.append(Removal("cache", path.name, "", path, size, why))
    return removals


def _state_size(run: RunRecord) -> int:
    return sum(folder_size(folder) for folder in disposable(run.work))


def _why_dead(run: RunRecord) -> str:
    return "the run is finished" if run.status == "finished" else "a later run with the same settings took over"
