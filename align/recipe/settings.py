"""Every setting of a recipe: its type, its default, and the sentence a user needs to set it. No torch here.

`recipe_file.py` reads a YAML file into these; the settings reference in docs/ and the JSON schema are made from them.
A value that the user wrote is never changed. `None` always means what its sentence says.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=64)]
Format = Literal[
    "auto", "messages", "sharegpt", "alpaca", "prompt_completion", "preferences", "rated", "hh", "prompts", "text"
]
Logger = Literal["tensorboard", "wandb", "mlflow", "trackio"]


class Settings(BaseModel):
    """Strict and frozen: unknown keys are refused, types are not coerced (a whole number may stand for a real one)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


# Data ----------------------------------------------------------------------------------------------------------------


class MixSettings(Settings):
    """One part of a mixture."""

    data: Name = Field(description="A data set of this recipe.")
    weight: Positive = Field(
        1.0,
        description="Share of this part relative to the others; the largest mixture that needs no row twice is made.",
    )


class DataSettings(Settings):
    """Where rows come from and which of them are kept. A bare string in `data:` is short for `path:`."""

    path: str | None = Field(
        None,
        description="JSON, JSONL (.gz, .zst), CSV, Parquet, an Arrow folder, or a hub id; relative to the recipe.",
    )
    mix: list[MixSettings] = Field([], description="Other data sets of the recipe to mix, instead of `path`.")
    format: Format = Field(
        "auto", description="Form of the rows; auto detects it and `align check` says what it found."
    )
    columns: dict[str, str] = Field({}, description="Renames columns: {their name: the name that the format expects}.")
    split: str = Field("train", description="Split to read from a hub data set or an Arrow folder.")
    subset: str | None = Field(None, description="Configuration of a hub data set.")
    revision: str | None = Field(None, description="Commit, tag or branch of a hub data set.")
    limit: Count | None = Field(None, description="Keep this many rows (after shuffling, where that is on); None: all.")
    shuffle: bool = Field(
        False, description="Shuffle by the seed before `limit`; training shuffles every epoch anyway."
    )
    test: str | None = Field(None, description="A file of held-out rows, instead of a fraction of `path`.")
    test_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        0.1, description="Share of the rows held out; rows with the same prompt always fall on the same side."
    )
    bad_rows: Literal["error", "drop"] = Field(
        "error",
        description="What happens to rows that cannot be used: refused with their places, or dropped and counted.",
    )
    deduplicate: bool = Field(True, description="Drop rows that equal an earlier one.")
    near_duplicates: Fraction | None = Field(
        None,
        description="Drop rows whose Jaccard similarity (MinHash, 5-word shingles) to an earlier one is above this.",
    )
    decontaminate: list[str] = Field(
        [],
        description="Data sets of the recipe, or files, whose prompts must not occur in this one; matches are dropped.",
    )
    mask_personal_data: bool = Field(
        False, description="Replace e-mail addresses, phone, card and account numbers and IP addresses by placeholders."
    )

    @model_validator(mode="before")
    @classmethod
    def _bare_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_source(self) -> DataSettings:
        if (self.path is None) == (not self.mix):
            raise ValueError("give either 'path' or 'mix'")
        return self


# Adapters and quantized bases ----------------------------------------------------------------------------------------


class AdapterSettings(Settings):
    """A LoRA adapter (Hu 2021) trained instead of the whole model; with `quantize`, QLoRA (Dettmers 2023)."""

    kind: Literal["lora"] = Field("lora", description="The only kind for now.")
    rank: Count = Field(16, description="Rank of the update; higher learns more and costs more memory.")
    alpha: Positive | None = Field(None, description="Scale of the update (alpha / rank); None: twice the rank.")
    dropout: Fraction = Field(0.0, description="Dropout on the adapter's input; must be 0 for dpo.")
    target: str | list[str] = Field(
        "all-linear", description="Modules that get an adapter: all-linear, or name endings."
    )
    rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) (Kalajdzievski 2023): steadier at high rank.")
    dora: bool = Field(False, description="Train magnitude and direction apart (DoRA, Liu 2024); slower, often better.")
    init: Literal["default", "pissa", "gaussian"] = Field(
        "default", description="Start of the update; pissa starts from the principal parts of the weights (Meng 2024)."
    )


# Stages --------------------------------------------------------------------------------------------------------------

PEAK_LEARNING_RATE = {"pretrain": 1e-3, "sft": 2e-5, "reward": 2e-5, "dpo": 1e-6}
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
    epochs: Positive = Field(1.0, description="Passes over the training rows.")
    max_steps: Count | None = Field(None, description="Stop after this many optimiser steps; None: epochs decide.")
    batch_size: Count = Field(
        16, description="Rows (pairs) per optimiser step. Split to fit `batch_tokens`; the result is the same."
    )
    batch_tokens: Count = Field(8192, description="Most tokens, padding included, that go through the model at once.")
    max_length: Count | None = Field(
        None, description="Longest row in tokens; None: the model's context, at most 2048."
    )
    too_long: Literal["drop", "cut", "error"] = Field(
        "drop", description="What happens to longer rows: dropped and counted, cut at the end and counted, or refused."
    )
    cut_prompt: bool = Field(False, description="Cut long prompts from the left before the policy above is asked.")
    learning_rate: Positive | None = Field(
        None, description="Peak; None: 1e-3 pretrain, 2e-5 sft and reward, 1e-6 dpo; with LoRA 10x."
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
    log_steps: Count = Field(10, description="Steps between two entries of the log.")
    save_steps: Count = Field(
        200, description="Steps between two saved states that `align runs resume` can go on from."
    )

    def peak_learning_rate(self) -> float:
        """The learning rate that is used: the recipe's, or the default of the stage's kind."""
        if self.learning_rate is not None:
            return self.learning_rate
        return round(PEAK_LEARNING_RATE[self.kind] * (ADAPTER_FACTOR if self.adapter else 1), 12)

    @model_validator(mode="after")
    def _quantized_needs_adapter(self) -> TrainingSettings:
        if self.quantize and not self.adapter and self.from_ is None:
            raise ValueError("'quantize' freezes the base, so it needs an 'adapter'")
        return self


class PretrainSettings(TrainingSettings):
    """Every token of plain text is trained."""

    kind: Literal["pretrain"]
    from_scratch: bool = Field(False, description="Start from random weights of the model's config instead of its own.")


class SftSettings(TrainingSettings):
    """Supervised fine-tuning on conversations (or on text)."""

    kind: Literal["sft"]
    train_on: Literal["assistant", "last", "all"] = Field(
        "assistant", description="Tokens that count: every assistant turn, the last one only, or all tokens."
    )


class RewardSettings(TrainingSettings):
    """A reward model from preference pairs (Bradley-Terry)."""

    kind: Literal["reward"]
    centering: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="Weight of (chosen + rejected)^2, which keeps rewards around 0 (Eisenstein 2023); 0.01 is usual.",
    )


class SigmoidLoss(Settings):
    """DPO (Rafailov 2023); with label_smoothing, conservative DPO (Mitchell 2023)."""

    kind: Literal["sigmoid"] = "sigmoid"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="Share of labels taken to be wrong."
    )


class RobustLoss(Settings):
    """Unbiased under flipped labels (Chowdhury 2024)."""

    kind: Literal["robust"]
    label_smoothing: Annotated[float, Field(gt=0, lt=0.5)] = Field(0.1, description="Share of labels that are flipped.")


class IpoLoss(Settings):
    """Squared distance of the mean log-ratio to 1 / (2 beta) (Azar 2023)."""

    kind: Literal["ipo"]


class HingeLoss(Settings):
    """Hinge on the margin (SLiC, Zhao 2023; RSO, Liu 2023)."""

    kind: Literal["hinge"]


class SimpoLoss(Settings):
    """Mean log-probability as the reward, no reference (Meng 2024)."""

    kind: Literal["simpo"]
    target_margin: Annotated[float, Field(ge=0)] = Field(0.5, description="Margin that is asked for, in units of beta.")


class OrpoLoss(Settings):
    """Answer loss plus an odds-ratio term weighted by beta, no reference (Hong 2024)."""

    kind: Literal["orpo"]


class CpoLoss(Settings):
    """Preference loss without a reference, plus the answer loss (Xu 2024)."""

    kind: Literal["cpo"]
    answer_weight: Annotated[float, Field(ge=0)] = Field(1.0, description="Weight of the loss on the chosen answer.")


class ApoZeroLoss(Settings):
    """Raises chosen, lowers rejected (D'Oosterlinck 2024)."""

    kind: Literal["apo-zero"]


class KtoLoss(Settings):
    """Single rated answers; pairs are taken apart (Ethayarajh 2024)."""

    kind: Literal["kto"]
    desirable_weight: Positive = Field(1.0, description="Weight of good answers.")
    undesirable_weight: Positive = Field(1.0, description="Weight of bad answers.")


DpoLoss = Annotated[
    SigmoidLoss | RobustLoss | IpoLoss | HingeLoss | SimpoLoss | OrpoLoss | CpoLoss | ApoZeroLoss | KtoLoss,
    Field(discriminator="kind"),
]


class DpoSettings(TrainingSettings):
    """Direct preference optimisation and its family; the reference is the checkpoint that the stage starts from."""

    kind: Literal["dpo"]
    loss: DpoLoss = Field(
        SigmoidLoss(), description="Member of the family: a name, or a mapping with `kind` and its settings."
    )
    beta: Positive = Field(0.1, description="Pull towards the reference; small is weak. (SimPO's papers use 2.)")

    @field_validator("loss", mode="before")
    @classmethod
    def _bare_loss(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _no_dropout(self) -> DpoSettings:
        if self.adapter and self.adapter.dropout:
            raise ValueError("adapter.dropout must be 0 here: policy and reference have to be compared without noise")
        return self


class MergeSettings(StageSettings):
    """The adapter of `from`, merged into its base as a stage of its own."""

    kind: Literal["merge"]
    into: Literal["auto", "original", "dequantized"] = Field(
        "auto", description="Base to merge into; auto: the one that the adapter was trained on, dequantized if it was."
    )
    max_kl: Positive = Field(
        0.05, description="Refuse the merge above this mean KL (nats per token) from adapter to merged."
    )


Stage = Annotated[
    PretrainSettings | SftSettings | RewardSettings | DpoSettings | MergeSettings, Field(discriminator="kind")
]


# The recipe ----------------------------------------------------------------------------------------------------------


class EvaluationSettings(Settings):
    """How every stage is measured, before and after, on rows that no stage trains on."""

    prompts: str | None = Field(
        None, description="Data set whose held-out prompts are answered; None: the stage's own."
    )
    judge: str | None = Field(None, description="A judge file (YAML rules) that marks answers; relative to the recipe.")
    rows: Count = Field(200, description="Most held-out rows per measurement.")
    max_new_tokens: Count = Field(64, description="Longest answer that is generated.")
    samples: Annotated[int, Field(ge=0)] = Field(5, description="Answers of parent and child that the report shows.")


class Recipe(Settings):
    """One chain from a base model to an aligned one."""

    name: Name = Field(description="Names everything this recipe makes: name/stage.")
    model: str = Field(description="Hub id, local folder (relative to the recipe), or a checkpoint of the registry.")
    revision: str | None = Field(None, description="Commit, tag or branch of a hub model.")
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with the model. Only for code you read."
    )
    template: str | None = Field(None, description="Jinja file with a chat template; None: the model's own, else ours.")
    seed: Seed = Field(0, description="Governs every random choice of every stage.")
    data: dict[Name, DataSettings] = Field({}, description="The recipe's names for its data.")
    stages: dict[Name, Stage] = Field(min_length=1, description="What to make, in any order; `from:` makes the graph.")
    evaluation: EvaluationSettings = Field(EvaluationSettings(), description="How every stage is measured.")
    log_to: list[Logger] = Field([], description="Where metrics go besides the registry.")
