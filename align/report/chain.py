"""What a report is about, gathered from the registry: a recipe's newest checkpoints, or one checkpoint and all before it.

A recipe's stages are its newest checkpoint of each name; a stage whose newest run did not end well has that run beside
it, so that a failure shows. Nothing here knows of pages.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from align.errors import AlignError, did_you_mean

if TYPE_CHECKING:
    from align.registry.records import CheckpointRecord, DataRecord, MetricRow, RunRecord
    from align.registry.store import Registry


@dataclass(frozen=True)
class StageFacts:
    """One stage: the checkpoint that it made (None: none yet), its run, the curves of that run, and the data it read."""

    name: str
    kind: str
    checkpoint: CheckpointRecord | None
    run: RunRecord | None
    curves: Sequence[MetricRow] = ()
    data: Mapping[str, DataRecord] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Identity in the graph. Not the content hash: two stages may make the same weights."""
        if self.checkpoint:
            return f"checkpoint-{self.checkpoint.number}"
        return f"run-{self.run.number}" if self.run else self.name

    @property
    def settings(self) -> dict[str, Any]:
        """Resolved settings of the stage, without what else went into its cache key."""
        kept: Mapping[str, Any] = self.run.settings if self.run else self.checkpoint.recipe if self.checkpoint else {}
        own = kept.get("settings")
        return dict(own if isinstance(own, Mapping) else kept)

    @property
    def parents(self) -> tuple[str, ...]:
        """Ids of what the stage was made from; those of a run without a checkpoint stand in its inputs."""
        if self.checkpoint:
            return self.checkpoint.parents
        parent = self.run.inputs.get("parent_id") if self.run else None
        learnt = [id for name, id in self.rewards.items() if name in _reward_names(self.settings)]
        return (str(parent), *learnt) if parent else ()

    @property
    def rewards(self) -> dict[str, str]:
        """Reward models of a ppo stage, those that it only watches among them: the recipe's name for each -> id."""
        found = self.run.inputs.get("rewards") if self.run else None
        return {str(name): str(id) for name, id in found.items()} if isinstance(found, Mapping) else {}


@dataclass(frozen=True)
class Chain:
    """The stages of a report, parents before children. target: what was asked for."""

    target: str
    title: str
    stages: tuple[StageFacts, ...]
    parents: Mapping[str, tuple[str, ...]]

    @property
    def outside(self) -> dict[str, str]:
        """Models that the chain started from and the registry does not hold: id -> the name that a run knew it by."""
        keys = {stage.key for stage in self.stages}
        return {
            parent: _given_name(stage, parent)
            for stage in reversed(self.stages)
            for parent in self.parents.get(stage.key, ())
            if parent not in keys
        }


def gather(registry: Registry, target: str) -> Chain:
    """Everything that a report on `target` shows.

    target: a recipe's name, a run's id or its start, or a checkpoint in any of its forms.
    Raises AlignError when the registry has nothing by that name.
    """
    recipe = _recipe_stages(registry, target)
    if recipe:
        return _chain(registry, target, target, recipe)
    run = _run(registry, target)
    if run:
        made = [record for record in registry.all_checkpoints() if record.run == run.id]
        stages = [_from_checkpoint(registry, record) for record in made] or [_from_run(registry, run)]
        return _chain(registry, target, f"{run.recipe}/{run.stage}", stages)
    try:
        record = registry.checkpoint(target)
    except AlignError as error:
        raise _nothing_found(registry, target) from error
    return _chain(registry, target, record.name, [_from_checkpoint(registry, record)])


def recipes(registry: Registry) -> list[str]:
    """Names of all recipes that left a run, the newest first."""
    runs = sorted(registry.all_runs(), key=lambda run: run.number, reverse=True)
    return list(dict.fromkeys(run.recipe for run in runs))


def _recipe_stages(registry: Registry, name: str) -> list[StageFacts]:
    newest: dict[str, CheckpointRecord] = {}
    for record in sorted(registry.all_checkpoints(), key=lambda record: record.number):
        if record.name.rpartition("/")[0] == name:
            newest[record.name] = record
    return [_from_checkpoint(registry, record) for record in newest.values()] + _unfinished(registry, name, newest)


def _unfinished(registry: Registry, name: str, done: Mapping[str, CheckpointRecord]) -> list[StageFacts]:
    newest: dict[str, RunRecord] = {}
    for run in sorted(registry.all_runs(), key=lambda run: run.number):
        if run.recipe == name:
            newest[run.stage] = run
    last = {stage: done.get(f"{name}/{stage}") for stage in newest}
    return [
        _from_run(registry, run)
        for stage, run in newest.items()
        if run.status != "finished" and not ((made := last[stage]) and made.created > run.started)
    ]


def _chain(registry: Registry, target: str, title: str, stages: Sequence[StageFacts]) -> Chain:
    found = {stage.key: stage for stage in stages}
    above: dict[str, tuple[str, ...]] = {}
    waiting = list(stages)
    while waiting:
        stage = waiting.pop()
        keys = []
        for parent in stage.parents:
            owner = _owner(parent, stage, found) or _ancestor(registry, parent)
            keys.append(owner.key if owner else parent)
            if owner and owner.key not in found:
                found[owner.key] = owner
                waiting.append(owner)
        above[stage.key] = tuple(dict.fromkeys(keys))
    return Chain(target, title, tuple(_in_order(found, above)), above)


def _given_name(stage: StageFacts, identifier: str) -> str:
    inputs = stage.run.inputs if stage.run else {}
    if inputs.get("parent_id") == identifier and inputs.get("parent"):
        return str(inputs["parent"])
    return next((name for name, id in stage.rewards.items() if id == identifier), identifier)


def _reward_names(settings: Mapping[str, Any]) -> set[Any]:
    """Names of the reward models that a stage learns from."""
    terms = settings.get("reward")
    return {term.get("from") for term in terms if isinstance(term, Mapping)} if isinstance(terms, list) else set()


def _owner(identifier: str, child: StageFacts, found: Mapping[str, StageFacts]) -> StageFacts | None:
    """The stage that made these weights; of two with the same weights, not the child and the older one."""
    same = [s for s in found.values() if s.checkpoint and s.checkpoint.id == identifier and s.key != child.key]
    return min(same, key=lambda stage: stage.checkpoint.number if stage.checkpoint else 0, default=None)


def _ancestor(registry: Registry, identifier: str) -> StageFacts | None:
    if not re.fullmatch(r"[0-9a-f]{16,64}", identifier):  # a hub id may look like the name of a checkpoint
        return None
    with contextlib.suppress(AlignError):
        return _from_checkpoint(registry, registry.checkpoint(identifier))
    return None


def _in_order(found: Mapping[str, StageFacts], above: Mapping[str, tuple[str, ...]]) -> Iterator[StageFacts]:
    """Parents before children; otherwise by the time at which they were made."""
    left = sorted(found.values(), key=_started)
    placed: set[str] = set()
    while left:
        ready = next((s for s in left if all(p in placed or p not in found for p in above[s.key])), left[0])
        left.remove(ready)
        placed.add(ready.key)
        yield ready


def _started(stage: StageFacts) -> tuple[str, str]:
    when = stage.run.started if stage.run else stage.checkpoint.created if stage.checkpoint else ""
    return when, stage.key


def _from_checkpoint(registry: Registry, record: CheckpointRecord) -> StageFacts:
    run = _run(registry, record.run)
    curves = registry.metrics(run.id) if run else ()
    return StageFacts(record.name, run.kind if run else record.kind, record, run, curves, _data(registry, record))


def _from_run(registry: Registry, run: RunRecord) -> StageFacts:
    return StageFacts(f"{run.recipe}/{run.stage}", run.kind, None, run, registry.metrics(run.id))


def _data(registry: Registry, record: CheckpointRecord) -> dict[str, DataRecord]:
    found = {}
    for use in record.data:
        with contextlib.suppress(AlignError):
            found[use.id] = registry.data(use.id)
    return found


def _run(registry: Registry, name: str) -> RunRecord | None:
    with contextlib.suppress(AlignError):
        return registry.run(name)
    return None


def _nothing_found(registry: Registry, target: str) -> AlignError:
    known = recipes(registry)
    if not known:
        return AlignError(
            f"nothing to report on '{target}': the registry is empty", "Run a recipe first: align run RECIPE"
        )
    return AlignError(f"the registry has no recipe, run or checkpoint '{target}'", did_you_mean(target, known))
