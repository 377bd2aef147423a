"""Which rows are held out. A row's question alone decides, so a question never stands on both sides.

The place of a question is a hash of it and of the seed: it depends on no other row, and data sets of one recipe that
share questions hold out the same ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from align.data.examples import Example
from align.data.likeness import opening_key
from align.data.rows import Keys

ALWAYS_HELD_OUT_ROWS = 10  # from this many rows on, something is held out


def held_out(openings: Keys, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which rows, given by their questions, are held out: (N,), about `fraction` of the questions.

    With ten rows or more and two questions or more neither side is empty (unless the fraction is 0 or 1).
    """
    questions, first, question_of = np.unique(openings, return_index=True, return_inverse=True)
    places = np.array([_place(question.tobytes(), seed) for question in questions])
    held = places < fraction
    in_order = np.argsort(first)  # of equal places the one that comes first is taken
    if 0 < fraction < 1 and len(questions) > 1 and len(openings) >= ALWAYS_HELD_OUT_ROWS:
        if not held.any():
            held[in_order[np.argmin(places[in_order])]] = True
        elif held.all():
            held[in_order[np.argmax(places[in_order])]] = False
    elif fraction < 1 and held.all():
        held[:] = False
    return np.asarray(held[question_of], dtype=bool)


def asked_in(openings: Keys, others: Keys) -> NDArray[np.bool_]:
    """Which rows, given by their questions, ask what one of the others asks, (N,)."""
    return np.isin(openings, others)


def without_questions_of(trained: Sequence[Example], asked: Sequence[Example]) -> Sequence[Example]:
    """The rows of `asked` that ask nothing that `trained` asks; as they are where that is all of them."""
    keys = [opening_key(example) for example in asked]
    both = set(keys)
    taken = {key for key in map(opening_key, trained) if key in both}
    return [example for example, key in zip(asked, keys) if key not in taken] if taken else asked


def _place(key: bytes, seed: int) -> float:
    """In [0, 1), evenly spread over keys and unrelated between seeds."""
    digest = hashlib.blake2b(key, digest_size=7, salt=seed.to_bytes(16, "little", signed=True)).digest()
    return int.from_bytes(digest, "big") / 2**56
