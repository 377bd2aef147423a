"""Ties a home folder to its registry, so that a wrong ALIGN_HOME or ALIGN_REGISTRY_URL, or a lost database, is an error and
not a clean-up of somebody's checkpoints: gc takes what no row names for what crashes left."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from align.errors import AlignError
from align.registry import queries
from align.registry.artifacts import write_synced
from align.registry.leftovers import is_ours
from align.registry.registration import FOLDERS
from align.small_files import read_small

if TYPE_CHECKING:
    from align.registry.database import Database

FILE = "registry-id"
ID = re.compile(r"[0-9a-f]{16}")
HINT = (
    "Check ALIGN_HOME and ALIGN_REGISTRY_URL, or put the lost database back. If it is gone for good, set ALIGN_HOME to a new "
    "folder: this one stays as it is, and its checkpoints can be used by their paths. (A new database here would know none "
    "of them, and `align checkpoints gc` would remove them.)"
)
REMOVE = "Remove it: a database that knows what lies in the folder writes it again."


def check_identity(database: Database, home: Path) -> None:
    """Raises AlignError when the folder belongs to another database, or, tied to none, holds what this one does not know."""
    written = _written(home)
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
    if unknown and _written(home):  # by now: another process was making the registry, and its first checkpoints
        check_identity(database, home)
    elif unknown:
        raise AlignError(f"{home} belongs to no registry, and the database does not know {unknown}", HINT)


def tie(database: Database, home: Path) -> None:
    """Writes the id of the database into a folder that has none yet."""
    if not _written(home):
        write_synced(home / FILE, f"{_id_of(database)}\n")


def _written(home: Path) -> str:
    """The id that the folder is tied to; '' where there is no file, or nothing in it. Raises AlignError for anything else."""
    file = home / FILE
    try:
        text = read_small(file).decode("utf-8", errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        raise AlignError(f"{file} cannot be read: {error.strerror}", REMOVE) from error
    except AlignError as error:  # no plain file, or one that is far too large
        raise AlignError(error.message, REMOVE) from error
    if text and not ID.fullmatch(text):
        raise AlignError(f"{file} is damaged: it holds no id of a registry", REMOVE)
    return text


def _id_of(database: Database) -> str:
    """'' where there is no database."""
    rows = database.read("SELECT id FROM identity")
    return str(rows[0]["id"]) if rows else ""


def _unknown(database: Database, home: Path) -> int:
    """How many artifacts are not in the database, as far as names tell."""
    paths = [path for place in FOLDERS.values() for path in (home / place).glob("[!.]*") if is_ours(path)]
    return len({f"{path.parent.name}/{path.name}" for path in paths} - queries.artifact_paths(database))
