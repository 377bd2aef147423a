"""Log-probabilities of the reference, which is the checkpoint that a stage starts from: computed once, kept by content."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from align.chat.encoded import Encoded
from align.progress import Progress
from align.registry.hashing import sha256_json
from align.rollout.scoring import AnswerLogps, answer_logps


def reference_logps(
    model: nn.Module, rows: Sequence[Encoded], kept: Path, ingredients: Sequence[object], progress: Progress
) -> AnswerLogps:
    """Log-probabilities of these rows under `model`, which must still be the reference; read back where they are known.

    kept: folder of what is known. ingredients: what the model's numbers depend on (its content id, precision, ...).
    """
    key = sha256_json([*ingredients, [[row.ids, [int(t) for t in row.trained]] for row in rows]])
    file = kept / "reference" / f"{key}.safetensors"
    if file.is_file():
        tensors = load_file(file)
        return AnswerLogps(tensors["sums"], tensors["tokens"])
    found = answer_logps(model, rows, progress=progress)
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(f".{os.getpid()}")
    save_file({"sums": found.sums.contiguous(), "tokens": found.tokens.contiguous()}, aside)
    aside.rename(file)
    return found


def rotated(rows: Sequence[Encoded], prompts: Sequence[int]) -> list[Encoded]:
    """Each row's prompt with the reply of the next row, for KTO's baseline. prompts: tokens of each row's prompt."""
    following = [*range(1, len(rows)), 0]
    return [
        Encoded(
            rows[i].ids[: prompts[i]] + rows[j].ids[prompts[j] :],
            rows[i].trained[: prompts[i]] + rows[j].trained[prompts[j] :],
        )
        for i, j in enumerate(following)
    ]


def as_floats(values: torch.Tensor) -> list[float]:
    """Plain numbers."""
    return [float(value) for value in values]
