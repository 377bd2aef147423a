"""What goes into a stage and what comes out. A stage never sees the registry: it gets checked paths and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.data.examples import Question
from align.data.prepared import PreparedData
from align.models.source import Source
from align.recipe.settings import EvaluationSettings

if TYPE_CHECKING:
    from align.constitution import Constitution
    from align.judge import Judge


@dataclass(frozen=True)
class RewardInput:
    """A reward model that a stage is scored with; id: content hash of it."""

    source: Source
    id: str


@dataclass(frozen=True)
class Inputs:
    """Everything a stage works on, resolved and checked.

    parent: where it starts (and, for dpo and ppo, its reference); parent_id: content hash of that.
    questions: held-out examples whose prompts are answered before and after; judge: who marks the answers, if anyone.
    work: kept until the stage is done, so that it can go on after a stop; cache: kept across runs, by content.
    rewards: reward models by the `from:` of the recipe. judges: those of rewards, by `file:` as the recipe writes it;
    None is the judge of `evaluation:`. constitution, critic: of a critique stage; the critic's model where it has one.
    """

    parent: Source
    parent_id: str
    data: PreparedData
    questions: Sequence[Question]
    judge: Judge | None
    template: str | None
    seed: int
    evaluation: EvaluationSettings
    work: Path
    cache: Path
    log_to: Sequence[str] = ()
    rewards: Mapping[str, RewardInput] = field(default_factory=dict)
    judges: Mapping[str | None, Judge] = field(default_factory=dict)
    constitution: Constitution | None = None
    critic: Source | None = None


@dataclass
class DataOutcome:
    """Data that a stage made: a folder of prepared data, below the one it was given, for each of its outputs.

    metrics and samples are as those of an `Outcome`; counts: what became of the rows. why_empty: where no row was made.
    """

    outputs: Mapping[str, PreparedData]
    template_sha256: str
    counts: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    why_empty: str = ""


@dataclass
class Outcome:
    """What a stage made. `metrics` holds numbers as before.<name> and after.<name>, each a number or an estimate."""

    kind: str
    template_sha256: str
    metrics: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    lengths: dict[str, Any] = field(default_factory=dict)
