"""The decode loop that keeps its batch full: a row that has finished makes room for a prompt that waits.

Each row ends at a column of its own in the cache, so rows of any length decode together without padding, in exact
attention over their own columns. The live rows stand first: where one finishes, the last one takes its place, so that
no step computes a finished row, and what waits is prefilled behind them, prompts of like length at once. A beginning that
prompts share is read once. Rows with the longest prompts go first. Left out: paged caches, and layers that do not keep
all keys (see `suits`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from align.models.trunk import NAME
from align.rollout.cache import RaggedCache, is_plain
from align.rollout.inference import device_of, innermost, taken_by
from align.rollout.prefixes import Prefix, shared_prefixes
from align.rollout.rows import Extend, OnDone, Row

PREFILL_TOKENS = 8192  # prompts of one forward pass, padding included
LIKE_LENGTH = 0.75  # shortest prompt of a prefill, as a share of its longest
REFILL_SHARE = 1 / 8  # of the batch must be free before prompts are prefilled, so that a pass is worth its overhead


def suits(model: nn.Module) -> bool:
    """Whether the model attends by a mask of ours over a cache that keeps all keys and values, by given positions."""
    config = innermost(model).config
    return (
        "position_ids" in taken_by(model, {"position_ids": None})
        and config._attn_implementation in ("sdpa", NAME)  # NAME is SDPA where it is given no documents
        and not getattr(config, "alibi", False)  # positions read off a two-dimensional mask
        and is_plain(config)
    )


def decode(model: nn.Module, rows: Sequence[Row], tokens_at_once: int, extend: Extend, on_done: OnDone) -> None:
    """Give every row its reply. tokens_at_once: columns of the cache, rows times longest; at least one row decodes."""
    waiting = sorted(rows, key=lambda row: -row.longest)
    cache = RaggedCache(innermost(model).config)
    batch = _Batch(model, tokens_at_once, extend, on_done, cache, shared_prefixes(rows))
    while waiting or batch.live:
        joining = batch.room_for(waiting)
        batch.join(waiting[:joining])
        del waiting[:joining]
        batch.step()


@dataclass(slots=True)
class _Batch:
    """The rows that decode now; row i of the cache is live[i]."""

    model: nn.Module
    tokens_at_once: int
    extend: Extend
    on_done: OnDone
    cache: RaggedCache
    prefixes: Mapping[int, Prefix]
    live: list[Row] = field(default_factory=list)

    def room_for(self, waiting: Sequence[Row]) -> int:
        """How many of those that wait, longest first, are to join now."""
        if not waiting:
            return 0
        longest = max(row.longest for row in (waiting[0], *self.live))
        most = max(self.tokens_at_once // longest, 1)
        free = most - len(self.live)
        return min(free, len(waiting)) if free >= max(most * REFILL_SHARE, 1) or not self.live else 0

    def join(self, rows: Sequence[Row]) -> None:
        """Prefill these rows behind the live ones, and give them their first tokens."""
        groups = [group for part in self._by_prefix(rows) for group in _of_like_length(part)]
        everyone = [*self.live, *rows]
        self.cache.allocate(len(everyone), max((len(row.prompt) + len(row.ids) for row in everyone), default=0))
        for group in groups:
            self.extend(group, self._prefill(group, self.prefixes.get(group[0].index)))
            self.live += group
        self._drop_finished()

    def step(self) -> None:
        """Give every live row its next token."""
        if not self.live:
            return
        device = device_of(self.model)
        places = [len(row.prompt) + len(row.ids) - 1 for row in self.live]
        width = max(places) + 1
        self.cache.allocate(len(self.live), width)
        positions = torch.tensor(places, device=device)
        self.cache.decode_at(positions, width)
        seen = torch.arange(width, device=device) <= positions[:, None]
        ids = torch.tensor([row.ids[-1:] for row in self.live], device=device)
        self.extend(self.live, self._forward(ids, positions[:, None], seen[:, None, None])[:, -1])
        self._drop_finished()

    def _by_prefix(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Those that share a beginning together, in the order in which they come; the others together too."""
        parts: dict[int, list[Row]] = {}
        for row in rows:
            parts.setdefault(id(self.prefixes.get(row.index)), []).append(row)
        return list(parts.values())

    def _prefill(self, group: Sequence[Row], prefix: Prefix | None) -> Tensor:
        """Logits (B, V) after each prompt. Prompts are padded on the right, where no real token sees the padding."""
        known = len(prefix.ids) if prefix else 0
        if prefix and not prefix.states:
            with self.cache.read_into(prefix.states):
                self._read([prefix.ids], 0)
        self.cache.prefill_from(len(self.live), prefix.states if prefix else ())
        return self._read([row.prompt[known:] for row in group], known)

    def _read(self, texts: Sequence[Sequence[int]], known: int) -> Tensor:
        """Logits (B, V) after each text. known: tokens that stand before every one of them, and are in the cache."""
        device = device_of(self.model)
        last = torch.tensor([len(text) - 1 for text in texts])
        ids = torch.zeros((len(texts), int(last.max()) + 1), dtype=torch.long)
        for place, text in enumerate(texts):
            ids[place, : len(text)] = torch.tensor(text)
        columns = torch.arange(known + ids.shape[1], device=device)
        positions = columns[known:]
        mask = (columns <= positions[:, None])[None, None].expand(len(texts), -1, -1, -1) if known else None
        with _head_reads(innermost(self.model), last):
            logits = self._forward(ids.to(device), positions[None], mask)
        return logits[:, 0] if logits.shape[1] == 1 else logits[torch.arange(len(texts)), last]

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        output = self.model(
            input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=self.cache, use_cache=True
        )
        return cast(Tensor, output.logits)

    def _drop_finished(self) -> None:
        """Take out the rows that are done; live rows from the end take their places in the cache."""
        going = [row.going for row in self.live]
        count = sum(going)
        sources = [place for place in range(count, len(going)) if going[place]]
        targets = [place for place in range(count) if not going[place]]
        for place, row in enumerate(self.live):
            if not going[place]:
                self.on_done(row)
        if sources:
            self.cache.move(sources, targets)
            for source, target in zip(sources, targets, strict=True):
                self.live[target] = self.live[source]
        del self.live[count:]


def _of_like_length(rows: Sequence[Row]) -> list[list[Row]]:
    """Groups for one prefill each: prompts of like length, within PREFILL_TOKENS, longest first."""
    groups: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: -len(row.prompt)):
        longest = len(groups[-1][0].prompt) if groups else 0
        is_like = len(row.prompt) >= longest * LIKE_LENGTH
        if groups and is_like and longest * (len(groups[-1]) + 1) <= PREFILL_TOKENS:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


@contextmanager
def _head_reads(model: Any, last: Tensor) -> Iterator[None]:
    """The output head is given one place of each row (B,), not all: prompts have no use for the other logits."""

    def only_last(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *others = inputs
        rows = torch.arange(len(last), device=hidden.device)
        return hidden[rows, last.to(hidden.device)][:, None], *others

    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(only_last) if head is not None else None
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()
