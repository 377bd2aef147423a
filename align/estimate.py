"""Predicted memory and time of a stage, from a model's config and the settings alone: no torch, no weights read.

A first estimate: Llama-like shapes are counted exactly, activations by a rule. It leaves out paging, fragmentation, what
other processes take, 8-bit optimisers, and on a machine with a GPU the time. The constants say where they come from.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from align.recipe.settings import AdapterSettings, RewardSettings, TrainingSettings

LIBRARIES_BYTES = 700 * 2**20  # resident size of a process that has imported torch, transformers and peft (measured)
NF4_BYTES = 0.516  # a weight in nf4 with double quantization: 4 bits and its share of the scales (Dettmers 2023, 3.1)
TRAINED_BYTES = 16  # float32 weight, gradient and two moments of AdamW
BYTES_PER_TOKEN = 4.0  # of English text under a vocabulary of tens of thousands; fewer under a small one
REACHED = 0.25  # share of the processor's matrix speed that a training step reaches


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder that decide memory and time."""

    hidden: int
    layers: int
    intermediate: int
    vocabulary: int
    attention: int  # width of all query heads
    key_value: int  # width of all key heads
    tied: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape | None:
        """Shape behind a config.json; None when it lacks the usual names."""
        config = config.get("text_config", config)
        hidden = config.get("hidden_size") or config.get("n_embd")
        layers = config.get("num_hidden_layers") or config.get("n_layer")
        heads = config.get("num_attention_heads") or config.get("n_head")
        if not (hidden and layers and heads and config.get("vocab_size")):
            return None
        width = config.get("head_dim") or hidden // heads
        return cls(
            hidden=hidden,
            layers=layers,
            intermediate=config.get("intermediate_size") or config.get("n_inner") or 4 * hidden,
            vocabulary=config["vocab_size"],
            attention=heads * width,
            key_value=(config.get("num_key_value_heads") or heads) * width,
            tied=bool(config.get("tie_word_embeddings", True)),
        )

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """In and out widths of the linear layers of one block (gated feed-forward)."""
        h, m = self.hidden, self.intermediate
        return [
            (h, self.attention),
            (h, self.key_value),
            (h, self.key_value),
            (self.attention, h),
            (h, m),
            (h, m),
            (m, h),
        ]

    @property
    def block_parameters(self) -> int:
        """Weights of all linear layers of all blocks."""
        return self.layers * sum(i * o for i, o in self.matrices)

    @property
    def parameters(self) -> int:
        """All weights."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.block_parameters + embeddings + (2 * self.layers + 1) * self.hidden

    def adapter_parameters(self, adapter: AdapterSettings) -> int:
        """Weights of a LoRA adapter on every linear layer."""
        return self.layers * adapter.rank * sum(i + o for i, o in self.matrices)


@dataclass(frozen=True)
class Estimate:
    """Predicted peak memory in bytes and time in seconds; None where something is not known yet."""

    peak_memory_bytes: int | None
    seconds: float | None


def estimate(settings: TrainingSettings, shape: Shape | None, data_bytes: int | None, *, half: bool) -> Estimate:
    """Estimate of one training stage. data_bytes: size of its training text; half: whether bfloat16 is used."""
    if shape is None:
        return Estimate(None, None)
    tokens = min(settings.batch_tokens, settings.batch_size * (settings.max_length or 512))
    memory = LIBRARIES_BYTES + _weights(settings, shape, half) + tokens * _activation_bytes(settings, shape, half)
    if data_bytes is None or shutil.which("nvidia-smi"):  # this machine's processor says nothing about its GPU
        return Estimate(int(memory), None)
    passes = 4 if settings.adapter else 6  # multiply-adds per weight and token: a frozen weight needs no gradient
    work = passes * shape.parameters * settings.epochs * data_bytes / BYTES_PER_TOKEN
    if settings.max_steps:
        work = min(work, passes * shape.parameters * settings.max_steps * tokens)
    return Estimate(int(memory), work * (4 / 3 if settings.gradient_checkpointing else 1) / (REACHED * matrix_speed()))


def matrix_speed(size: int = 512) -> float:
    """Floating-point operations per second of a float32 matrix product here and now, the best of three."""
    a = np.ones((size, size), dtype=np.float32)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _weights(settings: TrainingSettings, shape: Shape, half: bool) -> float:
    if settings.adapter is None:
        return TRAINED_BYTES * shape.parameters
    frozen = 2 if half else 4
    linear = {"nf4": NF4_BYTES, "int8": 1.0, None: float(frozen)}[settings.quantize]
    rest = shape.parameters - shape.block_parameters
    return linear * shape.block_parameters + frozen * rest + TRAINED_BYTES * shape.adapter_parameters(settings.adapter)


def _activation_bytes(settings: TrainingSettings, shape: Shape, half: bool) -> float:
    """Bytes kept for the backward pass per token: block inputs and outputs, and three copies of the logits."""
    width = 2 if half else 4
    block = 4 * shape.hidden * 2 + width * (
        4 * shape.hidden + 2 * shape.attention + 2 * shape.key_value + 4 * shape.intermediate
    )
    kept = 4 * shape.hidden * shape.layers + block if settings.gradient_checkpointing else block * shape.layers
    logits = 0 if isinstance(settings, RewardSettings) else 3 * 4 * shape.vocabulary
    return kept + logits
