"""What a recipe would do now: which stages run, which are reused or go on, why, and what they will cost.

Nothing is changed by a plan. A stage whose parent is still to be made has no key yet, so it is planned to run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from align.errors import AlignError
from align.estimate import (
    ADAPTER_BYTES,
    BYTES_PER_TOKEN,
    Estimate,
    Prompts,
    Scorer,
    Shape,
    estimate,
    estimate_ppo,
    frozen_bytes,
)
from align.recipe.graph import adapter_stage, needed, reward_references, stage_graph
from align.recipe.ppo_settings import PpoSettings
from align.recipe.settings import TrainingSettings
from align.registry.records import CheckpointRecord

if TYPE_CHECKING:
    from align.origins import Origin, Workshop

BFLOAT16_MIN_WIDTH = 256  # as models.hardware decides for precision: auto, without importing torch

Action = Literal["run", "reuse", "resume"]


@dataclass(frozen=True)
class PlannedStage:
    """One line of a plan. `made` is the checkpoint that is reused; peak memory and time are None where unknown."""

    name: str
    kind: str
    action: Action
    why: str
    key: str | None
    estimate: Estimate
    made: CheckpointRecord | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "name": self.name, "kind": self.kind, "action": self.action, "why": self.why, "key": self.key,
            "checkpoint": self.made.id if self.made else None,
            "peak_memory_bytes": self.estimate.peak_memory_bytes, "seconds": self.estimate.seconds,
        }  # fmt: skip


def plan(workshop: Workshop, stages: Sequence[str] = (), force: Sequence[str] = ()) -> list[PlannedStage]:
    """The named stages (all, when none is named) and all they need, in the order in which they run."""
    order = needed(workshop.recipe, list(stages) or list(workshop.recipe.stages))
    needed(workshop.recipe, list(force))  # a forced stage that does not exist is refused
    made: dict[str, CheckpointRecord] = {}
    planned = []
    for name in order:
        entry = planned_stage(workshop, name, made, forced=name in force)
        if entry.made is not None:
            made[name] = entry.made
        planned.append(entry)
    return planned


def planned_stage(
    workshop: Workshop, name: str, made: Mapping[str, CheckpointRecord], *, forced: bool = False
) -> PlannedStage:
    """What is to be done for one stage. `made`: checkpoints of the stages before it that are up to date."""
    kind = workshop.stage(name).kind
    cost = _cost(workshop, name)
    origin, rewards = workshop.starting_point(name, made), workshop.reward_points(name, made)
    if origin is None or rewards is None:
        missing = [need for need in stage_graph(workshop.recipe)[name] if need not in made]
        does = "starts from" if origin is None else "is scored by"
        return PlannedStage(name, kind, "run", f"{does} {missing[0]}, which will be new", None, cost)
    key = workshop.key(name, origin, rewards)
    found = workshop.registry.checkpoint_by_key(key)
    if found is not None and not forced:
        workshop.registry.check_unchanged(found)
        return PlannedStage(name, kind, "reuse", f"made on {found.created[:16]}, nothing changed", key, cost, found)
    if workshop.registry.resumable(key) is not None and not forced:
        return PlannedStage(name, kind, "resume", "was stopped; goes on from its last saved state", key, cost)
    return PlannedStage(name, kind, "run", "forced" if forced else _why_new(workshop, name, origin, rewards), key, cost)


def _why_new(workshop: Workshop, name: str, origin: Origin, rewards: Mapping[str, Origin]) -> str:
    """What differs from the newest checkpoint of that name."""
    try:
        newest = workshop.registry.checkpoint(workshop.full_name(name))
    except AlignError:
        return "not made yet"
    now = workshop.ingredients(name, origin, rewards)
    before = {part: newest.recipe.get(part) for part in now}
    found = differences(before, now)
    return "changed: " + ", ".join(found[:3]) if found else "made otherwise"


def differences(before: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> list[str]:
    """Each setting that is not the same, with both values; of a hash only that it is another."""
    found = []
    for key in sorted({*before, *now}):
        old, new, where = before.get(key), now.get(key), f"{path}{key}"
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{where}.")
        elif old != new:
            hashed = any(isinstance(value, str) and len(value) == 64 for value in (old, new))
            found.append(where if hashed else f"{where} {json.dumps(old)} -> {json.dumps(new)}")
    return found


def _cost(workshop: Workshop, name: str) -> Estimate:
    settings = workshop.stage(name)
    if not isinstance(settings, TrainingSettings):
        return Estimate(None, None)
    source = adapter_stage(workshop.recipe, name)
    own = settings.adapter
    if source is not None:
        settings = settings.model_copy(update={"adapter": source.adapter, "quantize": source.quantize})
    shape = _shape(workshop)
    wide = shape is not None and shape.hidden >= BFLOAT16_MIN_WIDTH
    half = settings.precision == "bfloat16" or (settings.precision == "auto" and wide)
    if isinstance(settings, PpoSettings):
        scorers = [_scorer(workshop, name, reference, half=half) for reference in reward_references(settings)]
        found, prompts = [scorer for scorer in scorers if scorer], _prompts(workshop, settings.data)
        return estimate_ppo(settings, shape, prompts, found, half=half, from_adapter=own is None)
    return estimate(settings, shape, _data_bytes(workshop, settings.data), half=half)


def _shape(workshop: Workshop) -> Shape | None:
    return _shape_in(Path(workshop.model.source.root.path))


def _shape_in(folder: Path) -> Shape | None:
    config = folder / "config.json"
    return Shape.of(json.loads(config.read_text(encoding="utf-8"))) if config.is_file() else None


def _scorer(workshop: Workshop, name: str, reference: str, *, half: bool) -> Scorer | None:
    """A reward model of a stage; None: its shape is not known. An adapter on the policy's own base costs itself alone."""
    recipe = workshop.recipe
    if reference not in recipe.stages:
        folder = Path(workshop.reward_point(name, reference).source.root.path)
        found, size = _shape_in(folder), sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        return Scorer(found.parameters, size) if found else None
    shape, policy, scorer = _shape(workshop), adapter_stage(recipe, name), adapter_stage(recipe, reference)
    if shape is None:
        return None
    adapter = ADAPTER_BYTES * shape.adapter_parameters(scorer.adapter) if scorer and scorer.adapter else 0
    shared = policy and scorer and (policy.from_, policy.quantize) == (scorer.from_, scorer.quantize)
    base = 0 if shared else frozen_bytes(shape, scorer.quantize if scorer else None, half=half)
    return Scorer(shape.parameters, base + adapter)


def _prompts(workshop: Workshop, name: str) -> Prompts | None:
    """How many prompts a data set trains on and how long they are, from its registered rows, else from its file."""
    record, size = workshop.registry.data_by_key(workshop.data_key(name)), _data_bytes(workshop, name)
    path = workshop.recipe.data[name].path
    if record is not None:
        rows = int(record.info.get("train_rows", 0))
    elif size is not None and path and path.endswith(".jsonl"):
        rows = (workshop.folder / path).read_bytes().count(b"\n")
    else:
        return None
    return Prompts(rows, size / rows / BYTES_PER_TOKEN) if size and rows else None


def _data_bytes(workshop: Workshop, name: str) -> int | None:
    """Size of a data set's training part once it is registered; before, of its file; None when it lies elsewhere."""
    record = workshop.registry.data_by_key(workshop.data_key(name))
    if record is not None:
        return (record.path / "train.jsonl").stat().st_size
    path = workshop.recipe.data[name].path
    file = workshop.folder / path if path else None
    return file.stat().st_size if file is not None and file.is_file() else None
