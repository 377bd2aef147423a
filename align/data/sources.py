"""Where rows come from: a file, an Arrow folder or a data set of the Hugging Face hub. The only importer of `datasets`.

A source is found and checked first (`find_source`), then read as a stream (`read_rows`). Text files are read by
text_files.py; what rows mean is not asked here.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.data.packed import UNREADABLE
from align.data.problems import Problem, Row, RowError, text_flaw
from align.data.text_files import read_csv, read_json
from align.errors import AlignError

TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
PACKED_SUFFIXES = tuple(inner + outer for inner in TEXT_SUFFIXES for outer in (".gz", ".zst"))
TABLE_SUFFIXES = (".parquet", ".arrow")
SUFFIXES = TEXT_SUFFIXES + PACKED_SUFFIXES + TABLE_SUFFIXES
HUB_PREFIX = "hf://datasets/"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
COMMIT = re.compile(r"[0-9a-f]{40}")
BATCH_ROWS = 500
Batch = list[Mapping[str, Any] | RowError]
DAMAGED = "The file is damaged, cut off, or of another kind; write or download it again."


@dataclass(frozen=True, slots=True)
class Source:
    """Rows that exist: either `path` (file or Arrow folder) or `hub_id` is set. `name` stands in every place."""

    name: str
    path: Path | None = None
    hub_id: str | None = None
    split: str = "train"
    subset: str | None = None
    revision: str | None = None


def find_source(
    text: str, folder: Path, *, split: str = "train", subset: str | None = None, revision: str | None = None
) -> Source:
    """The source that `path:` of a recipe in `folder` means; no network is used.

    Raises AlignError when there is no such file and the text does not look like a hub id.
    """
    hub_id = text.removeprefix(HUB_PREFIX)
    if hub_id == text:
        path = folder / os.path.expanduser(text)  # noqa: PTH111  # pathlib's raises for a user that does not exist
        if path.exists():
            return Source(text, path=_checked_path(path, text), split=split)
        _refuse_mistyped_path(text, path, folder)
    if not HUB_ID.fullmatch(hub_id):
        raise AlignError(f"'{text}' is neither a file nor a hub id", "A hub id is 'owner/name'.")
    return Source(hub_id, hub_id=hub_id, split=split, subset=subset, revision=revision)


def read_rows(source: Source) -> Iterator[Row | Problem]:
    """All rows of the source in its order, and a Problem in the place of each that cannot be read.

    Raises AlignError when the source as a whole cannot be read or holds no row.
    """
    empty = True
    for row in _rows(source):
        empty = False
        yield row
    if empty:
        raise AlignError(f"{source.name}: there are no rows in it", "Was the file written to the end?")


def content_sha256(source: Source) -> str:
    """Hash of all bytes of the source (for a hub data set: of its resolved commit), never of times or names."""
    digest = hashlib.sha256()
    if source.path is None:
        digest.update(f"{source.hub_id} {source.subset} {resolved_commit(source)}".encode())
        return digest.hexdigest()
    files = [source.path] if source.path.is_file() else sorted(p for p in source.path.rglob("*") if p.is_file())
    for file in files:
        digest.update(f"{file.relative_to(source.path).as_posix()}{_kind_of(file)}\0".encode())
        digest.update(_file_sha256(file, source.name))
    return digest.hexdigest()


def _file_sha256(file: Path, name: str) -> bytes:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").digest()
    except OSError as error:
        raise AlignError(f"{name}: cannot be read: {error.strerror or error}", UNREADABLE) from error


# Finding -------------------------------------------------------------------------------------------------------------


def _kind_of(path: Path) -> str:
    """The known ending of a file's name, in small letters; empty when it is not known."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def _checked_path(path: Path, text: str) -> Path:
    if path.is_dir():
        if not _is_arrow_folder(path):
            files = sorted(p.name for p in path.iterdir() if _kind_of(p))
            found = f" It holds {', '.join(files[:5])}: name one of them." if files else ""
            raise AlignError(f"'{text}' is a folder, but none that `datasets` saved", f"Give a file.{found}")
    elif not path.is_file():
        raise AlignError(f"'{text}' is a pipe or a device, not a file", "Save the rows in a file and name that.")
    elif not _kind_of(path):
        raise AlignError(f"'{text}' is a kind of file that is not known", f"Known: {', '.join(SUFFIXES)}.")
    return path


def _is_arrow_folder(path: Path) -> bool:
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _refuse_mistyped_path(text: str, path: Path, folder: Path) -> None:
    """Raises AlignError when a text that names no file was surely meant to."""
    near = _near_files(path, text)
    looks_like_path = (
        text.startswith(("/", ".", "~"))
        or "\\" in text
        or text.count("/") > 1
        or Path(text).suffix.lower() in (*TEXT_SUFFIXES, *TABLE_SUFFIXES, ".gz", ".zst", ".txt", ".yaml", ".zip")
        or ("/" in text and path.parent.is_dir())
        or not HUB_ID.fullmatch(text)
    )
    if not (near or looks_like_path):
        return
    hint = f"Did you mean '{near[0]}'?" if near else f"Files are looked for in {folder.resolve()}."
    raise AlignError(
        f"there is no file '{text}'", f"{hint} A hub data set of this name is written '{HUB_PREFIX}{text}'."
    )


def _near_files(path: Path, text: str) -> list[str]:
    """Files beside the one that was asked for with nearly its name, written the way the text was, nearest first."""
    if not path.parent.is_dir():
        return []
    names = {entry.name: entry.name for entry in path.parent.iterdir() if _kind_of(entry) or entry.is_dir()}
    stems = {entry.partition(".")[0]: entry for entry in names}
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.75)
    close += [stems[stem] for stem in difflib.get_close_matches(path.name.partition(".")[0], stems, n=3, cutoff=0.75)]
    return [str(Path(text).parent / name) for name in dict.fromkeys(close)]


# Reading -------------------------------------------------------------------------------------------------------------


def _rows(source: Source) -> Iterator[Row | Problem]:
    if source.path is None:
        return _table_rows(_hub_batches(source), source.name)
    kind = _kind_of(source.path)
    if kind == ".parquet":
        return _table_rows(_parquet_batches(source.path, source.name), source.name)
    if source.path.is_dir() or kind == ".arrow":
        return _table_rows(_arrow_batches(source.path, source), source.name)
    return (read_csv if kind.startswith((".csv", ".tsv")) else read_json)(source.path, source.name)


def _table_rows(batches: Iterable[Batch], name: str) -> Iterator[Row | Problem]:
    number = 0
    for batch in batches:
        for fields in batch:
            number += 1
            place = f"{name}: row {number}"
            if isinstance(fields, RowError):
                yield Problem(place, str(fields))
            else:
                flaw = text_flaw(fields)
                yield Problem(place, flaw) if flaw else Row(place, fields)


def _batch(table: Any) -> Batch:
    """Rows of an Arrow table, and in the place of one whose values Python cannot hold what is wrong with it."""
    try:
        return table.to_pylist()  # type: ignore[no-any-return]  # pyarrow is not typed
    except (ValueError, OverflowError):
        return [one for number in range(table.num_rows) for one in _single_row(table.slice(number, 1))]


def _single_row(table: Any) -> Batch:
    try:
        return table.to_pylist()  # type: ignore[no-any-return]
    except UnicodeDecodeError as error:
        return [RowError(f"not UTF-8: byte 0x{error.object[error.start]:02x} in a text of this row")]
    except (ValueError, OverflowError) as error:
        return [RowError(f"a value that cannot be read: {error}")]


def _parquet_batches(path: Path, name: str) -> Iterator[Batch]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                yield _batch(batch)
    except (pyarrow.ArrowException, OSError) as error:
        raise _no_table(name, "Parquet", error) from error


def _arrow_batches(path: Path, source: Source) -> Iterator[Batch]:
    import datasets
    import pyarrow

    try:
        loaded = datasets.load_from_disk(str(path)) if path.is_dir() else datasets.Dataset.from_file(str(path))
        if isinstance(loaded, datasets.DatasetDict):
            if source.split not in loaded:
                hint = f"Known: {', '.join(sorted(loaded))}."
                raise AlignError(f"{source.name}: has no split '{source.split}'", hint)
            loaded = loaded[source.split]
        yield from _dataset_batches(loaded)
    except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
        raise _no_table(source.name, "Arrow", error) from error


def _no_table(name: str, kind: str, error: Exception) -> AlignError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return AlignError(f"{name}: cannot be read as {kind}: {reason}", DAMAGED)


def _dataset_batches(dataset: Any) -> Iterator[Batch]:
    for table in dataset.with_format("arrow").iter(batch_size=BATCH_ROWS):
        yield _batch(table)


# Hub -----------------------------------------------------------------------------------------------------------------


def resolved_commit(source: Source) -> str:
    """The commit that the source's revision means now: asked from the hub, else what the local cache last saw.

    Raises AlignError when neither knows.
    """
    if source.revision and COMMIT.fullmatch(source.revision):
        return source.revision
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        commit = HfApi().dataset_info(str(source.hub_id), revision=source.revision, timeout=20).sha
    except (HTTPError, OSError, ValueError) as error:
        refs = Path(constants.HF_HUB_CACHE) / f"datasets--{str(source.hub_id).replace('/', '--')}" / "refs"
        known = refs / (source.revision or "main")
        if known.is_file():
            return known.read_text().strip()
        raise _hub_error(source, error) from error
    return str(commit)


def _hub_batches(source: Source) -> Iterator[Batch]:
    import datasets

    commit = resolved_commit(source)
    try:
        loaded = datasets.load_dataset(source.hub_id, source.subset, split=source.split, revision=commit)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise _hub_error(source, error) from error
    yield from _dataset_batches(loaded)


def _hub_error(source: Source, error: Exception) -> AlignError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return AlignError(
        f"'{source.name}' is no file here and cannot be read from the hub: {reason}",
        "Check the id, `split:`, `subset:` and `revision:`, or give the path of a local file.",
    )
