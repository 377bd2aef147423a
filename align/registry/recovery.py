"""After a crash or a full disk between the hashing of a result and its row: finishes what was ready. Nothing here guesses."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from align.registry import queries
from align.registry.hashing import Manifest, folder_manifest
from align.registry.locks import FileLock
from align.registry.records import RunRecord
from align.registry.references import printable
from align.registry.registration import PENDING, Output, clear_work, publish_all, read_pending, target_path

if TYPE_CHECKING:
    from align.registry.database import Database

logger = logging.getLogger(__name__)


def recover(database: Database, home: Path) -> list[str]:
    """Finishes what runs had ready when they ended between hashing and recording. Returns the ids of those runs.

    Needs the lock of the home folder to be free; a run that lives is left alone.
    """
    return [
        record.id
        for record in queries.runs(database, home, "r.status <> 'finished'")
        if record.status != "running" and (record.work / PENDING).exists() and _finish(database, home, record)
    ]


def _finish(database: Database, home: Path, record: RunRecord) -> bool:
    lock = FileLock(record.work / "lock")
    if not lock.acquire():
        return False
    try:
        if not queries.runs(database, home, "r.id = :id AND r.status <> 'finished'", id=record.id):
            return False  # another process was first
        ready = _ready(home, record.work / PENDING)
        if not ready:
            return False
        publish_all(database, home, ready, record.id)
        with suppress(OSError):  # it is registered all the same; gc sweeps what is left
            clear_work(record.work)
    finally:
        lock.release()
    return True


def _ready(home: Path, pending: Path) -> list[tuple[Output, Manifest]]:
    """The outputs that a run had ready, with what their files are now; none unless all are there and as they were."""
    outputs = read_pending(home, pending)
    if outputs is None:
        logger.warning(
            "%s cannot be read: the result that it may name is not recorded. Put it back, or remove it.",
            printable(str(pending)),
        )
    ready: list[tuple[Output, Manifest]] = []
    for output, artifact in outputs or ():
        place = output.folder if output.folder.is_dir() else home / target_path(output, artifact)
        try:
            manifest = folder_manifest(place)
        except ValueError:  # a link or a pipe was put there
            return []
        if manifest.id != artifact:
            return []
        ready.append((output, manifest))
    return ready
