"""One stage as the report knows it: what it made, the run that made it, and what it was made from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from align.registry.records import CheckpointRecord, DataRecord, DataUse, MetricRow, RunRecord, StageData

_ROUND = re.compile(r"(?P<loop>.+)\.(?P<number>[1-9]\d{0,5})(?:\.(?P<part>critique|reward))?")


@dataclass(frozen=True)
class Round:
    """A place in a loop: its name, the round, counted from 1, and the part of the round: critique, reward, or '' (trains)."""

    loop: str
    number: int
    part: str


@dataclass(frozen=True)
class StageFacts:
    """One stage: the checkpoint or the data sets that it made (neither: nothing yet), its run, the curves of that run,
    and the data it read."""

    name: str
    kind: str
    checkpoint: CheckpointRecord | None
    run: RunRecord | None
    curves: Sequence[MetricRow] = ()
    data: Mapping[str, DataRecord] = field(default_factory=dict)
    made: StageData | None = None

    @property
    def key(self) -> str:
        """Identity in the graph. Not the content hash: two stages may make the same weights."""
        if self.checkpoint:
            return f"checkpoint-{self.checkpoint.number}"
        return f"run-{self.run.number}" if self.run else self.name

    @property
    def done(self) -> bool:
        """Whether it made something."""
        return self.checkpoint is not None or self.made is not None

    @property
    def short_name(self) -> str:
        """Its name in the recipe."""
        return self.name.rpartition("/")[2]

    @property
    def round(self) -> Round | None:
        """Its place in a loop. Only rounds have a dot in their names; None: it belongs to no loop."""
        recipe, slash, stage = self.name.rpartition("/")
        found = _ROUND.fullmatch(stage)
        return Round(f"{recipe}{slash}{found['loop']}", int(found["number"]), found["part"] or "") if found else None

    @property
    def metrics(self) -> dict[str, Any]:
        """Held-out numbers, flat."""
        return dict(self.checkpoint.metrics if self.checkpoint else self.made.metrics if self.made else {})

    @property
    def settings(self) -> dict[str, Any]:
        """Resolved settings of the stage, without what else went into its cache key."""
        kept: Mapping[str, Any] = self.run.settings if self.run else self.checkpoint.recipe if self.checkpoint else {}
        own = kept.get("settings")
        return dict(own if isinstance(own, Mapping) else kept)

    @property
    def uses(self) -> tuple[DataUse, ...]:
        """Data sets that went into what it made. The first is the one it read, others are parts of that."""
        if self.checkpoint or not (self.made and self.run):
            return self.checkpoint.data if self.checkpoint else ()
        named = self.run.inputs.get("data")
        found = {str(name): str(id) for name, id in named.items()} if isinstance(named, Mapping) else {}
        return tuple(DataUse(name, id, self._rows(id)) for name, id in found.items())

    @property
    def parents(self) -> tuple[str, ...]:
        """Ids of what the stage was made from; those of a run without a checkpoint stand in its inputs."""
        if self.checkpoint:
            return self.checkpoint.parents
        inputs = self.run.inputs if self.run else {}
        parent, critic = inputs.get("parent_id"), inputs.get("critic_id")
        learnt = [id for name, id in self.rewards.items() if name in _reward_names(self.settings)]
        return (str(parent), *learnt, *([str(critic)] if critic else [])) if parent else ()

    @property
    def rewards(self) -> dict[str, str]:
        """Reward models of a ppo stage, those that it only watches among them: the recipe's name for each -> id."""
        found = self.run.inputs.get("rewards") if self.run else None
        return {str(name): str(id) for name, id in found.items()} if isinstance(found, Mapping) else {}

    def given_name(self, identifier: str) -> str:
        """The name by which the run knew one of its parents."""
        inputs = self.run.inputs if self.run else {}
        for role in ("parent", "critic"):
            if inputs.get(f"{role}_id") == identifier and inputs.get(role):
                return str(inputs[role])
        return next((name for name, id in self.rewards.items() if id == identifier), identifier)

    def _rows(self, identifier: str) -> int:
        rows = self.data[identifier].info.get("train_rows") if identifier in self.data else 0
        return rows if isinstance(rows, int) else 0


def _reward_names(settings: Mapping[str, Any]) -> set[Any]:
    """Names of the reward models that a stage learns from."""
    terms = settings.get("reward")
    return {term.get("from") for term in terms if isinstance(term, Mapping)} if isinstance(terms, list) else set()
