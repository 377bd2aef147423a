"""What the registry tells about a data set, a checkpoint, a run and a metric. Plain frozen values, no access to anything.

What the registry keeps as JSON text is parsed when it is asked for: a listing of thousands needs little of it.
`as_dict()` is the JSON that the command line prints; a number that JSON cannot say (NaN, infinity) is null there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Status = Literal["running", "finished", "failed", "interrupted", "crashed"]


@dataclass(frozen=True, slots=True)
class DataUse:
    """A data set that went into a checkpoint: the recipe's name for it, its id, and how many of its rows."""

    name: str
    id: str
    rows: int

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {"name": self.name, "id": self.id, "rows": self.rows}


@dataclass(frozen=True, slots=True)
class DataRecord:
    """A registered data set. key: hash of what it was made from; size in bytes."""

    number: int
    id: str
    name: str
    key: str
    path: Path
    size: int
    info_json: str
    run: str | None
    created: str

    @property
    def info(self) -> dict[str, Any]:
        """Its data report."""
        return dict(json.loads(self.info_json))

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "id": self.id, "name": self.name, "key": self.key, "path": str(self.path), "bytes": self.size,
            "run": self.run, "created": self.created, "info": self.info,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """A registered checkpoint.

    id: content hash of its files, which two runs may share; number: order of registration, unique; size in bytes.
    """

    number: int
    id: str
    name: str
    kind: str
    path: Path
    size: int
    stage: str
    run: str
    key: str
    parents_json: str
    data_json: str
    settings_json: str
    template_sha256: str | None
    tokenizer_sha256: str | None
    metrics_json: str
    samples_json: str
    versions_json: str
    tags: tuple[str, ...]
    created: str

    @property
    def parents(self) -> tuple[str, ...]:
        """Ids of checkpoints, or hub ids and folders that lie outside the registry."""
        return tuple(json.loads(self.parents_json))

    @property
    def data(self) -> tuple[DataUse, ...]:
        """The data sets that went into it."""
        return tuple(DataUse(**use) for use in json.loads(self.data_json))

    @property
    def recipe(self) -> dict[str, Any]:
        """What the run that made it recorded; its entry `recipe`, where there is one, is the resolved recipe."""
        return dict(json.loads(self.settings_json))

    @property
    def metrics(self) -> dict[str, Any]:
        """Held-out numbers, before and after."""
        return dict(json.loads(self.metrics_json))

    @property
    def samples(self) -> tuple[Mapping[str, Any], ...]:
        """Answers to held-out prompts."""
        return tuple(json.loads(self.samples_json))

    @property
    def versions(self) -> dict[str, str]:
        """Of the libraries and the machine that made it."""
        return dict(json.loads(self.versions_json))

    def as_dict(self) -> dict[str, Any]:
        """JSON form, without the samples (they belong to the report)."""
        recorded = self.recipe
        return {
            "id": self.id, "name": self.name, "kind": self.kind, "path": str(self.path), "bytes": self.size,
            "stage": self.stage, "run": self.run, "key": self.key, "parents": list(self.parents),
            "data": [use.as_dict() for use in self.data], "recipe": recorded.get("recipe", recorded),
            "template_sha256": self.template_sha256, "tokenizer_sha256": self.tokenizer_sha256,
            "metrics": self.metrics, "versions": self.versions, "tags": list(self.tags),
            "created": self.created,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class StageData:
    """What a stage that makes data has made: a data set for each of its outputs."""

    outputs: Mapping[str, DataRecord]

    @property
    def created(self) -> str:
        """When it was registered."""
        return next(iter(self.outputs.values())).created

    @property
    def info(self) -> Mapping[str, Any]:
        """What the stage says of itself, which stands with each output."""
        return dict(next(iter(self.outputs.values())).info["stage"])

    @property
    def name(self) -> str:
        """Name of the stage, recipe/stage."""
        return str(self.info["name"])

    @property
    def kind(self) -> str:
        """Kind of the stage."""
        return str(self.info["kind"])

    @property
    def metrics(self) -> Mapping[str, Any]:
        """Held-out numbers, as a checkpoint has them."""
        return dict(self.info["metrics"])

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {output: record.as_dict() for output, record in self.outputs.items()}


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One execution of a stage. status is what is true now: `crashed` as soon as the process is gone without a word."""

    number: int
    id: str
    recipe: str
    stage: str
    kind: str
    key: str
    seed: int
    status: Status
    message: str
    work: Path
    host: str
    started: str
    ended: str | None
    settings_json: str
    inputs_json: str

    @property
    def stopped(self) -> bool:
        """Whether it ended before its end."""
        return self.status not in ("running", "finished")

    @property
    def settings(self) -> dict[str, Any]:
        """Resolved settings."""
        return dict(json.loads(self.settings_json))

    @property
    def inputs(self) -> dict[str, Any]:
        """What went in: names to ids."""
        return dict(json.loads(self.inputs_json))

    def summary(self) -> dict[str, Any]:
        """JSON form for listings: all but settings and inputs."""
        return {
            "id": self.id, "recipe": self.recipe, "stage": self.stage, "kind": self.kind, "status": self.status,
            "message": self.message, "seed": self.seed, "key": self.key, "work": str(self.work), "host": self.host,
            "started": self.started, "ended": self.ended,
        }  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**self.summary(), "settings": self.settings, "inputs": self.inputs}


@dataclass(frozen=True, slots=True)
class MetricRow:
    """One number of one optimiser step; `value` is NaN where the number was not a number."""

    step: int
    name: str
    value: float

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {"step": self.step, "name": self.name, "value": self.value if math.isfinite(self.value) else None}


def to_json(value: Any) -> str:
    """Strict JSON text of a value: mappings and sequences of any kind, numbers that are not finite as null."""
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, DataUse):
        return value.as_dict()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
