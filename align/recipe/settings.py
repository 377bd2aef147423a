"""Every setting of a recipe: its type, its default, and the sentence a user needs to set it. No torch here.

`recipe_file.py` reads a YAML file into these; the settings reference in docs/ and the JSON schema are made from them.
A value that the user wrote is never changed. `None` always means what its sentence says.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from align.recipe.critique_settings import CritiqueSettings
from align.recipe.loop_settings import ConstitutionSettings, MixSettings
from align.recipe.objective_settings import (
    ApoZeroLoss,
    CpoLoss,
    DpoLoss,
    DpoSettings,
    HingeLoss,
    IpoLoss,
    KtoLoss,
    OrpoLoss,
    PretrainSettings,
    RewardSettings,
    RobustLoss,
    SftSettings,
    SigmoidLoss,
    SimpoLoss,
)
from align.recipe.ppo_settings import PpoSettings
from align.recipe.training_settings import (
    ADAPTER_FACTOR,
    AdapterSettings,
    Count,
    CountOrNone,
    Fraction,
    Name,
    Positive,
    Seed,
    Settings,
    StageSettings,
    TrainingSettings,
)

__all__ = [
    "ADAPTER_FACTOR",
    "AdapterSettings",
    "ApoZeroLoss",
    "ConstitutionSettings",
    "Count",
    "CpoLoss",
    "CritiqueSettings",
    "DataSettings",
    "DpoLoss",
    "DpoSettings",
    "EvaluationSettings",
    "HingeLoss",
    "IpoLoss",
    "KtoLoss",
    "LaunchSettings",
    "MergeSettings",
    "MixSettings",
    "Name",
    "OrpoLoss",
    "PpoSettings",
    "PretrainSettings",
    "Recipe",
    "RewardSettings",
    "RobustLoss",
    "Settings",
    "SftSettings",
    "SigmoidLoss",
    "SimpoLoss",
    "Stage",
    "TrainingSettings",
]  # fmt: skip

Format = Literal[
    "auto", "messages", "sharegpt", "alpaca", "prompt_completion", "preferences", "rated", "hh", "prompts", "text"
]
Logger = Literal["tensorboard", "wandb", "mlflow", "trackio"]


# Data ----------------------------------------------------------------------------------------------------------------


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


# Stages --------------------------------------------------------------------------------------------------------------


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
    PretrainSettings
    | SftSettings
    | RewardSettings
    | DpoSettings
    | PpoSettings
    | CritiqueSettings
    | ConstitutionSettings
    | MergeSettings,
    Field(discriminator="kind"),
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
    samples: CountOrNone = Field(5, description="Answers of parent and child that the report shows.")


class LaunchSettings(Settings):
    """How many processes train, and how they share a model. What is made is the same, up to rounding, for any number."""

    processes: Annotated[int, Field(ge=1, le=1024)] = Field(
        1, description="Processes on this machine, one a GPU; torchrun or srun say it themselves. See docs/cluster.md."
    )
    strategy: Literal["ddp", "fsdp"] = Field(
        "ddp", description="ddp: the whole model in each; fsdp: weights, gradients and optimiser in parts (FSDP2)."
    )


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
    launch: LaunchSettings = Field(LaunchSettings(), description="Processes that pretrain, sft, reward and dpo use.")
    log_to: list[Logger] = Field([], description="Where metrics go besides the registry.")
