"""The hash of a model folder that the registry does not hold, kept so that a plan does not read gigabytes."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from align.errors import AlignError
from align.registry.hashing import folder_manifest, sha256_json

if TYPE_CHECKING:
    from align.registry.store import Registry


def content_id(folder: Path, registry: Registry) -> str:
    """Hash of a foreign folder's files. Kept by size and change time of each file, so that a plan does not read gigabytes."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    seen = [[str(file), *_marks(file.stat())] for file in files]
    kept = registry.home / "cache" / "content-ids" / f"{sha256_json(seen)}.json"
    if kept.is_file():
        return str(json.loads(kept.read_text())["id"])
    try:
        found = folder_manifest(folder).id
    except ValueError as error:
        raise AlignError(f"the model in {folder} cannot be hashed: {error}", "Copy the folder again.") from error
    if registry.home.is_dir():
        with contextlib.suppress(OSError):  # a registry that cannot be written can still be planned with
            _keep(kept, json.dumps({"id": found}))
    return found


def _keep(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(f".{os.getpid()}")
    aside.write_text(text)
    aside.rename(file)


def _marks(status: os.stat_result) -> list[int]:
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
