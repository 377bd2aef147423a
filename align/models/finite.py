"""Weights that are not finite. A model with one of them gives NaN, which is then blamed on its rows or its settings.

They are looked for in the files, in pieces, as bits and without torch: so a check of a recipe can do it too, it takes less
time than the hash of the same file, and weights are seen that quantization would hide.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from align.errors import AlignError
from align.models.folders import errors_of
from align.models.source import Source, file_marks, weight_files

Bits = type[np.unsignedinteger[Any]]
INFINITY: dict[str, tuple[Bits, int]] = {  # as bits; what is above it, without the sign, is NaN
    "F64": (np.uint64, 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 0x7F80_0000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
}
DEAD = ".masked_bias"  # old GPT models saved this buffer of -1e9, infinite in float16, which nothing reads any more
PIECE = 2**18  # bytes; they stay in the cache of a processor


def require_finite_weights(source: Source) -> None:
    """Raises AlignError, naming file and tensor, when weights of a located source are infinite or NaN. Not for its base."""
    for file in weight_files(source):
        with errors_of(source.path):
            fault = _first_fault(str(file), *file_marks(file))
        if fault:
            raise AlignError(
                f"{file}: not all weights are finite: {fault}",
                "Nothing could be made of this model. Copy the file again, or take another checkpoint.",
            )


@lru_cache(maxsize=256)
def _first_fault(path: str, *_marks: int) -> str:
    """The first tensor that is not finite and what it holds, in words, or ''; a file is read once while its marks stay."""
    with Path(path).open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        start = file.tell()
        floats = {
            name: tensor
            for name, tensor in header.items()
            if tensor.get("dtype") in INFINITY and not name.endswith(DEAD)
        }
        for name, tensor in floats.items():
            integer, infinity = INFINITY[tensor["dtype"]]
            without_sign = integer(np.iinfo(integer).max >> 1)
            first, end = tensor["data_offsets"]
            file.seek(start + first)
            for piece in _pieces(file, end - first):
                largest = int((np.frombuffer(piece, integer) & without_sign).max())
                if largest >= infinity:
                    return f"{name} holds {'NaN' if largest > infinity else 'infinity'}"
    return ""


def _pieces(file: BufferedReader, size: int) -> Iterator[memoryview]:
    """The next `size` bytes of a file; each piece lies where the one before it lay."""
    room = memoryview(bytearray(min(size, PIECE)))
    for start in range(0, size, PIECE):
        piece = room[: size - start]
        file.readinto(piece)
        yield piece
