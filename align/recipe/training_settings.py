"""What every stage that trains has in a recipe: its start, adapter, base, batches, optimiser. No torch here."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
MOST_COUNT = 10**9  # of anything that is counted; what lies beyond is a slip, and no machine could do it
Count = Annotated[int, Field(ge=1, le=MOST_COUNT)]
CountOrNone = Annotated[int, Field(ge=0, le=MOST_COUNT)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=64)]


class Settings(BaseModel):
    """Strict and frozen: unknown keys are refused, types are not coerced (a whole number may stand for a real one)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


# Adapters and quantized bases ----------------------------------------------------------------------------------------


class AdapterSettings(Settings):
    """A LoRA adapter (Hu 2021) trained instead of the whole model; with `quantize`, QLoRA (Dettmers 2023)."""

    kind: Literal["lora"] = Field("lora", description="The only kind for now.")
    rank: Count = Field(16, description="Rank of the update; higher learns more and costs more memory.")
    alpha: Positive | None = Field(None, description="Scale of the update (alpha / rank); None: twice the rank.")
    dropout: Fraction = Field(0.0, description="Dropout on the adapter's input; must be 0 for dpo and ppo.")
    target: str | list[str] = Field(
        "all-linear", description="Modules that get an adapter: all-linear, or name endings."
    )
    rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) (Kalajdzievski 2023): steadier at high rank.")
    dora: bool = Field(False, description="Train magnitude and direction apart (DoRA, Liu 2024); slower, often better.")
    init: Literal["default", "pissa", "gaussian"] = Field(
        "default", description="Start of the update; pissa starts from the principal parts of the weights (Meng 2024)."
    )


# Stages --------------------------------------------------------------------------------------------------------------

PEAK_LEARNING_RATE = {"pretrain": 1e-3, "sft": 2e-5, "reward": 2e-5, "dpo": 1e-6, "ppo": 1e-6}
ADAPTER_FACTOR = 10  # LoRA wants about ten times the rate of full fine-tuning, whatever its rank (Schulman 2025)


class StageSettings(Settings):
    """What every stage has."""

    kind: str
    from_: str | None = Field(
        None, alias="from",
        description="Checkpoint to start at: a stage of this recipe, recipe/stage, a tag or a folder; None: the model.",
    )  # fmt: skip
    seed: Seed | None = Field(None, description="Seed of this stage; None: the recipe's.")


class TrainingSettings(StageSettings):
    """What every stage that trains has."""

    data: str = Field(description="A data set of this recipe, or `stage.output` of a stage that makes data.")
    adapter: AdapterSettings | None = Field(
        None, description="Train a LoRA adapter; None: all weights, or on with the adapter that the stage starts from."
    )
    quantize: Literal["nf4", "int8"] | None = Field(
        None, description="Load the frozen base in 4 bits (nf4, double quantization) or 8; needs an adapter."
    )
    epochs: Annotated[float, Field(gt=0, le=MOST_COUNT)] = Field(1.0, description="Passes over the training rows.")
    max_steps: Count | None = Field(None, description="Stop after this many optimiser steps; None: epochs decide.")
    batch_size: Count = Field(
        16, description="Rows (pairs) per optimiser step. Split to fit `batch_tokens`; the result is the same."
    )
    batch_tokens: Count = Field(
        8192, description="Most tokens that go through the model at once; padding counts where rows need it."
    )
    max_length: Count | None = Field(
        None, description="Longest row in tokens; None: the model's context, at most 2048."
    )
    too_long: Literal["drop", "cut", "error"] = Field(
        "drop", description="What happens to longer rows: dropped and counted, cut at the end and counted, or refused."
    )
    cut_prompt: bool = Field(False, description="Cut long prompts from the left before the policy above is asked.")
    learning_rate: Positive | None = Field(
        None, description="Peak; None: 1e-3 pretrain, 2e-5 sft and reward, 1e-6 dpo and ppo; with LoRA 10x."
    )
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="Learning rate after the warmup.")
    warmup: Fraction = Field(0.03, description="Share of the steps in which the learning rate rises from 0.")
    optimizer: Literal["adamw", "adamw_8bit"] = Field(
        "adamw", description="adamw_8bit keeps its state in 8 bits (CUDA)."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="Decay of the weight matrices (AdamW).")
    max_grad_norm: Positive = Field(1.0, description="Gradients are scaled down to this norm.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations: less memory, a third more time.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Arithmetic (weights that train stay float32); auto: bfloat16 where the processor has it."
    )
    neftune: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Noise on the embeddings (NEFTune, Jain 2023); 5 is usual."
    )
    bad_steps: Literal["stop", "skip", "retry"] = Field(
        "stop",
        description="When loss or gradient of a step are not finite: stop; skip: leave weights and optimiser as they are; "
        "retry: once more without autocast to bfloat16, then stop.",
    )
    most_skipped_steps: Count = Field(10, description="With bad_steps: skip, one more than these stops the run.")
    exploding_norm: Annotated[float, Field(gt=1)] | None = Field(
        None,
        description="Steps whose gradient norm is more than this many times the median of the last 100 are bad, too.",
    )
    fit: Literal["stop", "auto"] = Field(
        "stop",
        description="When memory is short: stop; auto: go on with half of batch_tokens (the result stays the same, but for "
        "rounding and the noise of dropout); on one process.",
    )
    log_steps: Count = Field(10, description="Steps between two entries of the log.")
    save_steps: Count = Field(
        200, description="Steps between two saved states that `align runs resume` can go on from."
    )

    def peak_learning_rate(self) -> float:
        """The learning rate that is used: the recipe's, or the default of the stage's kind."""
        if self.learning_rate is not None:
            return self.learning_rate
        return round(PEAK_LEARNING_RATE[self.kind] * (ADAPTER_FACTOR if self.adapter else 1), 12)

    def rows_seen(self, rows: int) -> int:
        """Rows of a whole run over so many training rows: all epochs together, one at least, unless max_steps ends it."""
        return min(max(1, round(self.epochs * rows)), self.steps(rows) * self.batch_size)

    def steps(self, rows: int) -> int:
        """Optimiser steps of a whole run over so many training rows."""
        steps = math.ceil(max(1, round(self.epochs * rows)) / self.batch_size)
        return min(steps, self.max_steps or steps)

    @model_validator(mode="after")
    def _quantized_needs_adapter(self) -> TrainingSettings:
        if self.quantize and not self.adapter and self.from_ is None:
            raise ValueError("'quantize' freezes the base, so it needs an 'adapter'")
        return self
