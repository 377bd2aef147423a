"""Log-probabilities of the reference, which is the checkpoint that a stage starts from: computed once, kept by content."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from align.chat.encoded import Encoded
from align.progress import Progress
from align.registry.hashing import sha256_json
from align.rollout.scoring import AnswerLogps, answer_logps

VERSION = 3  # raised whenever the same ingredients would give other numbers


def reference_logps(
    model: nn.Module, rows: Sequence[Encoded], kept: Path, ingredients: Sequence[object], progress: Progress
) -> AnswerLogps:
    """Log-probabilities of these rows under `model`, which must still be the reference; read back where they are known.

    kept: folder of what is known. ingredients: what the model's numbers depend on besides the version of torch (its
    content id, the device, the arithmetic, ...).
    """
    key = sha256_json([VERSION, torch.__version__, *ingredients, _sha256(rows)])
    file = kept / "reference" / f"{key}.safetensors"
    if file.is_file():
        with suppress(OSError):
            os.utime(file)  # in use
        tensors = load_file(file)
        return AnswerLogps(tensors["sums"], tensors["tokens"])
    found = answer_logps(model, rows, progress=progress)
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(f".{os.getpid()}")
    save_file({"sums": found.sums.contiguous(), "tokens": found.tokens.contiguous()}, aside)
    aside.rename(file)
    return found


def _sha256(rows: Sequence[Encoded]) -> str:
    """Hash of the rows, one at a time."""
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps([row.ids, list(map(int, row.trained))]).encode())
    return found.hexdigest()


def rotated(rows: Sequence[Encoded], prompts: Sequence[int], longest: int) -> list[Encoded]:
    """Each row's prompt with the reply to another prompt, for KTO's baseline: the next row's that asks something else.

    prompts: tokens of each row's prompt. longest: most tokens of a row; what is over is cut off.
    """
    asked = [tuple(row.ids[:length]) for row, length in zip(rows, prompts, strict=True)]
    return [
        Encoded(
            (rows[i].ids[: prompts[i]] + rows[j].ids[prompts[j] :])[:longest],
            (rows[i].trained[: prompts[i]] + rows[j].trained[prompts[j] :])[:longest],
        )
        for i, j in enumerate(_others(asked))
    ]


def _others(asked: Sequence[object]) -> list[int]:
    """For each place the next one, round and round, where something else stands; where all is the same, the next one."""
    count = len(asked)
    others = [(i + 1) % count for i in range(count)]
    if len(set(asked)) == 1:
        return others
    for i in range(2 * count - 1, -1, -1):  # backwards and twice around, so that a run of equals passes its end on
        here, following = i % count, (i + 1) % count
        others[here] = following if asked[following] != asked[here] else others[following]
    return others


def as_floats(values: torch.Tensor) -> list[float]:
    """Plain numbers."""
    return [float(value) for value in values]
