"""What a `ppo` stage has in a recipe: rewards, sampling, estimator, KL, value model and guards. No torch here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from align.recipe.training_settings import (
    MOST_COUNT,
    Count,
    CountOrNone,
    Fraction,
    Positive,
    Settings,
    TrainingSettings,
)

Share = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
Several = Annotated[int, Field(ge=2, le=MOST_COUNT)]
VALUE_FACTOR = 10  # the value model has more to learn than the policy may move
Guard = Literal["kl", "entropy", "length", "repetition", "overoptimisation"]


# Rewards -------------------------------------------------------------------------------------------------------------


class RewardTerm(Settings):
    """One part of the reward of a response; the parts are added up, each times its weight."""

    kind: str
    weight: float = Field(1.0, description="Factor of this part in the sum; negative turns it into a cost.")

    @field_validator("weight")
    @classmethod
    def _counts(cls, weight: float) -> float:
        if weight == 0:
            raise ValueError("a weight of 0 leaves this reward without effect; drop it, or put it under `watch:`")
        return weight


class ModelReward(RewardTerm):
    """A reward model: of this recipe, of the registry, or a folder. Texts are encoded by its own tokenizer."""

    kind: Literal["model"]
    from_: str = Field(alias="from", description="A reward stage of this recipe, recipe/stage, a tag or a folder.")


class JudgeReward(RewardTerm):
    """The score, 0 to 1, of a judge: rules in a YAML file, exact where the data say what is right."""

    kind: Literal["judge"]
    file: str | None = Field(None, description="Judge file, relative to the recipe; None: the one of `evaluation:`.")


class ExactMatchReward(RewardTerm):
    """1 where the response is the prompt's `expected.answer`, but for case, spacing and outer punctuation; else 0."""

    kind: Literal["exact_match"]


class NumericMatchReward(RewardTerm):
    """1 where the last number of the response is that of the prompt's `expected.answer` (as for GSM8K); else 0."""

    kind: Literal["numeric_match"]


class RegexReward(RewardTerm):
    """1 where a regular expression is found in the response; else 0."""

    kind: Literal["regex"]
    pattern: str = Field(description="Python regular expression; (?i) at its start ignores case.")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"'{pattern}' is no regular expression: {error}") from None
        if compiled.search(""):
            raise ValueError(f"'{pattern}' matches every text, also the empty one")
        return pattern


class LengthReward(RewardTerm):
    """0 at the target length, falling to -1 at nothing and at twice the target, and no lower."""

    kind: Literal["length"]
    target_tokens: Count = Field(description="Length asked for, in tokens of the policy, its stop token not counted.")


class FunctionReward(RewardTerm):
    """A Python function of your own: f(prompts, responses, expected) -> one number for each. Needs `allow_code: true`."""

    kind: Literal["function"]
    name: str = Field(
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$",
        description="The function; its module must be importable from the folder that align runs in.",
    )


Reward = Annotated[
    ModelReward | JudgeReward | ExactMatchReward | NumericMatchReward | RegexReward | LengthReward | FunctionReward,
    Field(discriminator="kind"),
]


# Estimators of the advantage -----------------------------------------------------------------------------------------


class GaeEstimator(Settings):
    """Generalised advantage estimation from a value model (Schulman 2016): PPO proper."""

    kind: Literal["gae"] = "gae"
    gamma: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="Discount of later rewards.")
    lambda_: Share = Field(0.95, alias="lambda", description="1: whole returns (unbiased); 0: one step (low variance).")


class RlooEstimator(Settings):
    """No value model: each response is held against the mean of the others to the same prompt (Ahmadian 2024)."""

    kind: Literal["rloo"]
    samples: Several = Field(4, description="Responses to each prompt.")


class GrpoEstimator(Settings):
    """No value model: rewards are centred, and scaled, within the responses to one prompt (Shao 2024)."""

    kind: Literal["grpo"]
    samples: Several = Field(8, description="Responses to each prompt.")
    divide_by_std: bool = Field(
        True, description="Divide by the group's deviation; false removes its bias to easy and hard prompts (Liu 2025)."
    )


class ReinforceEstimator(Settings):
    """No value model: returns are whitened over the whole round (REINFORCE++, Hu 2025)."""

    kind: Literal["reinforce++"]
    gamma: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="Discount of later rewards.")


Estimator = Annotated[GaeEstimator | RlooEstimator | GrpoEstimator | ReinforceEstimator, Field(discriminator="kind")]


# Value model and guards ----------------------------------------------------------------------------------------------


class ValueSettings(Settings):
    """The value model of `gae`, and how it is trained. A bare word is short for `kind:`."""

    kind: Literal["auto", "adapter", "model", "trunk"] = Field(
        "auto",
        description="adapter: a second adapter on the policy's base; model: a model of its own; trunk: a head on the "
        "policy, whose gradients reach it; auto: adapter where the policy is one, else model.",
    )
    start: Literal["auto", "reward", "policy"] = Field(
        "auto", description="Weights that it starts from; auto: the reward model's where they fit, else the policy's."
    )
    learning_rate: Positive | None = Field(None, description="Peak; None: ten times the policy's.")
    coefficient: Positive = Field(0.1, description="Weight of the value loss beside the policy's.")
    clip: Positive | None = Field(
        None, description="Most that a value moves per round without penalty, in units of reward; None: no clip."
    )
    warmup_rounds: CountOrNone = Field(0, description="First rounds that train the value model alone.")

    @model_validator(mode="before")
    @classmethod
    def _bare_kind(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value


class GuardSettings(Settings):
    """Signs of reward hacking and collapse. Each is warned of in the log and in the report; `stop_on` ends the run."""

    kl_limit: Positive | None = Field(
        30.0, description="Mean KL to the reference, in nats per response; None: no limit."
    )
    entropy_floor: Fraction = Field(0.1, description="Entropy below this share of the first round's is a collapse.")
    length_correlation: Share = Field(
        0.8, description="A correlation of reward and length above this, beyond the first round's, is a length hack."
    )
    repetition: Share = Field(0.5, description="Share of repeated 4-grams in the responses that is taken for a loop.")
    gold_drop: Positive = Field(
        0.05,
        description="Fall of the held-out judge's score (or of a watched reward, in deviations) while the reward rises.",
    )
    stop_on: list[Guard] = Field([], description="Guards that stop the run; its checkpoint is kept as it is then.")


# The stage -----------------------------------------------------------------------------------------------------------


class PpoSettings(TrainingSettings):
    """Proximal policy optimisation against rewards; the reference is the checkpoint that the stage starts from."""

    kind: Literal["ppo"]
    data: str = Field(alias="prompts", description="A data set of this recipe whose rows are prompts.")
    reward: list[Reward] = Field(
        min_length=1, description="A reward model's name, one reward, or a list of them, added up by weight."
    )
    watch: list[Reward] = Field([], description="Rewards that are measured on the responses and never trained on.")
    allow_code: bool = Field(False, description="Allow rewards of kind function. Only for code you read.")

    rollouts: Count = Field(64, description="Responses of one round; a multiple of the estimator's samples.")
    rounds: Count | None = Field(None, description="Rounds of generating and learning; None: epochs decide.")
    round_epochs: Count = Field(4, description="Passes over the responses of one round.")
    max_new_tokens: Count = Field(64, description="Longest response.")
    temperature: Positive = Field(1.0, description="Of the distribution that is sampled, learnt and compared.")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Sample from the likeliest tokens of this share."
    )
    top_k: CountOrNone = Field(0, description="Sample from the k likeliest tokens; 0: from all.")
    engine: Literal["local", "vllm"] = Field("local", description="Who generates; vllm where it is installed.")
    importance_cap: Positive = Field(
        2.0, description="Cap on the weights that correct for an engine whose probabilities differ (Yao 2025)."
    )

    estimator: Estimator = Field(
        GaeEstimator(), description="How advantages are found: a name, or a mapping with `kind`."
    )
    average: Literal["tokens", "rows", "constant"] = Field(
        "tokens",
        description="Loss per token of the step; per response, each weighing the same; or by max_new_tokens (Dr. GRPO).",
    )
    whiten_advantages: bool | None = Field(
        None, description="Mean 0 and deviation 1 over a round's tokens; None: for gae and reinforce++."
    )
    normalize_reward: bool = Field(
        False, description="Divide rewards by their running deviation, centred on their mean."
    )
    clip_reward: Positive | None = Field(None, description="Cut rewards at plus and minus this; None: not.")
    missing_stop_penalty: NotNegative = Field(
        1.0, description="Taken off a response that was cut off before its stop token."
    )

    kl_coefficient: NotNegative = Field(0.05, description="Price of a nat of KL to the reference.")
    kl_estimator: Literal["k1", "k2", "k3"] = Field("k1", description="Estimate of the KL per token (Schulman 2020).")
    kl_in: Literal["reward", "loss"] = Field(
        "reward", description="Where the KL is charged: to each token's reward, or in the loss."
    )
    kl_target: Positive | None = Field(
        None, description="Nats per response that the coefficient is steered to (Ziegler 2019); None: it is fixed."
    )
    kl_horizon: Count = Field(10_000, description="Responses over which the steering works; smaller reacts faster.")

    clip: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2, description="Ratios below 1 - clip and above 1 + clip earn nothing."
    )
    clip_high: Positive | None = Field(None, description="Upper clip where it differs (Yu 2025); None: as `clip`.")
    entropy_coefficient: NotNegative = Field(0.0, description="Bonus on the entropy of the policy, in the loss.")
    round_kl_limit: Positive | None = Field(
        None, description="A step whose KL to the round's start is above this ends the round; None: never."
    )
    value: ValueSettings = Field(ValueSettings(), description="The value model (gae only).")
    guards: GuardSettings = Field(GuardSettings(), description="What is watched while the policy learns.")
    measure_rounds: Count | None = Field(None, description="Rounds between held-out measurements; None: five in a run.")

    @field_validator("reward", "watch", mode="before")
    @classmethod
    def _bare_rewards(cls, value: Any) -> Any:
        listed = [value] if isinstance(value, str | Mapping) else value
        return [_as_term(part) for part in listed] if isinstance(listed, list) else listed

    @field_validator("estimator", mode="before")
    @classmethod
    def _bare_estimator(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    def value_learning_rate(self) -> float:
        """Peak of the value model: the recipe's, or ten times the policy's."""
        return self.value.learning_rate or VALUE_FACTOR * self.peak_learning_rate()

    @property
    def samples(self) -> int:
        """Responses to each prompt."""
        return int(getattr(self.estimator, "samples", 1))

    @property
    def whitens(self) -> bool:
        """Whether advantages are whitened: as the recipe says, else as the estimator's authors do."""
        if self.whiten_advantages is not None:
            return self.whiten_advantages
        return isinstance(self.estimator, GaeEstimator | ReinforceEstimator)

    @model_validator(mode="after")
    def _makes_sense(self) -> PpoSettings:
        if self.adapter and self.adapter.dropout:
            raise ValueError("adapter.dropout must be 0 here: policy and reference have to be compared without noise")
        if self.neftune:
            raise ValueError("neftune has no place here: policy and reference have to be compared without noise")
        if self.too_long == "cut":
            raise ValueError("too_long: cut would cut the end of a prompt; use drop, error, or cut_prompt: true")
        if self.rollouts % self.samples:
            raise ValueError(f"rollouts is {self.rollouts}, no multiple of the {self.samples} samples of each prompt")
        if self.kl_target and not self.kl_coefficient:
            raise ValueError("kl_target steers kl_coefficient, which must be above 0 to be steered")
        if any(isinstance(term, FunctionReward) for term in (*self.reward, *self.watch)) and not self.allow_code:
            raise ValueError("a reward of kind function runs Python code; read it, then set `allow_code: true`")
        self._check_value()
        return self

    def _check_value(self) -> None:
        """Value settings that nothing would read."""
        if not isinstance(self.estimator, GaeEstimator) and self.value != ValueSettings():
            raise ValueError(f"'value' has no effect with estimator '{self.estimator.kind}', which uses no value model")
        if self.value.kind == "trunk" and self.value.start != "auto":
            raise ValueError("value.start has no effect with kind 'trunk', which is a new head on the policy")


def _as_term(part: Any) -> Any:
    """A bare name as the reward model of that name."""
    return {"kind": "model", "from": part} if isinstance(part, str) else part
