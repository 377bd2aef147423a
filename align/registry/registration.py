"""From a finished folder to a row: the one place where artifacts enter the registry.

What a crash leaves, by the moment:
    while sealing        the run's folder; the run is `crashed` and can be resumed
    after `finish.json`  everything that the row needs; `recover` finishes the work
    after the rename     the same; a folder without row or finish.json is swept by gc
    after the commit     a finished run; nothing to mend

Equal content is stored once: a second run that ends at the same bytes gets a row of its own that points to the same
artifact, so the lineage of both is kept and neither costs space twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from align.registry.artifacts import REMOVED, discard, disk_errors_explained, publish, seal, write_synced
from align.registry.hashing import Manifest
from align.registry.locks import FileLock

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from align.registry.database import Database

FOLDERS = {"checkpoints": "checkpoints", "datasets": "data"}
PENDING = "finish.json"


@dataclass(frozen=True, slots=True)
class Output:
    """A folder that is to become an artifact, and the columns of its row that only the maker knows."""

    table: Literal["checkpoints", "datasets"]
    folder: Path
    columns: Mapping[str, Any]


def register(database: Database, home: Path, outputs: Sequence[Output], run_id: str | None) -> list[int]:
    """Seals, publishes and records the outputs; with them, the run is finished. Returns the numbers of their rows."""
    with disk_errors_explained(home):
        manifests = [seal(output.folder) for output in outputs]
        if run_id is not None:
            write_synced(home / "runs" / run_id / PENDING, _pending_text(home, outputs, manifests))
    return publish_all(database, home, list(zip(outputs, manifests)), run_id)


def target_path(output: Output, artifact: str) -> str:
    """Where an artifact of that id lies, relative to home."""
    return f"{FOLDERS[output.table]}/{artifact[:16]}"


@contextmanager
def home_lock(home: Path) -> Iterator[None]:
    """Held while artifacts come under their final name or go: no sweeper sees one that has no row yet.

    Raises AlignError where the folder cannot be written, StageFailed when the disk is full.
    """
    with disk_errors_explained(home), FileLock(home / "lock"):
        yield


def now() -> str:
    """The time as the registry writes it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def clear_work(work: Path) -> None:
    """Drops what only an unfinished run needs; the log stays."""
    for folder in disposable(work):
        discard(folder)
    for file in (*work.glob(f".{PENDING}-*"), work / PENDING):
        file.unlink(missing_ok=True)


def disposable(work: Path) -> list[Path]:
    """Folders that only an unfinished run needs, and what a killed sweep left of such."""
    return [work / "state", work / "artifact", *work.glob(f"{REMOVED}*")]


def is_uncleared(work: Path) -> bool:
    """Whether there is something that `clear_work` would drop; never in a folder that is only linked to.

    One look at the folder: a sweep looks at thousands.
    """
    try:
        names = [] if work.is_symlink() else [path.name for path in work.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return False
    return any(name in ("state", "artifact", PENDING) or name.startswith(REMOVED) for name in names)


def read_pending(home: Path, file: Path) -> list[tuple[Output, str]] | None:
    """The outputs that a run is about to record, each with its id; none when it has just done so.

    None for a file that cannot be read, or is not what `register` wrote.
    """
    try:
        if file.exists() and not file.is_file():
            return None  # a pipe might never end
        entries = json.loads(file.read_text(encoding="utf-8"))
        tables = {entry["table"] for entry in entries}
        if not tables or not tables <= FOLDERS.keys():
            return None
        return [(Output(e["table"], home / e["folder"], dict(e["columns"])), str(e["id"])) for e in entries]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, LookupError, TypeError):
        return None


def publish_all(
    database: Database, home: Path, ready: Sequence[tuple[Output, Manifest]], run_id: str | None
) -> list[int]:
    with home_lock(home):
        placed: list[tuple[Output, Manifest]] = []
        for output, manifest in ready:
            target = home / target_path(output, manifest.id)
            placed.append((output, publish(output.folder, target, manifest) if output.folder.is_dir() else manifest))
        with database.write() as connection:
            numbers = [_record(connection, output, manifest, run_id) for output, manifest in placed]
            if run_id is not None:
                _mark_finished(connection, run_id)
    return numbers


def _record(connection: Connection, output: Output, manifest: Manifest, run_id: str | None) -> int:
    from sqlalchemy import func, insert, select, update

    from align.registry import schema

    files = {"files": manifest.as_json(), "size": manifest.size}
    if connection.execute(select(schema.artifacts.c.id).where(schema.artifacts.c.id == manifest.id)).first():
        connection.execute(update(schema.artifacts).where(schema.artifacts.c.id == manifest.id).values(files))
    else:
        row = {"id": manifest.id, "path": target_path(output, manifest.id), "created": now(), **files}
        connection.execute(insert(schema.artifacts).values(row))
    table = schema.metadata.tables[output.table]
    number = connection.execute(select(func.coalesce(func.max(table.c.number), 0) + 1)).scalar_one()
    row = {"number": number, "artifact": manifest.id, "run": run_id, "created": now(), **output.columns}
    connection.execute(insert(table).values(row))
    return int(number)


def _mark_finished(connection: Connection, run_id: str) -> None:
    from sqlalchemy import update

    from align.registry.schema import runs

    connection.execute(update(runs).where(runs.c.id == run_id).values(status="finished", message="", ended=now()))


def _pending_text(home: Path, outputs: Sequence[Output], manifests: Sequence[Manifest]) -> str:
    return json.dumps([
        {
            "table": output.table, "id": manifest.id, "columns": dict(output.columns),
            "folder": output.folder.relative_to(home).as_posix(),
        }
        for output, manifest in zip(outputs, manifests)
    ])  # fmt: skip
