"""What a `constitution` stage has in a recipe: the loop of critique and training, round after round. No torch here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from align.recipe.critique_settings import CritiqueWork
from align.recipe.objective_settings import DpoSettings, RewardSettings, SftSettings
from align.recipe.ppo_settings import ModelReward, PpoSettings
from align.recipe.training_settings import Positive, Settings, StageSettings

ROUND = "round"  # stands for what a round makes, where a block of the loop has to name data or a reward model
GIVEN = ("from", "data", "prompts")  # a round says these itself


class MixSettings(Settings):
    """One part of a mixture."""

    data: str = Field(description="A data set of this recipe, or `stage.output` of a stage that makes data.")
    weight: Positive = Field(
        1.0,
        description="Share of this part relative to the others; the largest mixture that needs no row twice is made.",
    )


Optimiser = Annotated[SftSettings | DpoSettings | PpoSettings, Field(discriminator="kind")]


class ConstitutionSettings(StageSettings, CritiqueWork):
    """Critique, train, critique what came of it, and so on: each round is a critique stage and an optimiser's."""

    kind: Literal["constitution"]
    data: str = Field(alias="prompts", description="A data set of this recipe; only its training prompts are used.")
    rounds: Annotated[int, Field(ge=1, le=100)] = Field(
        2, description="Rounds at most; fewer where the held-out violation rate stops falling."
    )
    train: Optimiser = Field(
        description="What each round trains with: the settings of an sft, dpo or ppo stage, without `from` and data."
    )
    mix: list[MixSettings] = Field(
        [],
        description="Data sets of the recipe that each round's rows are mixed with, against forgetting; sft and dpo.",
    )
    weight: Positive = Field(1.0, description="Weight of the round's own rows in the mixture.")
    reward: RewardSettings | None = Field(
        None,
        description="Settings of the reward model that a ppo round trains on its preferences; None: the defaults. "
        "Not used where `train` names a `reward:` of its own.",
    )

    @field_validator("train", mode="before")
    @classmethod
    def _placed(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        _refuse_given(value, "train")
        if value.get("kind") != "ppo":
            return {**value, "data": ROUND}
        return {"reward": [{"kind": "model", "from": ROUND}], **value, "prompts": ROUND}

    @field_validator("reward", mode="before")
    @classmethod
    def _rewarded(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        _refuse_given(value, "reward")
        return {**value, "kind": "reward", "data": ROUND}

    @model_validator(mode="after")
    def _no_idle_keys(self) -> ConstitutionSettings:
        if self.mix and self.train.kind == "ppo":
            raise ValueError("mix has no effect with ppo, which trains on prompts")
        if self.train.kind == "sft" and not self.revisions:
            raise ValueError("train is sft, which learns from revisions, and revisions is 0")
        if self.reward and not self.trains_reward:
            raise ValueError("reward has no effect: no round trains a reward model of its own")
        return self

    @property
    def trains_reward(self) -> bool:
        """Whether each round trains a reward model on its preferences."""
        terms = self.train.reward if isinstance(self.train, PpoSettings) else []
        return any(isinstance(term, ModelReward) and term.from_ == ROUND for term in terms)


def _refuse_given(block: dict[str, Any], name: str) -> None:
    for key in GIVEN:
        if block.get(key, ROUND) not in (ROUND, None):
            raise ValueError(f"'{key}' has no place in {name}: each round says it itself")
