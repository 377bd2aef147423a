"""What a crash left in the home folder and no row names: told from what people put there, and from what is still in use."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from align.registry import queries
from align.registry.artifacts import NEW, REMOVED
from align.registry.locks import is_held
from align.registry.references import printable
from align.registry.registration import FOLDERS, PENDING, read_pending, target_path

if TYPE_CHECKING:
    from align.registry.database import Database

DAY_SECONDS = 86400
MOST_SAID = 5
FINAL = re.compile(r"[0-9a-f]{16}|[0-9a-f]{12}")  # names of artifacts and of runs

logger = logging.getLogger(__name__)


def leftovers(database: Database, home: Path) -> list[Path]:
    """Folders, and links in the place of such, that nothing needs.

    What align did not make stays, and so does what may be a result that is not recorded yet; either is said.
    """
    pending = {file: read_pending(home, file) for file in sorted(home.glob(f"runs/*/{PENDING}"))}
    known = queries.artifact_paths(database)
    known |= {target_path(output, artifact) for outputs in pending.values() for output, artifact in outputs or ()}
    known |= {f"runs/{row['id']}" for row in database.read("SELECT id FROM runs")}
    places = [place for place in (*FOLDERS.values(), "runs") if (home / place).is_dir()]
    unknown = sorted(
        path for place in places for path in (home / place).iterdir() if f"{place}/{path.name}" not in known
    )
    _say_left([path for path in unknown if not (is_ours(path) or path.name.startswith("."))], "align did not make it")
    left = [path for path in unknown if is_ours(path) and (path.is_symlink() or not _in_use(path))]
    if unreadable := [file for file, outputs in pending.items() if outputs is None]:
        unsure = [path for path in left if path.parent.name != "runs" and FINAL.fullmatch(path.name)]
        _say_left(unsure, f"{unreadable[0]}, which cannot be read, may name it")
        left = [path for path in left if path not in unsure]
    return left


def is_ours(path: Path) -> bool:
    """Whether it has a name that align gives; a link of that name may stand for a folder that was moved to another disk."""
    named = path.name.startswith((NEW, REMOVED)) or FINAL.fullmatch(path.name)
    return bool(named) and (path.is_symlink() or not path.is_file())


def _say_left(paths: Sequence[Path], why: str) -> None:
    for path in paths[:MOST_SAID]:
        logger.warning(printable(f"{path} is left as it is: {why}"))
    if len(paths) > MOST_SAID:
        logger.warning(f"... and {len(paths) - MOST_SAID} more")


def _in_use(folder: Path) -> bool:
    """A run that begins, or a folder that somebody may still be filling; one that has just gone needs no sweeping."""
    try:
        young = time.time() - folder.stat().st_mtime < DAY_SECONDS
        begins = folder.parent.name == "runs" and not _was_locked(folder / "lock")
        return is_held(folder / "lock") or (young and (begins or folder.name.startswith(NEW)))
    except FileNotFoundError:
        return True


def _was_locked(lock: Path) -> bool:
    """Whether somebody has ever held it: the file is there, and empty, before its owner has locked it and left its number."""
    try:
        return lock.stat().st_size > 0
    except (FileNotFoundError, NotADirectoryError):
        return False
