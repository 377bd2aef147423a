"""Checkpoints as everybody reads them: from_pretrained folders and PEFT folders, safetensors only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.errors import AlignError
from align.models.adapters import is_adapted, save_adapter
from align.models.folders import quiet


def save_checkpoint(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes the model (or only its adapter) and the tokenizer with its template into `folder`.

    Raises AlignError for a quantized model without an adapter, which would not be what was asked for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if is_adapted(model):
        save_adapter(model, folder)
    elif getattr(model, "is_quantized", False):
        raise AlignError("a quantized model has nothing trained to save", "Train an adapter on it.")
    else:
        _tell_when_to_stop(model, tokenizer)
        with quiet():
            model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tell_when_to_stop(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Plain `generate` of the saved folder stops where the tokenizer says an answer ends, besides where it did before."""
    settings = getattr(model, "generation_config", None)
    if settings is None or tokenizer.eos_token_id is None:
        return
    before = settings.eos_token_id
    known = before if isinstance(before, list) else [] if before is None else [before]
    if tokenizer.eos_token_id not in known:
        settings.eos_token_id = [*known, tokenizer.eos_token_id]
    if settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.pad_token_id
