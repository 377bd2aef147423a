"""Prompts to replies, with the log-probability of every token: what evaluation, `generate` and PPO call.

The decode loop is `refill` where the model suits it, else `left_padded`. Beam search is transformers' own. Left out:
serving many users at once, which is what vLLM and its like are for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from align.batches import micro_batches
from align.errors import AlignError
from align.models.fused import fused
from align.progress import Progress
from align.rollout import left_padded, refill
from align.rollout.inference import device_of, evaluating, innermost
from align.rollout.rows import OnDone, Row
from align.rollout.sampling import choose, uniforms

TOKENS_AT_ONCE = 32_768  # prompts and replies that decode together, padding included: bounds the key-value cache


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
    limits = reply_limits(model, prompts, sampling.max_new_tokens)
    rows = [Row(index, prompt, limit) for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))]
    with (progress or Progress()).bar("generate", len(prompts)) as bar, evaluating(model), fused(model):

        def advance(row: Row) -> None:
            bar.advance(1, tokens=len(row.ids))

        if sampling.beams > 1:
            _beam_search(model, rows, sampling, stop_ids, advance)
        else:
            loop = refill if refill.suits(model) else left_padded
            extend = _Extender(sampling, _Stopper(tokenizer, stop_ids, sampling.stop), on_token)
            loop.decode(model, rows, TOKENS_AT_ONCE, extend, advance)
    return [reply_of(tokenizer, row, stop_ids, sampling.stop) for row in rows]


def context_length(model: nn.Module) -> int | None:
    """Longest sequence that the model has positions for; None where its config states none."""
    config: Any = model.config
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(length) if length else None


class _Stopper:
    """Says which rows have just finished."""

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int], strings: tuple[str, ...]) -> None:
        self.tokenizer = tokenizer
        self.ids = frozenset(stop_ids)
        self.strings = strings
        # A token is at least a byte (byte-level) of the text, so the stop string lies within this many last tokens.
        self.tail_tokens = max((len(string.encode()) for string in strings), default=0) + 4

    def finishes(self, row: Row) -> bool:
        if row.ids[-1] in self.ids:
            return True
        if not self.strings:
            return False
        tail = self.tokenizer.decode(row.ids[-self.tail_tokens :], skip_special_tokens=True)
        return any(string in tail for string in self.strings)


class _Extender:
    """Gives rows their next tokens, as the sampling says."""

    def __init__(self, sampling: Sampling, stopper: _Stopper, on_token: OnToken | None) -> None:
        self.sampling = sampling
        self.stopper = stopper
        self.on_token = on_token
        self.uniforms: dict[int, list[float]] = {}  # those of each row that is not done yet

    def __call__(self, rows: Sequence[Row], logits: Tensor) -> None:
        """logits: (rows, V)."""
        tokens, logps = choose(
            logits, self._drawn(rows), temperature=self.sampling.temperature or 1.0,
            top_k=self.sampling.top_k, top_p=self.sampling.top_p,
        )  # fmt: skip
        for row, token, logp in zip(rows, tokens.tolist(), logps.tolist(), strict=True):
            row.ids.append(token)
            row.logps.append(logp)
            row.finished = self.stopper.finishes(row)
            if not row.going:
                self.uniforms.pop(row.index, None)
            if self.on_token is not None:
                self.on_token(row.index, token)

    def _drawn(self, rows: Sequence[Row]) -> Tensor | None:
        """The uniform number of each row's next token, (rows,); None without sampling."""
        if not self.sampling.temperature:
            return None
        for row in rows:
            if not row.ids:
                self.uniforms[row.index] = uniforms(self.sampling.seed, [row.index], row.limit)[0].tolist()
        return torch.tensor([self.uniforms[row.index][len(row.ids)] for row in rows])


def _beam_search(
    model: nn.Module, rows: Sequence[Row], sampling: Sampling, stop_ids: Sequence[int], on_done: OnDone
) -> None:
    """Fill `rows` by transformers' beam search; rows that the context cuts short are searched apart."""
    stops = list(stop_ids)
    for group in micro_batches([row.longest for row in rows], max(TOKENS_AT_ONCE // sampling.beams, 1)):
        for limit in sorted({rows[place].limit for place in group}):
            batch = [rows[place] for place in group if rows[place].limit == limit]
            ids, mask, _ = left_padded.left_padded([row.prompt for row in batch], device_of(model))
            config = GenerationConfig(
                num_beams=sampling.beams, do_sample=False, max_new_tokens=limit, eos_token_id=stops or None,
                pad_token_id=stops[0] if stops else 0,
            )  # fmt: skip
            with _own_generation_config(innermost(model)) as inner:
                found = inner.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, ids.shape[1] :]
            for row, tokens in zip(batch, found.tolist(), strict=True):
                end = next((number for number, token in enumerate(tokens, 1) if token in stops), None)
                row.ids, row.finished = tokens[:end], end is not None
                on_done(row)


@contextmanager
def _own_generation_config(model: Any) -> Iterator[Any]:
    """Without the defaults (penalties, say) that came with the model: only what the user asked for counts."""
    before, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield model
    finally:
        model.generation_config = before


def reply_of(tokenizer: Any, row: Row, stop_ids: Sequence[int], strings: tuple[str, ...]) -> Reply:
    """A row that is done as a reply, with its text."""
    ends_with_stop = bool(row.ids) and row.ids[-1] in stop_ids
    text = str(tokenizer.decode(row.ids[:-1] if ends_with_stop else row.ids, skip_special_tokens=True))
    cuts = [place for place in (text.find(string) for string in strings) if place >= 0]
    if cuts:
        return Reply(row.ids, text[: min(cuts)], True, row.logps)
    return Reply(row.ids, text, row.finished, row.logps)


def reply_limits(model: nn.Module, prompts: Sequence[list[int]], max_new_tokens: int) -> list[int]:
    """The most tokens that each reply may get: `max_new_tokens`, or fewer where the model's context ends before.

    Raises AlignError for an empty prompt and for one that leaves no room in the context.
    """
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
