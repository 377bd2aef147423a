"""What a report is about, gathered from the registry: a recipe's newest stages, or one checkpoint and all before it.

A recipe's stages are what it made last under each name; a stage whose newest run did not end well has that run beside
it, so that a failure shows. Nothing here knows of pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from align.errors import AlignError, did_you_mean
from align.report.loops import Loop, loops_in, without_stale_rounds
from align.report.shelf import Shelf
from align.report.stage_facts import StageFacts

if TYPE_CHECKING:
    from align.registry.records import CheckpointRecord, RunRecord
    from align.registry.store import Registry


@dataclass(frozen=True)
class Chain:
    """The stages of a report, parents before children. target: what was asked for.

    parents: stage -> stages and models that it was made from. makers: stage -> the id of a data set that it used -> the
    stage that made that.
    """

    target: str
    title: str
    stages: tuple[StageFacts, ...]
    parents: Mapping[str, tuple[str, ...]]
    makers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    loops: tuple[Loop, ...] = ()

    @property
    def outside(self) -> dict[str, str]:
        """Models that the chain started from and the registry does not hold: id -> the name that a run knew it by."""
        keys = {stage.key for stage in self.stages}
        return {
            parent: stage.given_name(parent)
            for stage in reversed(self.stages)
            for parent in self.parents.get(stage.key, ())
            if parent not in keys
        }


def gather(registry: Registry, target: str) -> Chain:
    """Everything that a report on `target` shows.

    target: a recipe's name, a run's id or its start, a checkpoint in any of its forms, or a stage that made data.
    Raises AlignError when the registry has nothing by that name.
    """
    shelf = Shelf(registry)
    recipe = _recipe_stages(shelf, target)
    if recipe:
        return _chain(shelf, target, target, recipe)
    run = shelf.run(target)
    if run:
        return _chain(shelf, target, f"{run.recipe}/{run.stage}", _stages_of(shelf, run))
    if made := shelf.data_stage(target):
        return _chain(shelf, target, target, [shelf.from_data(made)])
    try:
        record = registry.checkpoint(target)
    except AlignError as error:
        raise _nothing_found(registry, target) from error
    return _chain(shelf, target, record.name, [shelf.from_checkpoint(record)])


def _stages_of(shelf: Shelf, run: RunRecord) -> list[StageFacts]:
    """What a run made: checkpoints (those of one run under several names are one stage), data sets, or nothing."""
    records = reversed(shelf.registry.checkpoints_of(run.id))
    made = {(one := shelf.from_checkpoint(record)).key: one for record in records}
    data = shelf.made_in(run.id)
    return [*made.values(), *([shelf.from_data(data)] if data else [])] or [shelf.from_run(run)]


def _recipe_stages(shelf: Shelf, name: str) -> list[StageFacts]:
    newest = shelf.checkpoints(name)
    stages = without_stale_rounds(shelf.from_checkpoint(record) for record in newest.values())
    used = {made.name for stage in stages for made in shelf.made_by(stage).values()}
    unused = [shelf.from_data(made) for stage, made in shelf.data_stages(name).items() if stage not in used]
    return without_stale_rounds([*stages, *unused, *_unfinished(shelf, name, newest)])


def _unfinished(shelf: Shelf, name: str, done: Mapping[str, CheckpointRecord]) -> list[StageFacts]:
    return [
        shelf.from_run(run)
        for run in reversed(shelf.registry.last_runs(name))
        if run.status != "finished" and not ((made := done.get(f"{name}/{run.stage}")) and made.created > run.started)
    ]


def _chain(shelf: Shelf, target: str, title: str, stages: Sequence[StageFacts]) -> Chain:
    found = {stage.key: stage for stage in stages}
    above: dict[str, tuple[str, ...]] = {}
    makers: dict[str, dict[str, str]] = {}
    waiting = list(stages)
    while waiting:
        stage = waiting.pop()
        owners = {parent: _owner(parent, stage, found) or shelf.ancestor(parent) for parent in stage.parents}
        above[stage.key] = tuple(dict.fromkeys(owner.key if owner else parent for parent, owner in owners.items()))
        sources = {id: shelf.from_data(made) for id, made in shelf.made_by(stage).items()}
        makers[stage.key] = {identifier: source.key for identifier, source in sources.items()}
        for other in (*owners.values(), *sources.values()):
            if other and other.key not in found:
                found[other.key] = other
                waiting.append(other)
    before = {key: (*above[key], *makers[key].values()) for key in found}
    ordered = tuple(_in_order(found, before))
    return Chain(target, title, ordered, above, makers, loops_in(ordered, shelf))


def _owner(identifier: str, child: StageFacts, found: Mapping[str, StageFacts]) -> StageFacts | None:
    """The stage that made these weights; of two with the same weights, not the child and the older one."""
    same = [s for s in found.values() if s.checkpoint and s.checkpoint.id == identifier and s.key != child.key]
    return min(same, key=lambda stage: stage.checkpoint.number if stage.checkpoint else 0, default=None)


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


def _nothing_found(registry: Registry, target: str) -> AlignError:
    known = registry.recipes()
    if not known:
        return AlignError(
            f"nothing to report on '{target}': the registry is empty", "Run a recipe first: align run RECIPE"
        )
    return AlignError(f"the registry has no recipe, run or checkpoint '{target}'", did_you_mean(target, known))
