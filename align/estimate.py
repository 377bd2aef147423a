"""Predicted memory and time of a stage, from a model's config and the settings alone: no torch, no weights read.

A first estimate: Llama-like shapes are counted exactly, activations by a rule. It leaves out paging, fragmentation, what
other processes take, 8-bit optimisers, and on a machine with a GPU the time. A ppo stage is taken to write every response
to its end, and its held-out measurements are left out. The constants say where they come from.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from align.recipe.critique_settings import CheckpointCritic, CritiqueWork, EndpointCritic
from align.recipe.ppo_settings import GaeEstimator, PpoSettings
from align.recipe.settings import AdapterSettings, RewardSettings, TrainingSettings

LIBRARIES_BYTES = 700 * 2**20  # resident size of a process that has imported torch, transformers and peft (measured)
NF4_BYTES = 0.516  # a weight in nf4 with double quantization: 4 bits and its share of the scales (Dettmers 2023, 3.1)
ADAPTER_BYTES = 4  # a weight of an adapter that does not train: adapters stay float32
CACHED_TOKENS = 32_768  # that decode together, as rollout.generation bounds them
FORM_TOKENS = 60  # of a request besides the prompt and the answers in it
UNKNOWN_LENGTH = 512  # tokens of a row of which nothing is known
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


@dataclass(frozen=True)
class Prompts:
    """How many prompts a ppo stage has, and how many tokens one has on average."""

    rows: int
    tokens: float


@dataclass(frozen=True)
class Scorer:
    """A reward model of a ppo stage: its weights, and the bytes that they take beside the policy's."""

    parameters: int
    size: float


def estimate(settings: TrainingSettings, shape: Shape | None, data_bytes: int | None, *, half: bool) -> Estimate:
    """Estimate of one training stage. data_bytes: size of its training text; half: whether bfloat16 is used."""
    if shape is None:
        return Estimate(None, None)
    tokens = min(settings.batch_tokens, settings.batch_size * (settings.max_length or UNKNOWN_LENGTH))
    logits = 0 if isinstance(settings, RewardSettings) else _logits_bytes(shape)
    kept = _activation_bytes(settings, shape, half) + logits
    memory = LIBRARIES_BYTES + _weights(settings, shape, half) + tokens * kept
    if data_bytes is None or _has_gpu():
        return Estimate(int(memory), None)
    passes = 4 if settings.adapter else 6  # multiply-adds per weight and token: a frozen weight needs no gradient
    work = passes * shape.parameters * settings.epochs * data_bytes / BYTES_PER_TOKEN
    if settings.max_steps:
        work = min(work, passes * shape.parameters * settings.max_steps * tokens)
    return Estimate(int(memory), work * (4 / 3 if settings.gradient_checkpointing else 1) / (REACHED * matrix_speed()))


def estimate_ppo(
    settings: PpoSettings,
    shape: Shape | None,
    prompts: Prompts | None,
    scorers: Sequence[Scorer],
    *,
    half: bool,
    from_adapter: bool,
) -> Estimate:
    """Estimate of a ppo stage. from_adapter: the policy goes on with the adapter it starts from, kept as the reference.

    The peak is all weights with the larger of the key-value cache of a round and the activations of a step, whose head
    sees the tokens of the responses alone. A round costs the time to generate, to score and to learn `round_epochs` times.
    """
    if shape is None:
        return Estimate(None, None)
    new = settings.max_new_tokens
    asked = prompts.tokens if prompts else max((settings.max_length or UNKNOWN_LENGTH) - new, 1)
    cached = min(settings.rollouts * (asked + new), CACHED_TOKENS)
    cache = cached * 2 * shape.layers * shape.key_value * (2 if half else 4)
    tokens = min(settings.batch_tokens, settings.batch_size * (asked + new))
    learning = tokens * (_activation_bytes(settings, shape, half) + _logits_bytes(shape) * new / (asked + new))
    weights = _weights(settings, shape, half) + _company_bytes(settings, shape, from_adapter=from_adapter)
    memory = LIBRARIES_BYTES + weights + sum(scorer.size for scorer in scorers) + max(cache, learning)
    if prompts is None or _has_gpu():
        return Estimate(int(memory), None)
    work = _rounds(settings, prompts) * settings.rollouts * (asked + new) * _work_per_token(settings, shape, scorers)
    return Estimate(int(memory), work / (REACHED * matrix_speed()))


def estimate_critique(
    settings: CritiqueWork, shape: Shape | None, prompts: Prompts | None, *, quantize: str | None, half: bool
) -> Estimate:
    """Estimate of a critique stage whose critic is as large as the model that it starts from, or is not here at all.

    prompts: all that are answered, held-out ones too. Every answer is taken to be as long as it may be.
    """
    if shape is None:
        return Estimate(None, None)
    new = settings.max_new_tokens
    asked = prompts.tokens if prompts else float(UNKNOWN_LENGTH)
    request = asked + 2 * new + FORM_TOKENS
    cache = CACHED_TOKENS * 2 * shape.layers * shape.key_value * (2 if half else 4)
    models = 2 if isinstance(settings.critic, CheckpointCritic) else 1
    plain = 0.0 if half or not quantize else 4.0 * shape.block_parameters  # a 4-bit base is laid out while it generates
    memory = LIBRARIES_BYTES + models * frozen_bytes(shape, quantize, half=half) + plain + cache
    if prompts is None or isinstance(settings.critic, EndpointCritic) or _has_gpu():
        return Estimate(int(memory), None)
    contests = settings.panel * settings.samples * (settings.samples - 1) + 2 * settings.check_revisions
    requests = 2 * settings.revisions + contests
    tokens = prompts.rows * (max(settings.samples, 1) * (asked + new) + requests * request)
    return Estimate(int(memory), 2 * tokens * shape.parameters / (REACHED * matrix_speed()))


def frozen_bytes(shape: Shape, quantize: str | None, *, half: bool) -> float:
    """Size of a model that does not train."""
    plain = 2 if half else 4
    linear = {"nf4": NF4_BYTES, "int8": 1.0}.get(quantize or "", float(plain))
    return linear * shape.block_parameters + plain * (shape.parameters - shape.block_parameters)


@cache
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
    trained = TRAINED_BYTES * shape.adapter_parameters(settings.adapter)
    return frozen_bytes(shape, settings.quantize, half=half) + trained


def _company_bytes(settings: PpoSettings, shape: Shape, *, from_adapter: bool) -> float:
    """Weights of the reference and of the value model, as far as they are not the policy's base."""
    kind = _value_kind(settings)
    adapter = shape.adapter_parameters(settings.adapter) if settings.adapter else 0
    if settings.adapter is None:
        reference = frozen_bytes(shape, None, half=False)  # in float32, as what trains
    else:
        is_copy = from_adapter or settings.adapter.dora or settings.adapter.init == "pissa"
        reference = ADAPTER_BYTES * adapter if is_copy else 0
    return reference + TRAINED_BYTES * {"adapter": adapter, "model": shape.parameters}.get(kind or "", 0)


def _value_kind(settings: PpoSettings) -> str | None:
    """What the value model is; None: there is none."""
    if not isinstance(settings.estimator, GaeEstimator):
        return None
    return {"auto": "adapter" if settings.adapter else "model"}.get(settings.value.kind, settings.value.kind)


def _rounds(settings: PpoSettings, prompts: Prompts) -> float:
    rounds = settings.rounds or math.ceil(settings.epochs * prompts.rows * settings.samples / settings.rollouts)
    steps = settings.round_epochs * math.ceil(settings.rollouts / settings.batch_size)
    return min(rounds, settings.max_steps / steps) if settings.max_steps else rounds


def _work_per_token(settings: PpoSettings, shape: Shape, scorers: Sequence[Scorer]) -> float:
    """Multiplications and additions for a token of a round: generated once, scored by every role, learnt from."""
    kind = _value_kind(settings)
    own_value = kind in ("adapter", "model")
    passes = 4 if settings.adapter else 6
    learning: float = passes * settings.round_epochs * (2 if own_value else 1)
    learning *= 4 / 3 if settings.gradient_checkpointing else 1
    scoring = 2 * (3 if own_value else 2)  # policy, reference, value
    return (2 + scoring + learning) * shape.parameters + 2 * sum(scorer.parameters for scorer in scorers)


def _has_gpu() -> bool:
    """Whether this machine has one, of which the processor's speed says nothing."""
    return shutil.which("nvidia-smi") is not None


def _logits_bytes(shape: Shape) -> float:
    """Bytes of a token's logits: three copies."""
    return 3 * 4 * shape.vocabulary


def _activation_bytes(settings: TrainingSettings, shape: Shape, half: bool) -> float:
    """Bytes kept for the backward pass per token but for the logits: inputs and outputs of the blocks."""
    width = 2 if half else 4
    block = 4 * shape.hidden * 2 + width * (
        4 * shape.hidden + 2 * shape.attention + 2 * shape.key_value + 4 * shape.intermediate
    )
    return 4 * shape.hidden * shape.layers + block if settings.gradient_checkpointing else block * shape.layers
