"""After a crash or a full disk between the hashing of a result and its row: finishes what was ready. Nothing here guesses."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from align.registry import queries
from align.registry.hashing import Manifest, folder_manifest
from align.registry.locks import FileLock
from align.registry.records import RunRecord
from align.registry.registration import PENDING, Output, clear_work, publish_all, target_path

if TYPE_CHECKING:
    from align.registry.database import Database


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
        if not (record.work / PENDING).exists():
            return False  # another process was first
        ready: list[tuple[Output, Manifest]] = []
        for entry in json.loads((record.work / PENDING).read_text(encoding="utf-8")):
            output = Output(entry["table"], home / entry["folder"], entry["columns"])
            place = output.folder if output.folder.is_dir() else home / target_path(output, entry["id"])
            if not place.is_dir() or (manifest := folder_manifest(place)).id != entry["id"]:
                return False
            ready.append((output, manifest))
        publish_all(database, home, ready, record.id)
        with suppress(OSError):  # it is registered all the same; gc sweeps what is left
            clear_work(record.work)
    finally:
        lock.release()
    return True
