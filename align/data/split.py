"""Which rows are held out. A row's question alone decides, so a question never stands on both sides.

The place of a question is a hash of it and of the seed: it depends on no other row, and data sets of one recipe that
share questions hold out the same ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

from align.data.examples import Example
from align.data.likeness import opening_key

ALWAYS_HELD_OUT_ROWS = 10  # from this many rows on, something is held out


def hold_out(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(train, test), about `fraction` of the questions in test, each in the order of the rows.

    With ten rows or more and two questions or more neither side is empty (unless the fraction is 0 or 1).
    """
    keys = [opening_key(example) for example in examples]
    places = {key: _place(key, seed) for key in keys}
    held = {key for key, place in places.items() if place < fraction}
    if 0 < fraction < 1 and len(places) > 1 and len(examples) >= ALWAYS_HELD_OUT_ROWS:
        if not held:
            held = {_extreme(min, places)}
        elif len(held) == len(places):
            held.remove(_extreme(max, places))
    elif fraction < 1 and len(held) == len(places):
        held = set()
    train = [example for example, key in zip(examples, keys) if key not in held]
    return train, [example for example, key in zip(examples, keys) if key in held]


def without_questions_of(test: Iterable[Example], examples: Iterable[Example]) -> list[Example]:
    """The examples that ask nothing that `test` asks."""
    asked = {opening_key(example) for example in test}
    return [example for example in examples if opening_key(example) not in asked]


def _extreme(choose: Callable[..., bytes], places: dict[bytes, float]) -> bytes:
    return choose(places, key=lambda key: places[key])


def _place(key: bytes, seed: int) -> float:
    """In [0, 1), evenly spread over keys and unrelated between seeds."""
    digest = hashlib.blake2b(key, digest_size=7, salt=seed.to_bytes(16, "little", signed=True)).digest()
    return int.from_bytes(digest, "big") / 2**56
