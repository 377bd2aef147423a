"""Saved states of an unfinished run: written in place by the trainer, and trusted only once they are marked complete.

The mark is written last and holds size and hash of every file, so that neither what a killed save left behind nor a
file that was torn or edited since is ever gone on from: the state before it is, which is kept for that.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from align.registry.artifacts import sync
from align.registry.hashing import sha256_file

KEPT = 2  # the newest complete state and the one before it
FORMAT = 2  # of the files of a state, and what stands in them; a state of another format is not gone on from
_MARK = "complete.json"
_NAME = re.compile(r"checkpoint-[0-9]+")


def complete_states(folder: Path, say: Callable[[str], object] = lambda _: None) -> list[Path]:
    """Folders of the states that are complete and as they were saved, oldest first.

    say: is given one sentence for each that was complete and has changed since, with the file named.
    """
    found = []
    for state in _marked(folder):
        if why := damage(state):
            say(f"the saved state {state} is not used: {why}")
        else:
            found.append(state)
    return found


def damage(state: Path) -> str:
    """What is wrong with a state that is marked complete; '' where it is as it was saved."""
    try:
        mark = json.loads((state / _MARK).read_text(encoding="utf-8"))
        files = {str(name): (int(size), str(sha256)) for name, (size, sha256) in mark["files"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return f"{_MARK} cannot be read"
    if mark.get("format") != FORMAT:
        return "another version of align saved it"
    for name, (size, sha256) in files.items():
        path = state / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if sha256_file(path) != sha256:
            return f"{name} has changed"
    return ""


def step_of(state: Path) -> int:
    """The optimiser step after which a state was saved."""
    return int(state.name.rpartition("-")[2])


def mark_complete(folder: Path, step: int) -> None:
    """Sync the state of `step` to disk, mark it complete, and only then delete all but the newest complete ones."""
    state = folder / f"checkpoint-{step}"
    files = {}
    for path in sorted(state.rglob("*")):
        if path.is_file() and not path.name.startswith(_MARK):  # an old mark is about to be replaced
            sync(path)
            files[path.relative_to(state).as_posix()] = (path.stat().st_size, sha256_file(path))
    mark = state / _MARK
    aside = state / f"{_MARK}.aside"
    aside.write_text(json.dumps({"format": FORMAT, "step": step, "files": files}), encoding="utf-8")
    sync(aside)
    aside.replace(mark)
    sync(state)
    sync(folder)
    kept = _marked(folder)[-KEPT:]
    for old in folder.glob("checkpoint-*"):
        if old not in kept:  # older, or left by a save that was killed
            (old / _MARK).unlink(missing_ok=True)
            shutil.rmtree(old)


def _marked(folder: Path) -> list[Path]:
    states = (mark.parent for mark in folder.glob(f"checkpoint-*/{_MARK}"))
    return sorted((state for state in states if _NAME.fullmatch(state.name)), key=step_of)
