"""Ties a home folder to its registry, so that a wrong ALIGN_HOME or ALIGN_REGISTRY_URL, or a lost database, is an error and
not a clean-up of somebody's checkpoints: gc takes what no row names for what crashes left."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from align.errors import AlignError
from align.registry import queries
from align.registry.artifacts import write_synced
from align.registry.registration import FOLDERS

if TYPE_CHECKING:
    from align.registry.database import Database

FILE = "registry-id"
HINT = (
    "Check ALIGN_HOME and ALIGN_REGISTRY_URL, or put the lost database back. If it is gone for good, set ALIGN_HOME to a new "
    "folder: this one stays as it is, and its checkpoints can be used by their paths. (A new database here would know none "
    "of them, and `align checkpoints gc` would remove them.)"
)


def check_identity(database: Database, home: Path) -> None:
    """Raises AlignError when the folder belongs to another database, or, tied to none, holds what this one does not know."""
    path = home / FILE
    written = path.read_text(encoding="utf-8").strip() if path.exists() else ""
    present = _id_of(database)  # after the file: whoever writes that has made the database
    if written and written == present:
        return
    count = _unknown(database, home)
    unknown = f"{count} of the folders in {' and '.join(FOLDERS.values())}" if count else ""
    if written:
        found = f"the database is registry {present}" if present else "the database is missing or empty"
        raise AlignError(
            f"{home} belongs to registry {written}, and {found}{unknown and '; not in it: '}{unknown}", HINT
        )
    if unknown and path.exists():  # another process was making the registry, and its first checkpoints
        check_identity(database, home)
    elif unknown:
        raise AlignError(f"{home} belongs to no registry, and the database does not know {unknown}", HINT)


def tie(database: Database, home: Path) -> None:
    """Writes the id of the database into a folder that has none yet."""
    if not (home / FILE).exists():
        write_synced(home / FILE, f"{_id_of(database)}\n")


def _id_of(database: Database) -> str:
    """'' where there is no database."""
    rows = database.read("SELECT id FROM identity")
    return str(rows[0]["id"]) if rows else ""


def _unknown(database: Database, home: Path) -> int:
    """How many entries of the folders for artifacts are not in the database."""
    found = {f"{place}/{path.name}" for place in FOLDERS.values() for path in (home / place).glob("[!.]*")}
    return len(found - queries.artifact_paths(database))
