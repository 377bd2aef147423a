"""Rows that a user hands to a command: a file in any format of align.data, standard input, or a registered data set.

Every row is kept, in its order: nothing is filtered, split or shuffled here.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from align.data.examples import Document, Example, Messages, prompt_of
from align.data.prepared import read_prepared
from align.data.reading import Reading
from align.data.sources import Source, find_source
from align.errors import AlignError
from align.recipe.settings import DataSettings
from align.registry.store import Registry


def read_file(path: str) -> list[Example]:
    """All rows of a file (or hub data set). Raises AlignError that names the bad rows by file and line."""
    return _examples(find_source(path, Path()))


def read_text(text: str, name: str) -> list[Example]:
    """All rows of JSON lines that did not come from a file; `name` stands for it in errors."""
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        return _examples(Source(name, path=Path(file.name)))


def read_file_or_data_set(reference: str) -> list[Example]:
    """All rows of a file, or the held-out rows of a registered data set. Raises AlignError when it is neither."""
    if Path(reference).expanduser().exists():
        return read_file(reference)
    try:
        record = (registry := Registry.open(create=False)).data(reference)
    except AlignError as error:
        raise AlignError(error.message, f"{error.hint} A file of that name is not there either.".strip()) from error
    registry.check_unchanged(record)
    rows = list(read_prepared(record.path).test)
    if not rows:
        raise AlignError(f"data set {record.name} has no held-out rows", "Set test_fraction, or name a file.")
    return rows


def prompts_of(examples: list[Example], name: str) -> list[Messages]:
    """What each row asks. Raises AlignError for rows that ask nothing."""
    prompts = [() if isinstance(example, Document) else prompt_of(example) for example in examples]
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise AlignError(f"{name}: row {number} has no prompt", "A row needs a prompt, or messages to answer.")
    return prompts


def _examples(source: Source) -> list[Example]:
    reading = Reading(source, DataSettings(path=source.name))
    examples = list(reading.examples())
    reading.finish()
    return examples
