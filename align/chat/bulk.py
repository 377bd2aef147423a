"""Many rows -> tokens: in chunks, by several processes where there are enough rows, and kept by content.

The result does not depend on the number of processes. New processes are spawned: a fork of one that has run torch may
hang, and one that imports the tokenizer's library anew costs seconds, so small data stays in this one.
"""

from __future__ import annotations

import json
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import tokenizers
import transformers

from align.chat.encoded import Encoded, EncodedPair, LengthReport
from align.chat.encoder import Encoder
from align.chat.stored import Columns, StoredRows, as_columns, read_stored, short_lived, write_stored
from align.chat.templates import template_sha256
from align.data.examples import Conversation, Document, Example, Preference, Rated, example_from_row
from align.data.likeness import whole_text
from align.data.problems import shown
from align.data.rows import lines_of, rows_sha256
from align.errors import AlignError, StageFailed
from align.machine import this_machine
from align.progress import Progress
from align.registry.hashing import sha256_json

VERSION = 1  # raised whenever the same rows, tokenizer and policy would give other tokens
CHUNK_ROWS, CHUNK_BYTES = 500, 2**20
ROWS_A_PROCESS = 10_000  # tokenising so many takes some ten seconds; a process that starts, three

Chunk = tuple[Sequence[bytes], int]  # canonical lines, and how many rows came before them
Piece = tuple[Columns, LengthReport]


def encode_rows(
    encoder: Encoder, examples: Sequence[Example], kept: Path | None, progress: Progress, processes: int | None = None
) -> StoredRows:
    """The rows that the length policy leaves, read back where they are known; `encoder.lengths` counts them.

    kept: folder of what is known; None: nothing is kept. processes: None: as many as the machine and the data suggest.
    """
    if kept is None or not _own(encoder.tokenizer) or not _can_write(kept):
        with short_lived() as folder:
            stored = write_stored(folder, _pieces(encoder, examples, progress, processes))
    else:
        folder = kept / "tokens" / _key(encoder, examples)
        found = read_stored(folder)  # which may be no rows
        stored = found if found is not None else write_stored(folder, _pieces(encoder, examples, progress, processes))
    encoder.lengths.add(stored.report)
    return stored


def encoded(encoder: Encoder, example: Example) -> Sequence[Encoded | EncodedPair | None]:
    """The rows that an example becomes; None: left out by the length policy."""
    match example:
        case Document():
            return encoder.documents(example)
        case Conversation():
            return [encoder.conversation(example)]
        case Preference():
            return [encoder.preference(example)]
        case Rated():
            return [encoder.rated(example)]
    raise AssertionError("a prompt alone is not trained on")


def _key(encoder: Encoder, examples: Sequence[Example]) -> str:
    """Hash of all that decides the tokens."""
    tokenizer = encoder.tokenizer
    state = [tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map, template_sha256(tokenizer)]
    versions = [VERSION, transformers.__version__, tokenizers.__version__]
    return sha256_json([*versions, *state, encoder.policy, rows_sha256(examples)])


def _own(tokenizer: Any) -> bool:
    """Whether the tokenizer's whole state can be seen, and made again in another process: it is no code of a model's."""
    return tokenizer.is_fast and type(tokenizer).__module__.startswith("transformers.")


def _can_write(folder: Path) -> bool:
    """A registry that cannot be written can still be checked against."""
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return os.access(folder, os.W_OK)


# Work ----------------------------------------------------------------------------------------------------------------


def _pieces(
    encoder: Encoder, examples: Sequence[Example], progress: Progress, processes: int | None
) -> Iterator[Piece]:
    if processes is None:
        usable = int(this_machine().usable_cores) if _own(encoder.tokenizer) else 1
        processes = max(1, min(usable, len(examples) // ROWS_A_PROCESS))
    chunks = _chunks(lines_of(examples), encoder.lengths.rows)
    worker = Encoder(encoder.tokenizer, **encoder.policy)
    made = (_piece(worker, *chunk) for chunk in chunks) if processes == 1 else _in_processes(worker, chunks, processes)
    with progress.bar("tokenise", len(examples)) as bar:
        for columns, report in made:
            bar.advance(report.rows, tokens=len(columns["ids"]))
            yield columns, report


def _chunks(lines: Iterator[bytes], first: int) -> Iterator[Chunk]:
    chunk: list[bytes] = []
    size = 0
    for line in lines:
        chunk.append(line)
        size += len(line)
        if len(chunk) == CHUNK_ROWS or size > CHUNK_BYTES:
            yield chunk, first
            first, chunk, size = first + len(chunk), [], 0
    if chunk:
        yield chunk, first


def _piece(encoder: Encoder, lines: Sequence[bytes], first: int) -> Piece:
    encoder.lengths = LengthReport(rows=first)  # so that an error can name the row
    examples = (example_from_row(json.loads(line)) for line in lines)
    rows = [row for example in examples for row in _named(encoder, example) if row is not None]
    report = encoder.lengths
    report.rows -= first
    report.lengths = []  # they are a column
    return as_columns(rows), report


def _named(encoder: Encoder, example: Example) -> Sequence[Encoded | EncodedPair | None]:
    """As `encoded`; an error shows how the row begins."""
    try:
        return encoded(encoder, example)
    except AlignError as error:
        error.message = f"{shown(whole_text(example), 40)}: {error.message}"
        raise


def _in_processes(encoder: Encoder, chunks: Iterable[Chunk], processes: int) -> Iterator[Piece]:
    """Pieces in the order of the chunks. Only a few chunks are on their way at a time."""
    state = (encoder.tokenizer, encoder.policy)
    pool = ProcessPoolExecutor(processes, get_context("spawn"), _begin, state)
    waiting: deque[Future[Piece]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_piece_of_worker, *chunk))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise StageFailed("a process that tokenises was killed", "The machine may be short of memory.") from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker: Encoder


def _begin(tokenizer: Any, policy: dict[str, Any]) -> None:
    global _worker
    for number in (signal.SIGINT, signal.SIGHUP):  # the parent stops its workers
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a core each
    _worker = Encoder(tokenizer, **policy)


def _piece_of_worker(lines: Sequence[bytes], first: int) -> Piece:
    return _piece(_worker, lines, first)
