"""Ties a home folder to its registry, so that a wrong ALIGN_HOME or ALIGN_REGISTRY_URL is an error and not a clean-up
of somebody's checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from align.errors import AlignError
from align.registry.artifacts import write_synced

if TYPE_CHECKING:
    from align.registry.database import Database

FILE = "registry-id"


def check_identity(database: Database, home: Path, *, create: bool) -> None:
    """Compares the id in the database with the one in the folder; writes it to a folder that has none yet.

    Raises AlignError when they differ.
    """
    rows = database.read("SELECT id FROM identity") if database.version() else []
    path = home / FILE
    if not rows:
        return
    if path.exists():
        written = path.read_text(encoding="utf-8").strip()
        if written != rows[0]["id"]:
            raise AlignError(
                f"{home} belongs to registry {written}, and the database is registry {rows[0]['id']}",
                f"Check ALIGN_HOME and ALIGN_REGISTRY_URL. If that registry is gone for good, remove {path}.",
            )
    elif create:
        write_synced(path, rows[0]["id"] + "\n")
