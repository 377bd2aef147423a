"""Key-value caches of decoding, which write new columns into their place.

transformers' own cache copies every key and value at each step, half the time of a small model's decoding. Layers with a
sliding window or a recurrent state stay transformers' own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

COLUMN_STEP = 64  # columns are allocated in such steps


def decoding_cache(config: Any, room_tokens: int) -> DynamicCache:
    """An empty cache for a model of this config and sequences of at most `room_tokens`, padding included."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer(room_tokens) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def is_plain(config: Any) -> bool:
    """Whether every layer of such a model keeps all keys and values and nothing else, as RaggedCache does."""
    layers = DynamicCache(config=config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values (B, heads, T, width) as views of buffers that hold `room_tokens` columns."""

    def __init__(self, room_tokens: int) -> None:
        super().__init__()
        self.room_tokens = room_tokens
        self.buffers: tuple[Tensor, Tensor] | None = None
        self.seen_tokens = 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Add columns; returns all keys and all values so far."""
        if self.buffers is None:
            self.lazy_initialization(key_states, value_states)
            self.buffers = _room(key_states, self.room_tokens), _room(value_states, self.room_tokens)
        start, self.seen_tokens = self.seen_tokens, self.seen_tokens + key_states.shape[-2]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start : self.seen_tokens] = states
        return self._show()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows, in this order."""
        if self.buffers is not None:
            keys, values = self.buffers
            rows = beam_idx.to(keys.device)
            self.buffers = keys.index_select(0, rows), values.index_select(0, rows)
            self._show()

    def _show(self) -> tuple[Tensor, Tensor]:
        assert self.buffers is not None
        self.keys, self.values = (buffer[:, :, : self.seen_tokens] for buffer in self.buffers)
        return self.keys, self.values


def _room(states: Tensor, columns: int) -> Tensor:
    rows, heads, _, width = states.shape
    return torch.empty((rows, heads, columns, width), dtype=states.dtype, device=states.device)


@dataclass(slots=True)
class _Place:
    """What the next forward pass does to every layer.

    Prefill (columns None): prompts, right-padded, go to the rows from `first` on, at column 0, or behind `prefix`.
    Reading (taken not None): the keys and values of all layers are put there, and nowhere else.
    Decoding: one column for each of the first len(columns) rows, at `columns` (rows,); the first `width` are shown.
    """

    rows: int = 0  # allocated
    room: int = 0  # columns allocated
    first: int = 0
    prefix: Sequence[tuple[Tensor, Tensor]] = ()
    taken: list[tuple[Tensor, Tensor]] | None = None
    columns: Tensor | None = None
    live: Tensor | None = None  # 0, 1, ... for each of the columns
    width: int = 0


class RaggedCache(DynamicCache):  # type: ignore[misc]
    """Keys and values of rows that each end at a column of their own. The live rows stand first, without gaps."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.place = _Place()
        self.layers: list[RaggedLayer] = [RaggedLayer(self.place, number) for number in range(len(self.layers))]

    def allocate(self, rows: int, columns: int) -> None:
        """Room for so many rows and columns at least, from the next forward pass on; what is kept is copied."""
        if rows > self.place.rows or columns > self.place.room:
            self.place.rows = max(rows, self.place.rows)
            self.place.room = -(-columns // COLUMN_STEP) * COLUMN_STEP

    def prefill_from(self, row: int, prefix: Sequence[tuple[Tensor, Tensor]] = ()) -> None:
        """The next forward pass has prompts for the rows from this one on, or what of them stands behind `prefix`."""
        self.place.first, self.place.columns, self.place.prefix = row, None, prefix

    @contextmanager
    def read_into(self, states: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
        """A forward pass in this block leaves its keys and values in `states`, a layer each, and not in the cache."""
        self.place.columns, self.place.taken = None, states
        try:
            yield
        finally:
            self.place.taken = None

    def decode_at(self, columns: Tensor, width: int) -> None:
        """The next forward pass has one token for each live row, at its column; none lies at `width` or beyond."""
        self.place.columns, self.place.width = columns, width
        self.place.live = torch.arange(len(columns), device=columns.device)

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy rows onto others, which are given up."""
        for layer in self.layers:
            for buffer in layer.buffers:
                buffer[torch.tensor(targets, device=buffer.device)] = buffer[
                    torch.tensor(sources, device=buffer.device)
                ]


class RaggedLayer(DynamicLayer):  # type: ignore[misc]
    """Buffers (rows, heads, columns, width) of keys and values, written where `place` says."""

    def __init__(self, place: _Place, number: int) -> None:
        super().__init__()
        self.place, self.number = place, number
        self.buffers: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write new columns; returns what the new queries see: all of the live rows, or the prompts alone."""
        states = [key_states, value_states]
        if self.place.taken is not None:
            self.place.taken.append((key_states, value_states))
            return key_states, value_states
        if not self.buffers:
            self.lazy_initialization(key_states, value_states)
        if not self.buffers or self.buffers[0].shape[::2] != (self.place.rows, self.place.room):
            self.buffers = [self._grown(place, state) for place, state in enumerate(states)]
        columns, live = self.place.columns, self.place.live
        if columns is None or live is None:
            rows = slice(self.place.first, self.place.first + len(key_states))
            if self.place.prefix:
                before = self.place.prefix[self.number]
                states = [torch.cat([p.expand(len(s), -1, -1, -1), s], 2) for p, s in zip(before, states, strict=True)]
            for buffer, state in zip(self.buffers, states, strict=True):
                buffer[rows, :, : state.shape[2]] = state
            return states[0], states[1]
        for buffer, state in zip(self.buffers, states, strict=True):
            buffer[live.to(state.device), :, columns.to(state.device)] = state[:, :, 0]
        keys, values = (buffer[: len(columns), :, : self.place.width] for buffer in self.buffers)
        return keys, values

    def get_seq_length(self) -> int:
        """Columns before the new ones, of the longest row."""
        return 0 if self.place.columns is None else self.place.width - 1

    def _grown(self, place: int, states: Tensor) -> Tensor:
        """A buffer of the size asked for, with what the old one held."""
        buffer = states.new_zeros((self.place.rows, states.shape[1], self.place.room, states.shape[3]))
        if self.buffers:
            old = self.buffers[place]
            rows, columns = min(len(old), len(buffer)), min(old.shape[2], buffer.shape[2])
            buffer[:rows, :, :columns] = old[:rows, :, :columns]
        return buffer
