"""Models ready to use or to train: weights, adapter, quantized base, new tokens, precision and dropout put together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from align.errors import AlignError
from align.models.adapters import (
    add_adapter,
    is_classifier,
    open_adapter,
    record_of,
    train_in_float32,
)
from align.models.folders import load_tokenizer, model_config, open_config
from align.models.hardware import compute_dtype, width_of
from align.models.opening import (
    fresh_weights,
    grow_vocabulary,
    open_weights,
    silence_dropout,
)
from align.models.rewards import require_head, require_reward, start_head
from align.models.source import Quantize, Source, located, saved_vocabulary
from align.recipe.training_settings import AdapterSettings


@dataclass(frozen=True)
class _Wish:
    """What a caller asked for; see load_policy."""

    source: Source
    quantize: Quantize | None
    adapter: AdapterSettings | None
    trainable: bool
    tokenizer: PreTrainedTokenizerBase | None
    precision: str
    seed: int
    gradient_checkpointing: bool
    dropout: bool

    @property
    def base_quantize(self) -> Quantize | None:
        """Quantization of the base: as asked, else as it was when the adapter was trained."""
        return self.quantize or self.source.quantize

    def check(self) -> None:
        """Raises AlignError for wishes that contradict each other or the source."""
        source = self.source
        if source.is_adapter and self.adapter is not None:
            raise AlignError(
                f"{source.path}: an adapter on which another `adapter:` is asked for",
                "Leave `adapter:` out to train on with it, or merge it first (a stage of kind merge).",
            )
        if source.base_sha256 is not None and self.quantize not in (None, source.quantize):
            raise AlignError(
                f"{source.path}: trained on a base that was {source.quantize or 'not quantized'}, "
                f"asked for on one in {self.quantize}",
                "Leave `quantize:` out: the base it was trained on is used.",
            )
        if self.trainable and self.quantize and not (self.adapter or source.is_adapter):
            raise AlignError("'quantize' freezes the base, so nothing would be trained", "Add an `adapter:`.")


def load_policy(
    source: Source,
    *,
    quantize: Quantize | None = None,
    adapter: AdapterSettings | None = None,
    trainable: bool = False,
    from_scratch: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    precision: str = "auto",
    seed: int = 0,
    gradient_checkpointing: bool = False,
    dropout: bool = False,
) -> nn.Module:  # more than seven, since each is one key of a recipe and all are independent
    """A causal language model on this process's device.

    Not trainable: eval mode, frozen, in the arithmetic of `precision`. Trainable: train mode; what trains is float32 (the
    adapter given, or that of the source, or all weights), a frozen base has `precision`. tokenizer: tokens it has beyond
    the source's own get rows that train. dropout: keep what the checkpoint's config says, instead of none; the dropout of
    a new adapter is always as its settings say. Raises AlignError for what cannot be combined.
    """
    if source.is_reward:
        raise AlignError(f"{source.path}: a reward model, it writes no text", "Name a language model.")
    wish = _Wish(
        source, quantize, adapter, trainable, tokenizer, precision, seed, gradient_checkpointing, dropout
    )  # fmt: skip
    wish.check()
    if from_scratch:
        vocabulary = len(tokenizer if tokenizer is not None else load_tokenizer(source))
        model = fresh_weights(model_config(source), vocabulary=vocabulary, seed=seed)
        return _finished(model, wish)
    return _finished(_assembled(wish, reward=False), wish)


def load_reward(
    source: Source,
    *,
    quantize: Quantize | None = None,
    adapter: AdapterSettings | None = None,
    trainable: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    precision: str = "auto",
    seed: int = 0,
    gradient_checkpointing: bool = False,
    dropout: bool = False,
) -> nn.Module:
    """A sequence classifier with one label; keywords as for load_policy.

    From a language model it gets a new head by the seed, which only training makes a reward model: without `trainable`
    such a source is refused, and so is a policy's adapter, which has to be merged first.
    """
    if not trainable:
        require_reward(source)
    if source.kind == "adapter":
        raise AlignError(
            f"{source.path}: an adapter of a language model, whose base cannot carry a second one",
            "Merge it first (a stage of kind merge), then train the reward model from that.",
        )
    wish = _Wish(
        source, quantize, adapter, trainable, tokenizer, precision, seed, gradient_checkpointing, dropout
    )  # fmt: skip
    wish.check()
    return _finished(_assembled(wish, reward=True), wish)


def trainable_parameters(model: nn.Module) -> int:
    """How many numbers an optimiser step may change."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _assembled(wish: _Wish, *, reward: bool) -> Any:
    """Base, room for tokens, head and adapter of a wish."""
    source = located(wish.source)
    root = located(source.root)
    dtype = _base_dtype(wish, root)
    model = open_weights(root, reward=reward, dtype=dtype, quantize=wish.base_quantize)
    tokenizer = wish.tokenizer if wish.tokenizer is not None else load_tokenizer(source)
    if source.kind == "reward":
        _refuse_other_tokenizer(source, model)
    grow_vocabulary(model, max(len(tokenizer), saved_vocabulary(source) if source.is_adapter else 0))
    if reward:
        require_head(model, root.path)
        if root.kind == "model":
            start_head(model, wish.seed)
        if tokenizer.pad_token_id is not None:
            model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if not wish.dropout:
        silence_dropout(model)
    if wish.gradient_checkpointing and wish.trainable:  # not reentrant: frozen embeddings would cut off the gradients
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return _adapted(model, replace(wish, source=source), root, dtype)


def _refuse_other_tokenizer(source: Source, model: Any) -> None:
    """A reward model that was trained on other ids gives numbers that mean nothing."""
    tokens, rows = len(load_tokenizer(source)), model.get_input_embeddings().weight.shape[0]
    if tokens > rows:
        raise AlignError(
            f"{source.path}: its tokenizer has {tokens} tokens, and the reward model knows {rows}: they do not belong together",
            "Put the tokenizer there that the reward model was trained with.",
        )


def _adapted(model: Any, wish: _Wish, root: Source, dtype: torch.dtype) -> Any:
    source = wish.source
    if wish.adapter is None and not source.is_adapter:
        return model
    record = record_of(root, wish.base_quantize, dtype)
    added = _added_tokens(wish)
    if wish.adapter is not None:
        return add_adapter(model, wish.adapter, record, added=added, seed=wish.seed)
    if added:
        raise AlignError(
            f"{source.path}: {len(added)} tokens were added to the tokenizer that this adapter was trained with",
            "New tokens have to be there when an adapter begins; merge it first, or keep its template.",
        )
    adapted = open_adapter(model, source, record, trainable=wish.trainable)
    if not wish.dropout:
        silence_dropout(adapted)
    return adapted


def _added_tokens(wish: _Wish) -> list[int]:
    """Ids that the given tokenizer has and the source's own has not; spare rows of the embeddings may hold them."""
    if wish.tokenizer is None or not wish.trainable:
        return []
    known = load_tokenizer(wish.source).get_vocab()
    return sorted(index for token, index in wish.tokenizer.get_vocab().items() if token not in known)


def _base_dtype(wish: _Wish, root: Source) -> torch.dtype:
    """float32 for all that trains, and under PiSSA, whose frozen rest must not be rounded; else as asked."""
    adapted = wish.adapter is not None or wish.source.is_adapter
    if wish.trainable and (not adapted or (wish.adapter is not None and wish.adapter.init == "pissa")):
        return torch.float32
    return compute_dtype(wish.precision, width_of(open_config(root)))


def _finished(model: Any, wish: _Wish) -> nn.Module:
    """Modes and dtypes: frozen and in eval mode, or in train mode with all that trains in float32."""
    if not wish.trainable:
        model.requires_grad_(False).eval()
    else:
        train_in_float32(model.parameters())
        model.train()
    inner = getattr(model, "get_base_model", lambda: model)()
    if is_classifier(inner):
        inner.score.float()
    return model  # type: ignore[no-any-return]
