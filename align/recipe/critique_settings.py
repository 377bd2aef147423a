"""What a `critique` stage has in a recipe: its constitution, its critic, and how much it writes. No torch here."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from align.recipe.training_settings import Count, CountOrNone, Name, Positive, Settings, StageSettings

Confidence = Annotated[float, Field(gt=0.5, le=1)]
OUTPUTS = {"sft": "conversation", "preferences": "preference"}  # data sets of a critique stage, and kinds of their rows


class SelfCritic(Settings):
    """The model that the stage starts from, as in Bai 2022."""

    kind: Literal["self"] = "self"


class CheckpointCritic(Settings):
    """Another language model: of this recipe, of the registry, or a folder."""

    kind: Literal["checkpoint"]
    from_: str = Field(alias="from", description="A stage of this recipe, recipe/stage, a tag, a folder or a hub id.")


class JudgeCritic(Settings):
    """The rules of a judge file. They find fault and choose; the model that the stage starts from revises."""

    kind: Literal["judge"]
    file: str | None = Field(None, description="Judge file, relative to the recipe; None: the one of `evaluation:`.")


class EndpointCritic(Settings):
    """A model behind an OpenAI-compatible server: vLLM, llama.cpp, Ollama, `transformers serve`, or a hosted one."""

    kind: Literal["endpoint"]
    url: str = Field(description="Address up to /v1, as in http://localhost:8000/v1.")
    model: str = Field(description="Name under which the server knows the model.")
    key_env: str | None = Field(
        None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="Environment variable that holds the key; it is read when the stage runs, and never stored.",
    )  # fmt: skip
    concurrency: Count = Field(8, description="Requests that are under way at once.")
    requests_per_minute: Count | None = Field(None, description="Most requests in a minute; None: no limit.")
    timeout_seconds: Positive = Field(
        120.0, description="Longest wait for an answer before the request is tried again."
    )
    retries: CountOrNone = Field(
        5,
        description="Tries after the first one, with growing pauses, where the server is down, busy or answers nonsense.",
    )
    token_budget: Count | None = Field(
        None, description="Most tokens, read and written, that one run may use; None: no limit. Finished rows are kept."
    )

    @field_validator("url")
    @classmethod
    def _is_web_address(cls, url: str) -> str:
        if not re.match(r"^https?://[^/\s@?#]+(/[^\s@?#]*)?$", url):  # not shown: it may hold a secret
            raise ValueError("this is no address; it starts with http:// or https://, without password, ? and #")
        return url.rstrip("/")


Critic = Annotated[
    SelfCritic | CheckpointCritic | EndpointCritic | JudgeCritic,
    Field(discriminator="kind"),
]


class CritiqueWork(Settings):
    """What is written about each prompt."""

    constitution: str = Field(description="YAML file of principles, relative to the recipe.")
    tags: list[Name] = Field([], description="Only principles with one of these tags; empty: all.")
    critic: Critic = Field(
        SelfCritic(), description="Who critiques, revises and chooses: `self`, `judge`, or a mapping with `kind`."
    )
    revisions: Annotated[int, Field(ge=0, le=100)] = Field(
        1, description="Rounds of critique and revision of each answer, each under another principle; 0: no revisions."
    )
    check_revisions: bool = Field(
        True, description="Ask the critic whether the revision is the better answer, and keep it apart if it is not."
    )
    keep_faultless: bool = Field(
        False, description="Put answers in which the critic found nothing among the rows of `.sft` too."
    )
    samples: CountOrNone = Field(
        0, description="Answers to each prompt that are compared with each other (RLAIF), at least 2; 0: none."
    )
    panel: Count = Field(1, description="Principles under which two answers are compared; their verdicts are averaged.")
    most_confident: Confidence = Field(
        0.95, description="Probabilities of the critic are kept within [1 - this, this] (Bai 2022: 0.6 with reasoning)."
    )
    max_new_tokens: Count = Field(256, description="Longest answer, critique or revision, in tokens.")
    temperature: Positive = Field(1.0, description="Divides the logits of answers; critiques and revisions are greedy.")

    @field_validator("critic", mode="before")
    @classmethod
    def _bare_critic(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _makes_something(self) -> CritiqueWork:
        if self.samples == 1:
            raise ValueError("samples is 1, and one answer cannot be compared; set 0 or at least 2")
        if not self.revisions and not self.samples:
            raise ValueError("revisions and samples are both 0, so nothing would be made")
        if not self.revisions and self.keep_faultless:
            raise ValueError("keep_faultless has no effect without revisions")
        return self


class CritiqueSettings(StageSettings, CritiqueWork):
    """Critique and revise answers by a constitution (Bai 2022); makes the data sets `<stage>.sft` and `.preferences`."""

    kind: Literal["critique"]
    data: str = Field(alias="prompts", description="A data set of this recipe; of rows with answers the prompts count.")
    quantize: Literal["nf4", "int8"] | None = Field(
        None,
        description="Load a whole model that answers in 4 bits (nf4) or 8; an adapter's base is as it was trained on.",
    )
