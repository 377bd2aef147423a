"""What the stages that learn from given rows have in a recipe: pretrain, sft, reward, dpo and its losses. No torch here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from align.recipe.training_settings import Positive, Settings, TrainingSettings


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
