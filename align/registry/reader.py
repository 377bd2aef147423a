"""What the registry tells: data sets, runs and checkpoints, by name, id or key. Changes nothing; store.py does that."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align.errors import AlignError
from align.registry import queries
from align.registry.database import Database
from align.registry.hashing import Manifest
from align.registry.lineage import Lineage, children_of, trace
from align.registry.records import CheckpointRecord, DataRecord, MetricRow, RunRecord
from align.registry.references import RUN_PREFIX, chosen, is_id, only_one, parse_reference, starting


class Reader:
    """The registry of one home folder, to be asked."""

    def __init__(self, home: Path, database: Database) -> None:
        self.home = home
        self._database = database

    # Data sets

    def folder_of(self, record: CheckpointRecord | DataRecord) -> Path:
        """Where the files of a record are."""
        return record.path

    def data_by_key(self, key: str) -> DataRecord | None:
        """The newest data set that was made from what `key` is the hash of."""
        found = self._datasets("d.key = :key", key=key)
        return found[0] if found else None

    def data(self, reference: str) -> DataRecord:
        """The newest data set of that name, or the one whose id begins so. Raises AlignError for none or several."""
        name, prefix = parse_reference(reference)
        if named := self._datasets("d.name = :name", name=name):
            return chosen(named, prefix, "data set", reference)
        by_id = self._datasets("d.artifact BETWEEN :id AND :end", **starting(name)) if is_id(name, prefix) else []
        return only_one(by_id, "data set", reference, lambda: self._names("SELECT DISTINCT name FROM datasets"))

    def newest_data(self, beginning: str) -> list[DataRecord]:
        """The newest data set of each name that begins so, newest first."""
        found = self._datasets(queries.NEWEST.format(row="d", table="datasets"), names=f"{beginning}%")
        return [record for record in found if record.name.startswith(beginning)]

    def data_of(self, run_id: str) -> list[DataRecord]:
        """What a run made, newest first."""
        return self._datasets("d.run = :run", run=run_id)

    def data_with(self, identifier: str) -> list[DataRecord]:
        """All data sets of this content, newest first."""
        return self._datasets("d.artifact = :id", id=identifier)

    def each_data(self, limit: int | None = None) -> Iterator[DataRecord]:
        """As `all_data`, a page at a time."""
        return queries.by_pages(self._datasets, "d", limit)

    def all_data(self, limit: int | None = None) -> list[DataRecord]:
        """All data sets, or the newest `limit`, newest first."""
        return self._datasets(limit=limit)

    # Runs

    def run(self, id_prefix: str) -> RunRecord:
        """The run whose id begins so. Raises AlignError for none or several."""
        found = (
            self._runs("r.id BETWEEN :id AND :end", **starting(id_prefix)) if RUN_PREFIX.fullmatch(id_prefix) else []
        )
        newest = "SELECT id AS name FROM runs ORDER BY number DESC LIMIT 20"
        return only_one(found, "run", id_prefix, lambda: self._names(newest))

    def each_run(self, limit: int | None = None) -> Iterator[RunRecord]:
        """As `all_runs`, a page at a time."""
        return queries.by_pages(self._runs, "r", limit)

    def all_runs(self, limit: int | None = None) -> list[RunRecord]:
        """All runs, or the newest `limit`, newest first, each with the status that is true now."""
        return self._runs(limit=limit)

    def runs_of(self, recipe: str, stage: str) -> list[RunRecord]:
        """All runs of a stage, newest first."""
        return self._runs("r.recipe = :recipe AND r.stage = :stage", recipe=recipe, stage=stage)

    def last_runs(self, recipe: str) -> list[RunRecord]:
        """The newest run of each stage of a recipe, newest first."""
        newest = "r.number IN (SELECT max(number) FROM runs WHERE recipe = :recipe GROUP BY stage)"
        return self._runs(newest, recipe=recipe)

    def recipes(self) -> list[str]:
        """Names of all recipes that left a run, the newest first."""
        rows = self._database.read("SELECT recipe FROM runs GROUP BY recipe ORDER BY max(number) DESC")
        return [row["recipe"] for row in rows]

    def resumable(self, key: str) -> RunRecord | None:
        """The last run of that key that does not run now, if it did not finish and its folder is still there."""
        done = [run for run in self._runs("r.key = :key", key=key) if run.status != "running"]
        return done[0] if done and done[0].status != "finished" and done[0].work.is_dir() else None

    def metrics(self, run_id: str) -> list[MetricRow]:
        """Metrics of a run, by step and name."""
        return queries.metrics(self._database, run_id)

    # Checkpoints

    def checkpoint(self, reference: str) -> CheckpointRecord:
        """The checkpoint behind recipe/stage, recipe/stage@id, a tag or the beginning of an id.

        Raises AlignError with the nearest name when there is none, with the candidates when there are several.
        """
        name, prefix = parse_reference(reference)
        for condition in ("c.name = :name", "c.number IN (SELECT checkpoint FROM tags WHERE tag = :name)"):
            if named := self._checkpoints(condition, name=name):
                return chosen(named, prefix, "checkpoint", reference)
        by_id = self._checkpoints("c.artifact BETWEEN :id AND :end", **starting(name)) if is_id(name, prefix) else []
        known = "SELECT name FROM checkpoints UNION SELECT tag AS name FROM tags"
        return only_one(by_id, "checkpoint", reference, lambda: self._names(known))

    def knows(self, reference: str) -> bool:
        """Whether `checkpoint` would find something."""
        try:
            self.checkpoint(reference)
        except AlignError:
            return False
        return True

    def checkpoint_by_key(self, key: str) -> CheckpointRecord | None:
        """The newest checkpoint whose run had this key."""
        found = self._checkpoints("r.key = :key", key=key)
        return found[0] if found else None

    def newest_checkpoint(self, name: str) -> CheckpointRecord | None:
        """The newest checkpoint of exactly that name."""
        return next(iter(self._checkpoints("c.name = :name", limit=1, name=name)), None)

    def newest_checkpoints(self, beginning: str) -> list[CheckpointRecord]:
        """The newest checkpoint of each name that begins so, newest first."""
        found = self._checkpoints(queries.NEWEST.format(row="c", table="checkpoints"), names=f"{beginning}%")
        return [record for record in found if record.name.startswith(beginning)]

    def checkpoint_names(self) -> set[str]:
        """Names of all checkpoints."""
        return self._names("SELECT DISTINCT name FROM checkpoints")

    def checkpoint_count(self) -> int:
        """How many checkpoints there are."""
        return sum(row["number"] for row in self._database.read("SELECT count(*) AS number FROM checkpoints"))

    def checkpoint_lines(self, limit: int | None = None) -> Iterator[str]:
        """All checkpoints, or the newest `limit`, newest first, each as the JSON text of its `as_dict`."""
        return queries.checkpoint_lines(self._database, self.home, limit)

    def all_checkpoints(self, limit: int | None = None) -> list[CheckpointRecord]:
        """All checkpoints, or the newest `limit`, newest first."""
        return self._checkpoints(limit=limit)

    def checkpoints_of(self, run_id: str) -> list[CheckpointRecord]:
        """What a run made, newest first."""
        return self._checkpoints("c.run = :run", run=run_id)

    def files(self, record: CheckpointRecord | DataRecord) -> Manifest:
        """Files of an artifact as they were registered: hashes and sizes."""
        return queries.manifest(self._database, record.id)

    def parents(self, record: CheckpointRecord) -> list[CheckpointRecord]:
        """Checkpoints of the registry that this one was made from."""
        found = [self._checkpoints("c.artifact = :id", id=parent) for parent in record.parents]
        return [newest[0] for newest in found if newest]

    def children(self, record: CheckpointRecord) -> list[CheckpointRecord]:
        """Checkpoints that were made from this one, newest first."""
        return children_of(self._database, self.home, record.id)

    def lineage(self, reference: str) -> Lineage:
        """What a checkpoint was made from, all the way up, and what was made from it."""
        return trace(self._database, self.home, self.checkpoint(reference))

    def _checkpoints(self, condition: str = queries.ALL, **values: Any) -> list[CheckpointRecord]:
        return queries.checkpoints(self._database, self.home, condition, **values)

    def _datasets(self, condition: str = queries.ALL, **values: Any) -> list[DataRecord]:
        return queries.datasets(self._database, self.home, condition, **values)

    def _runs(self, condition: str = queries.ALL, **values: Any) -> list[RunRecord]:
        return queries.runs(self._database, self.home, condition, **values)

    def _names(self, sql: str) -> set[str]:
        return {row["name"] for row in self._database.read(sql)}
