"""Files that people write by hand, read whole: a recipe, a judge, a constitution, a template. Never a pipe, never too much."""

from __future__ import annotations

from pathlib import Path

from align.errors import AlignError

MOST_BYTES = 2**20


def read_small(file: Path) -> bytes:
    """The bytes of a file that a hand could have written.

    Raises AlignError for a pipe or a device, which might never end, and for a file that is too large; OSError as `open` does.
    """
    if file.exists() and not file.is_file() and not file.is_dir():
        raise AlignError(f"{file}: a pipe or a device, not a file.", "Save its text in a file and name that.")
    with file.open("rb") as stream:
        content = stream.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise AlignError(
            f"{file} has more than {MOST_BYTES:,} bytes, which are the most that are read.", "Is this the right file?"
        )
    return content
