"""A run while it lives: its folder, its lock, its log and metrics, and how it ends.

    with registry.begin_run(...) as run:
        ...                                    # writes into run.artifact
        run.finish_checkpoint(...)

The lock is taken before the row is written and kept until the process is gone, so the registry can tell a run that
works from one that was killed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from align.errors import AlignError, Interrupted, StageFailed
from align.registry import queries
from align.registry.artifacts import discard, disk_errors_explained
from align.registry.locks import FileLock
from align.registry.records import CheckpointRecord, DataRecord, DataUse, to_json
from align.registry.references import check_name
from align.registry.registration import PENDING, Output, clear_work, now, register

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from align.registry.database import Database


@dataclass(frozen=True, slots=True)
class NewData:
    """A data set that a run made: `folder` lies in the run's `artifact` and becomes the registered one."""

    name: str
    key: str
    folder: Path
    info: Mapping[str, Any]


class Run:
    """Handle of a running run; the registry makes it. Leaving the block without a result records a failure.

    work: folder for state and logs, kept when the run does not finish. artifact: empty folder for the result.
    """

    def __init__(self, database: Database, home: Path, run_id: str) -> None:
        self.id = run_id
        self.work = home / "runs" / run_id
        self.artifact = self.work / "artifact"
        self._database = database
        self._home = home
        self._finished = False
        self._lock = FileLock(self.work / "lock")
        self._log = self.work / "log.txt"

    def begin(self, columns: Mapping[str, Any]) -> None:
        """Takes the lock and writes the row of a new run."""
        from sqlalchemy import func, insert, select

        from align.registry.schema import runs

        with self._locked() as connection:
            number = connection.execute(select(func.coalesce(func.max(runs.c.number), 0) + 1)).scalar_one()
            row = {"number": number, "id": self.id, "started": now(), **_running(), **columns}
            connection.execute(insert(runs).values(row))

    def resume(self) -> None:
        """Takes the lock of a run that stopped. Raises AlignError when another process has it in hand."""
        from sqlalchemy import update

        from align.registry.schema import runs

        with self._locked() as connection:
            unfinished = update(runs).where(runs.c.id == self.id, runs.c.status != "finished")
            if not connection.execute(unfinished.values(_running())).rowcount:
                raise AlignError(f"run {self.id} was finished by another process just now", "Run the command again.")

    def log(self, text: str) -> None:
        """Appends one line to the run's log."""
        with disk_errors_explained(self.work), self._log.open("a", encoding="utf-8") as stream:
            stream.write(text + "\n")

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Records numbers of one step; a number logged again for the same step replaces the first."""
        from sqlalchemy import text

        statement = text(
            "INSERT INTO metrics (run, step, name, value) VALUES (:run, :step, :name, :value)"
            " ON CONFLICT (run, step, name) DO UPDATE SET value = excluded.value"
        )
        rows = [{"run": self.id, "step": step, "name": name, "value": float(value)} for name, value in values.items()]
        if rows:
            with self._database.write(durable=False) as connection:
                connection.execute(statement, rows)

    def truncate_metrics(self, step: int) -> None:
        """Forgets every metric above `step`; called when a resumed run goes on from there."""
        from sqlalchemy import delete

        from align.registry.schema import metrics

        with self._database.write() as connection:
            connection.execute(delete(metrics).where(metrics.c.run == self.id, metrics.c.step > step))

    def finish_checkpoint(
        self,
        *,
        name: str,
        kind: str,
        parents: Sequence[str],
        data: Sequence[DataUse],
        metrics: Mapping[str, Any],
        versions: Mapping[str, str],
        samples: Sequence[Mapping[str, Any]] = (),
        template_sha256: str | None = None,
        tokenizer_sha256: str | None = None,
    ) -> CheckpointRecord:
        """Registers what lies in `artifact` as a checkpoint and ends the run. All or nothing, whatever dies in between."""
        columns = {
            "name": check_name(name), "kind": kind, "parents": to_json(parents), "data": to_json(data),
            "metrics": to_json(metrics), "samples": to_json(samples), "versions": to_json(versions),
            "template_sha256": template_sha256, "tokenizer_sha256": tokenizer_sha256,
        }  # fmt: skip
        (number,) = self._register([Output("checkpoints", self.artifact, columns)])
        return queries.checkpoints(self._database, self._home, "c.number = :number", number=number)[0]

    def finish_data(self, outputs: Sequence[NewData]) -> list[DataRecord]:
        """Registers data sets that this run made and ends the run."""
        numbers = self._register(
            [
                Output(
                    "datasets", new.folder, {"name": check_name(new.name), "key": new.key, "info": to_json(new.info)}
                )
                for new in outputs
            ]
        )
        return [queries.datasets(self._database, self._home, "d.number = :number", number=n)[0] for n in numbers]

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if not self._finished:
                self._record_end(error or StageFailed("the run ended without a result"))
        except AlignError:
            if error is None:
                raise
            # what ended the run is to be told, not that the registry had no room for it; it shows as crashed
        finally:
            self._lock.release()

    @contextmanager
    def _locked(self) -> Iterator[Connection]:
        """The transaction that makes the run known, with the lock held from before it; given back if it fails."""
        with disk_errors_explained(self.work):
            (self.work / "state").mkdir(parents=True, exist_ok=True)
            if not self._lock.acquire():
                raise AlignError(f"run {self.id} is running in another process", "Wait for it, or stop it first.")
        try:
            with disk_errors_explained(self.work):
                discard(self.artifact)
                self.artifact.mkdir()
                (self.work / PENDING).unlink(missing_ok=True)
            with self._database.write() as connection:
                yield connection
        except BaseException:
            self._lock.release()
            raise

    def _register(self, outputs: Sequence[Output]) -> list[int]:
        numbers = register(self._database, self._home, outputs, self.id)
        self._finished = True
        self._clear()
        return numbers

    def _clear(self) -> None:
        with suppress(OSError):  # the result is registered all the same; gc sweeps what is left
            clear_work(self.work)

    def _record_end(self, error: BaseException) -> None:
        """Writes how a run ended without a result. One that is finished stays so: a signal may come after its last commit."""
        from sqlalchemy import select, update

        from align.registry.schema import runs

        status = "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
        message = error.message if isinstance(error, AlignError | Interrupted) else f"{type(error).__name__}: {error}"
        ended = update(runs).where(runs.c.id == self.id).values(status=status, message=message, ended=now())
        finished = False
        try:
            with self._database.write() as connection:
                recorded = connection.execute(select(runs.c.status).where(runs.c.id == self.id)).scalar()
                finished = recorded == "finished"
                if not finished:
                    connection.execute(ended)
        finally:
            if not finished:
                with suppress(AlignError):  # a full disk has no room for its own story
                    self.log(f"{status}: {message}")
        if finished:
            self._clear()


def _running() -> dict[str, Any]:
    return {"status": "running", "message": "", "host": os.uname().nodename, "ended": None}
