"""Saved states of an unfinished run: written in place by the trainer, and trusted only once they are marked complete."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

KEPT = 2  # the newest complete state and the one before it
_MARK = "complete.json"


def complete_states(folder: Path) -> list[Path]:
    """Folders of the complete states, oldest first; what a killed save left behind is not among them."""
    found = [mark.parent for mark in folder.glob(f"checkpoint-*/{_MARK}")]
    return sorted(found, key=step_of)


def step_of(state: Path) -> int:
    """The optimiser step after which a state was saved."""
    return int(state.name.rpartition("-")[2])


def mark_complete(folder: Path, step: int) -> None:
    """Sync the state of `step` to disk, mark it complete, and only then delete all but the newest complete ones."""
    state = folder / f"checkpoint-{step}"
    for path in sorted(state.rglob("*")):
        if path.is_file():
            _sync(path)
    mark = state / _MARK
    aside = state / f"{_MARK}.aside"
    aside.write_text(json.dumps({"step": step}))
    _sync(aside)
    aside.rename(mark)
    _sync(state)
    for old in complete_states(folder)[:-KEPT]:
        (old / _MARK).unlink()
        shutil.rmtree(old)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
