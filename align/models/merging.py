"""An adapter added into its base, written as a plain folder, and proved by reading it back.

Which base: the one that the adapter was trained on. For an adapter trained on a quantized base that is the *dequantized*
base; merging into the original one, or quantizing the sum again, gives a model that nobody trained (on the 260K stories
model the error is tens of times larger).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from align.batches import Batch
from align.errors import AlignError
from align.models.adapters import merged, open_adapter, record_of
from align.models.folders import load_tokenizer, open_config
from align.models.hardware import compute_dtype, width_of
from align.models.loading import load_policy, load_reward
from align.models.opening import grow_vocabulary, open_weights
from align.models.quantized import dequantized_weights
from align.models.rewards import reward_scores
from align.models.saving import save_checkpoint
from align.models.source import Source, located, saved_vocabulary, source_of

Into = Literal["original", "dequantized"]


@dataclass(frozen=True)
class MergeVerdict:
    """How far the merged model, read back from disk, is from the adapter on the base that it was trained on.

    kl: mean KL from adapter to merged, in nats per token; for reward models between their preferences, in nats per pair.
    top1_agreement: share of tokens with the same most likely successor (of pairs with the same winner).
    compared: number of tokens (pairs) behind both.
    """

    kl: float
    top1_agreement: float
    compared: int
    into: Into
    why: str
    max_kl: float

    @property
    def holds(self) -> bool:
        """Whether the KL is a number within the bound."""
        return math.isfinite(self.kl) and self.kl <= self.max_kl

    def __str__(self) -> str:
        bound = "within" if self.holds else "above"
        return (
            f"KL {self.kl:.2g}, {bound} the bound of {self.max_kl:g}; top-1 agreement {self.top1_agreement:.2%} "
            f"on {self.compared}; into the {self.into} base: {self.why}"
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**asdict(self), "holds": self.holds}


def merge(
    source: Source,
    folder: Path,
    *,
    rows: Sequence[Sequence[int]],
    into: Literal["auto", "original", "dequantized"] = "auto",
    max_kl: float = 0.05,
) -> MergeVerdict:
    """Writes the merged model with its tokenizer into `folder` and measures it on `rows` of token ids.

    Raises AlignError for a source that is no adapter and for rows on which nothing can be compared.
    """
    source = located(source)
    chosen, why = choose_base(source, into)
    write_merged(source, folder, chosen)
    kl, agreement, compared = _compare(source, source_of(folder), [list(row) for row in rows if row])
    return MergeVerdict(kl, agreement, compared, chosen, why, max_kl)


def materialize(source: Source, folder: Path) -> Source:
    """A plain model that equals the source: the source itself, or for an adapter the merged model, written to `folder`."""
    if not source.is_adapter:
        return source
    source = located(source)
    write_merged(source, folder, choose_base(source, "auto")[0])
    return source_of(folder)


def choose_base(source: Source, into: Literal["auto", "original", "dequantized"]) -> tuple[Into, str]:
    """The base to merge into, and the reason in words. Raises AlignError where there is nothing to choose."""
    if not source.is_adapter:
        raise AlignError(f"{source.path}: not an adapter, there is nothing to merge", "Name an adapter checkpoint.")
    if into == "dequantized" and source.quantize is None:
        raise AlignError(
            f"{source.path}: there is no record that its base was quantized", "Merge into the original base."
        )
    if into == "dequantized" or (into == "auto" and source.quantize):
        return (
            "dequantized",
            f"the adapter was trained on this base in {source.quantize}, so on its dequantized weights",
        )
    if source.quantize:
        return "original", f"asked for, though the adapter was trained on the base in {source.quantize}"
    return "original", "the adapter was trained on this base in full precision"


def write_merged(source: Source, folder: Path, into: Into) -> None:
    """Adds the adapter in float32 and writes the sum in the dtype of the base's own files."""
    root = located(source.root)
    model = open_weights(root, reward=source.is_reward, dtype=torch.float32)
    stored = open_config(root).dtype or torch.float32
    tokenizer = load_tokenizer(source)
    if into == "dequantized":
        _put_dequantized(model, source, root)
    grow_vocabulary(model, max(len(tokenizer), saved_vocabulary(source)))
    whole = merged(open_adapter(model, source, record_of(root, None, torch.float32), trainable=False))
    if source.is_reward and tokenizer.pad_token_id is not None:
        whole.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    save_checkpoint(whole.to(stored), tokenizer, folder)


def _put_dequantized(model: Any, source: Source, root: Source) -> None:
    """Replaces the weights that quantization touched by those that the adapter saw while it was trained."""
    quantized = open_weights(root, reward=source.is_reward, dtype=_trained_dtype(source), quantize=source.quantize)
    with torch.no_grad():
        for name, weight in dequantized_weights(quantized).items():
            module = model.get_submodule(name)
            module.weight.copy_(weight.T if isinstance(module, Conv1D) else weight)


def _trained_dtype(source: Source) -> torch.dtype:
    """The arithmetic that the base had while the adapter was trained, for it decides the dequantized values."""
    if source.dtype in ("float32", "bfloat16"):
        return compute_dtype(source.dtype)
    return compute_dtype("auto", width_of(open_config(located(source.root))))


def _compare(source: Source, written: Source, rows: list[list[int]]) -> tuple[float, float, int]:
    """KL, agreement and count between the adapter on its training base and the model on disk."""
    precision = str(_trained_dtype(source)).removeprefix("torch.")
    load = load_reward if source.is_reward else load_policy
    tuned, plain = load(source, precision=precision), load(written, precision=precision)
    with torch.no_grad():
        if source.is_reward:
            return _preference_divergence(_rewards(tuned, rows), _rewards(plain, rows))
        return _token_divergence(tuned, plain, rows)


def _token_divergence(tuned: nn.Module, plain: nn.Module, rows: list[list[int]]) -> tuple[float, float, int]:
    total, same, count = 0.0, 0, 0
    for row in rows:
        ours, theirs = _log_probabilities(tuned, row), _log_probabilities(plain, row)
        total += float((ours.exp() * (ours - theirs)).sum())
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        count += len(row)
    if not count:
        raise AlignError("no text to compare adapter and merged model on", "Give some with --data.")
    return max(total / count, 0.0) if math.isfinite(total) else total, same / count, count


def _log_probabilities(model: nn.Module, row: list[int]) -> Tensor:
    """(T, V), float64: the differences that are looked for drown in rounding below that."""
    ids = torch.tensor([row], device=next(model.parameters()).device)
    logits: Tensor = model(ids, use_cache=False).logits[0]
    return logits.double().log_softmax(-1)


def _rewards(model: nn.Module, rows: list[list[int]]) -> Tensor:
    """(B,), each row alone."""
    place = next(model.parameters()).device
    batches = [torch.tensor([row], device=place) for row in rows]
    scores = [reward_scores(model, Batch(ids, torch.ones_like(ids), torch.ones_like(ids).bool())) for ids in batches]
    return torch.cat(scores) if scores else torch.empty(0)


def _preference_divergence(tuned: Tensor, plain: Tensor) -> tuple[float, float, int]:
    """Each row against the next: KL between the two Bradley-Terry preferences, and how often the winner is the same."""
    ours, theirs = tuned[1:] - tuned[:-1], plain[1:] - plain[:-1]
    if not len(ours):
        raise AlignError("two texts are needed to compare reward models", "Give more with --data.")
    p, log = ours.sigmoid(), nn.functional.logsigmoid
    kl = p * (log(ours) - log(theirs)) + (1 - p) * (log(-ours) - log(-theirs))
    return float(kl.mean().clamp(min=0)), float(((ours > 0) == (theirs > 0)).float().mean()), len(ours)
