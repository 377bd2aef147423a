"""Prompts to replies, with the log-probability of every token: the decode loop of evaluation, `generate` and PPO.

Prompts of like length are decoded together, padded on the left with attention mask and position ids to match, over
the model's own key-value cache; a row leaves the batch when it has finished. Beam search is transformers' own. It
leaves out serving many users at once, which is what vLLM and its like are for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig

from align.batches import micro_batches
from align.errors import AlignError
from align.progress import Progress
from align.rollout import sampling as step_sampling
from align.rollout.cache import decoding_cache
from align.rollout.inference import device_of, evaluating

TOKENS_AT_ONCE = 32_768  # prompts and replies of one batch, padding included: bounds the key-value cache


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. temperature 0 takes the likeliest token; top_k 0 and top_p 1 cut nothing.

    stop: strings that end a reply; they are not part of its text.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    beams: int = 1
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        _check_range("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1")
        _check_range("temperature", self.temperature, 0 <= self.temperature < float("inf"), "0 or more")
        _check_range("top_k", self.top_k, self.top_k >= 0, "0 (all tokens) or more")
        _check_range("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        _check_range("beams", self.beams, self.beams >= 1, "at least 1")
        _check_range("seed", self.seed, self.seed >= 0, "0 or more")
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise AlignError(
                "top_k and top_p have no effect at temperature 0", "Set a temperature above 0, or drop them."
            )
        if self.beams > 1 and self.temperature > 0:
            raise AlignError(f"beams={self.beams} and temperature={self.temperature} exclude each other", "Drop one.")
        if "" in self.stop:
            raise AlignError("a stop string is empty", "It would end every reply at once.")


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model said. ids: new tokens, the stop token among them; text: without it.

    finished: ended by a stop token or stop string, not by the length limit. logps: log-probability of each id under
    softmax(logits / temperature), temperature 1 when greedy, before top_k and top_p; empty after beam search.
    """

    ids: list[int]
    text: str
    finished: bool
    logps: list[float]


@dataclass(slots=True)
class _Row:
    """A reply in the making; `limit` is the most tokens it may get."""

    index: int
    limit: int
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    finished: bool = False


OnToken = Callable[[int, int], None]


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    *,
    stop_ids: Sequence[int],
    progress: Progress | None = None,
    on_token: OnToken | None = None,
) -> list[Reply]:
    """One reply for each prompt (token ids, template applied), in their order.

    A reply ends at a token of `stop_ids`, at a stop string, after max_new_tokens, or where the model's context ends.
    on_token: told (row, token) for every token as it is chosen, not in beam search. The model's mode is restored.
    Raises AlignError for an empty prompt and for one that leaves no room in the context.
    """
    rows = [_Row(index, limit) for index, limit in enumerate(_limits(model, prompts, sampling.max_new_tokens))]
    lengths = [len(prompt) + row.limit for prompt, row in zip(prompts, rows, strict=True)]
    with (progress or Progress()).bar("generate", len(prompts)) as bar, evaluating(model):
        for group in micro_batches(lengths, max(TOKENS_AT_ONCE // sampling.beams, 1)):
            batch = [rows[i] for i in group]
            ids = [prompts[i] for i in group]
            if sampling.beams > 1:
                _beam_search(model, ids, batch, sampling, stop_ids)
            else:
                _decode(model, ids, batch, sampling, _Stopper(tokenizer, stop_ids, sampling.stop), on_token)
            bar.advance(len(group), tokens=sum(len(row.ids) for row in batch))
    return [_reply(tokenizer, row, stop_ids, sampling.stop) for row in rows]


def context_length(model: nn.Module) -> int | None:
    """Longest sequence that the model has positions for; None where its config states none."""
    config: Any = model.config
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(length) if length else None


def left_padded(prompts: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and position ids, each (B, T); the first real token of every row has position 0."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.zeros((len(prompts), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    positions = (mask.cumsum(dim=1) - 1).clamp_(min=0)
    return ids.to(device), mask.to(device), positions.to(device)


class _Stopper:
    """Says which rows have just finished."""

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int], strings: tuple[str, ...]) -> None:
        self.tokenizer = tokenizer
        self.ids = frozenset(stop_ids)
        self.strings = strings
        # A token is at least a byte (byte-level) of the text, so the stop string lies within this many last tokens.
        self.tail_tokens = max((len(string.encode()) for string in strings), default=0) + 4

    def finishes(self, row: _Row) -> bool:
        if row.ids[-1] in self.ids:
            return True
        if not self.strings:
            return False
        tail = self.tokenizer.decode(row.ids[-self.tail_tokens :], skip_special_tokens=True)
        return any(string in tail for string in self.strings)


def _decode(
    model: nn.Module,
    prompts: Sequence[list[int]],
    rows: list[_Row],
    sampling: Sampling,
    stopper: _Stopper,
    on_token: OnToken | None,
) -> None:
    """Fill `rows` token by token; those that have finished leave the batch."""
    ids, mask, positions = left_padded(prompts, device_of(model))
    drawn = None
    if sampling.temperature > 0:
        drawn = step_sampling.uniforms(sampling.seed, [row.index for row in rows], sampling.max_new_tokens)
    memory = decoding_cache(_innermost(model).config, ids.shape[1] + max(row.limit for row in rows))
    for step in range(sampling.max_new_tokens):
        logits = _forward(model, ids, mask, positions, memory)
        tokens, logps = step_sampling.choose(
            logits, None if drawn is None else drawn[:, step], temperature=sampling.temperature or 1.0,
            top_k=sampling.top_k, top_p=sampling.top_p,
        )  # fmt: skip
        _append(rows, tokens.tolist(), logps.tolist(), stopper, on_token)
        going = [place for place, row in enumerate(rows) if not row.finished and len(row.ids) < row.limit]
        if not going:
            return
        ids, positions = tokens[:, None], positions[:, -1:] + 1
        if len(going) < len(rows):
            keep = torch.tensor(going, device=ids.device)
            memory.reorder_cache(keep)  # unlike batch_select_indices, it is there for recurrent caches too
            ids, mask, positions = ids[keep], mask[keep], positions[keep]
            drawn = None if drawn is None else drawn[going]
            rows = [rows[place] for place in going]
        mask = torch.cat([mask, mask.new_ones((len(rows), 1))], dim=1)


def _append(
    rows: list[_Row], tokens: list[int], logps: list[float], stopper: _Stopper, on_token: OnToken | None
) -> None:
    for row, token, logp in zip(rows, tokens, logps, strict=True):
        row.ids.append(token)
        row.logps.append(logp)
        row.finished = stopper.finishes(row)
        if on_token is not None:
            on_token(row.index, token)


def _forward(model: nn.Module, ids: Tensor, mask: Tensor, positions: Tensor, memory: DynamicCache) -> Tensor:
    """Logits of the last place, (B, V); `memory` has seen `ids` after it."""
    known = _parameters(type(_innermost(model)).forward)
    options: dict[str, Any] = {"position_ids": positions, "logits_to_keep": 1}
    output = model(
        input_ids=ids, attention_mask=mask, past_key_values=memory, use_cache=True,
        **{name: value for name, value in options.items() if name in known},
    )  # fmt: skip
    return cast(Tensor, output.logits[:, -1])


@cache
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def _innermost(model: nn.Module) -> Any:
    """The model below its adapters, whose wrappers hide what forward takes."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def _beam_search(
    model: nn.Module, prompts: Sequence[list[int]], rows: list[_Row], sampling: Sampling, stop_ids: Sequence[int]
) -> None:
    """Fill `rows` by transformers' beam search; rows that the context cuts short are searched apart."""
    stops, device = list(stop_ids), device_of(model)
    for limit in sorted({row.limit for row in rows}):
        places = [place for place, row in enumerate(rows) if row.limit == limit]
        ids, mask, _ = left_padded([prompts[place] for place in places], device)
        config = GenerationConfig(
            num_beams=sampling.beams, do_sample=False, max_new_tokens=limit, eos_token_id=stops or None,
            pad_token_id=stops[0] if stops else 0,
        )  # fmt: skip
        with _own_generation_config(_innermost(model)) as inner:
            found = inner.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, ids.shape[1] :]
        for place, tokens in zip(places, found.tolist(), strict=True):
            end = next((number for number, token in enumerate(tokens, 1) if token in stops), None)
            rows[place].ids, rows[place].finished = tokens[:end], end is not None


@contextmanager
def _own_generation_config(model: Any) -> Iterator[Any]:
    """Without the defaults (penalties, say) that came with the model: only what the user asked for counts."""
    before, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield model
    finally:
        model.generation_config = before


def _reply(tokenizer: Any, row: _Row, stop_ids: Sequence[int], strings: tuple[str, ...]) -> Reply:
    ends_with_stop = bool(row.ids) and row.ids[-1] in stop_ids
    text = str(tokenizer.decode(row.ids[:-1] if ends_with_stop else row.ids, skip_special_tokens=True))
    cuts = [place for place in (text.find(string) for string in strings) if place >= 0]
    if cuts:
        return Reply(row.ids, text[: min(cuts)], True, row.logps)
    return Reply(row.ids, text, row.finished, row.logps)


def _limits(model: nn.Module, prompts: Sequence[list[int]], max_new_tokens: int) -> list[int]:
    context = context_length(model)
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise AlignError(f"prompt {index + 1} is empty", "A prompt needs at least one token.")
        if context is not None and len(prompt) >= context:
            raise AlignError(
                f"prompt {index + 1} has {len(prompt)} tokens; the model's context of {context} leaves no room for a reply",
                f"Shorten it to at most {context - 1} tokens.",
            )
    return [min(max_new_tokens, context - len(p)) if context is not None else max_new_tokens for p in prompts]


def _check_range(name: str, value: float, holds: bool, wanted: str) -> None:
    if not holds:
        raise AlignError(f"{name} is {value}", f"It must be {wanted}.")
