"""What a recipe would do now: which stages run, which are reused or go on, why, and what they will cost.

Nothing is changed by a plan. A stage whose parent is still to be made has no key yet, so it is planned to run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from align.costs import NOTHING, Estimate, estimate
from align.errors import AlignError
from align.products import Made, Products, best_round, too_late
from align.recipe.critique_settings import OUTPUTS, CritiqueSettings
from align.recipe.graph import critic_reference, needed, stage_graph
from align.recipe.rounds import stages_of_loop
from align.recipe.settings import ConstitutionSettings, Stage
from align.registry.hashing import sha256_json
from align.registry.records import CheckpointRecord, StageData

if TYPE_CHECKING:
    from align.origins import Weights, Workshop

Action = Literal["run", "reuse", "resume", "skip"]
ENDED = {"interrupted": "was stopped", "failed": "failed", "crashed": "crashed"}  # what a run did before its end


@dataclass(frozen=True)
class PlannedStage:
    """One line of a plan. `made` is what is reused; peak memory and time are None where unknown, 0 of what does not run.

    A round of a loop is skipped when the one before it no longer lowered the violation rate.
    """

    name: str
    kind: str
    action: Action
    why: str
    key: str | None
    estimate: Estimate
    made: Made | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "name": self.name, "kind": self.kind, "action": self.action, "why": self.why, "key": self.key,
            "checkpoint": self.made.id if isinstance(self.made, CheckpointRecord) else None,
            "data": _data_ids(self.made) if isinstance(self.made, StageData) else None,
            "peak_memory_bytes": self.estimate.peak_memory_bytes, "seconds": self.estimate.seconds,
            "available_memory_bytes": self.estimate.available_bytes, "processes": self.estimate.processes,
        }  # fmt: skip


def plan(workshop: Workshop, stages: Sequence[str] = (), force: Sequence[str] = ()) -> list[PlannedStage]:
    """The named stages (all, when none is named) and all they need, in the order in which they run."""
    order = needed(workshop.recipe, list(stages) or list(workshop.recipe.stages))
    needed(workshop.recipe, list(force))  # a forced stage that does not exist is refused
    products = Products(workshop)
    return [planned_stage(workshop, name, products, forced=name in force) for name in order]


def planned_stage(workshop: Workshop, name: str, products: Products, *, forced: bool = False) -> PlannedStage:
    """What is to be done for one stage. products: what the stages before it have made, as far as it is up to date;
    what is reused or skipped now is added."""
    planned = _planned(workshop, name, products, forced)
    if planned.action == "skip":
        products.skipped.add(name)
    if planned.made is not None:
        products.add(name, planned.made)
    return planned


def _planned(workshop: Workshop, name: str, products: Products, forced: bool) -> PlannedStage:
    stage = workshop.stage(name)
    if isinstance(stage, ConstitutionSettings):
        return _chosen_round(workshop, name, stage, products)
    if why := too_late(workshop.recipe, name, products):
        return PlannedStage(name, stage.kind, "skip", why, None, NOTHING)
    weights, waiting = workshop.weights(name, products.checkpoints), workshop.waits_for(name)
    if weights is None or waiting:
        return PlannedStage(
            name, stage.kind, "run", _why_later(workshop, name, products, waiting), None, estimate(workshop, name)
        )
    key = workshop.key(name, weights)
    found = made_before(workshop, stage, key)
    if found is not None and not forced:
        for record in found.outputs.values() if isinstance(found, StageData) else [found]:
            workshop.registry.check_unchanged(record)
        why = f"made on {found.created[:16]}, nothing changed"
        return PlannedStage(name, stage.kind, "reuse", why, key, NOTHING, found)
    cost = estimate(workshop, name)
    begun = workshop.registry.resumable(key)
    if begun is not None and not forced:
        why = f"{ENDED[begun.status]}; goes on from its last saved state"
        return PlannedStage(name, stage.kind, "resume", why, key, cost)
    why = "forced" if forced else _why_new(workshop, name, weights)
    return PlannedStage(name, stage.kind, "run", why, key, cost)


def made_before(workshop: Workshop, stage: Stage, key: str) -> Made | None:
    """What a stage of this key made, if one was run."""
    if not isinstance(stage, CritiqueSettings):
        return workshop.registry.checkpoint_by_key(key)
    found = {output: workshop.registry.data_by_key(output_key(key, output)) for output in OUTPUTS}
    outputs = {output: record for output, record in found.items() if record is not None}
    return StageData(outputs) if len(outputs) == len(OUTPUTS) else None


def output_key(key: str, output: str) -> str:
    """Key of a data set that the stage with this key makes."""
    return sha256_json([key, output])


def _data_ids(made: StageData) -> dict[str, str]:
    return {output: record.id for output, record in made.outputs.items()}


def _why_later(workshop: Workshop, name: str, products: Products, waiting: Sequence[str]) -> str:
    if waiting:
        return f"trains on {waiting[0]}, which will be new"
    missing = next(need for need in stage_graph(workshop.recipe)[name] if not products.settled(need))
    stage = workshop.stage(name)
    does = "starts from" if missing == stage.from_ else "is scored by"
    if missing == critic_reference(stage):
        does = "is criticised by"
    return f"{does} {missing}, which will be new"


def _chosen_round(workshop: Workshop, name: str, stage: ConstitutionSettings, products: Products) -> PlannedStage:
    """The choice among the rounds of a loop: nothing is run for it."""
    pending = [one for one in stages_of_loop(workshop.recipe, name) if not products.settled(one)]
    if pending:
        why = f"is chosen among the rounds; {pending[0]} will be new"
        return PlannedStage(name, stage.kind, "run", why, None, NOTHING)
    number, record, why = best_round(name, stage, products)
    return PlannedStage(name, stage.kind, "reuse", f"round {number}: {why}", None, NOTHING, record)


def _why_new(workshop: Workshop, name: str, weights: Weights) -> str:
    """What differs from what was made last under that name, or else from the run of it that ended too early."""
    full, now = workshop.full_name(name), workshop.ingredients(name, weights)
    stopped = None
    try:
        if isinstance(workshop.stage(name), CritiqueSettings):
            before = workshop.registry.data(f"{full}.{next(iter(OUTPUTS))}").info["stage"]["ingredients"]
        else:
            before = workshop.registry.checkpoint(full).recipe
    except (AlignError, KeyError):
        stopped = next((run for run in workshop.registry.runs_of(workshop.recipe.name, name) if run.stopped), None)
        if stopped is None:
            return "not made yet"
        before = stopped.settings
    found = differences({part: before.get(part) for part in now}, now)
    changed = "changed: " + ", ".join(found[:3])
    if stopped:
        return f"run {stopped.id} {ENDED[stopped.status]}, and since then {changed}" if found else "not made yet"
    return changed if found else "made otherwise"


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
