"""What the registry holds, as stages: its checkpoints, its unfinished runs, and the data sets that stages made."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from align.errors import AlignError
from align.registry.records import DataUse, StageData
from align.report.stage_facts import StageFacts

if TYPE_CHECKING:
    from align.registry.records import CheckpointRecord, DataRecord, RunRecord
    from align.registry.store import Registry


class Shelf:
    """The registry, asked for what one report needs: of thousands of runs, those of its chain."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry

    def checkpoints(self, recipe: str) -> dict[str, CheckpointRecord]:
        """The newest of each name of a recipe, the oldest first. A loop's name stands for one of its rounds, and is not
        among them."""
        newest = {record.name: record for record in reversed(self.registry.newest_checkpoints(f"{recipe}/"))}
        rounds = (re.fullmatch(r"(.+)\.\d+", name) for name in newest)
        loops = {found[1] for found in rounds if found}
        below = {name: record for name, record in newest.items() if name.rpartition("/")[0] == recipe}
        return {name: record for name, record in below.items() if name not in loops}

    def data_stages(self, recipe: str) -> dict[str, StageData]:
        """What the stages of a recipe that make data made last, by name, the oldest first."""
        newest = reversed(self.registry.newest_data(f"{recipe}/"))
        made = [found for run in dict.fromkeys(record.run for record in newest) if (found := self.made_in(run))]
        return {one.name: one for one in made if one.name.rpartition("/")[0] == recipe}

    def data_stage(self, name: str) -> StageData | None:
        """What the stage of that name made last, if it makes data."""
        runs = dict.fromkeys(record.run for record in self.registry.newest_data(f"{name}."))
        return next((made for run in runs if (made := self.made_in(run)) and made.name == name), None)

    def made_in(self, run: str | None) -> StageData | None:
        """The data sets that a run made."""
        outputs = {
            record.name.rpartition(".")[2]: record
            for record in reversed(self.registry.data_of(run) if run else [])
            if isinstance(record.info.get("stage"), Mapping)
        }
        return StageData(outputs) if outputs else None

    def run(self, name: str) -> RunRecord | None:
        """The run whose id begins so."""
        with contextlib.suppress(AlignError):
            return self.registry.run(name)
        return None

    def from_checkpoint(self, record: CheckpointRecord) -> StageFacts:
        """The stage that made a checkpoint; of one that a loop kept, the round that made it."""
        record = self._round_behind(record) or record
        run = self.run(record.run)
        curves = self.registry.metrics(run.id) if run else ()
        data = self._data(use.id for use in record.data)
        return StageFacts(record.name, run.kind if run else record.kind, record, run, curves, data)

    def from_run(self, run: RunRecord) -> StageFacts:
        """A stage that made nothing."""
        return StageFacts(f"{run.recipe}/{run.stage}", run.kind, None, run, self.registry.metrics(run.id))

    def from_data(self, made: StageData) -> StageFacts:
        """The stage that made data sets."""
        run = self.run(next(iter(made.outputs.values())).run or "")
        named = run.inputs.get("data") if run else None
        data = self._data(map(str, named.values()) if isinstance(named, Mapping) else ())
        curves = self.registry.metrics(run.id) if run else ()
        return StageFacts(made.name, made.kind, None, run, curves, data, made)

    def made_by(self, stage: StageFacts) -> dict[str, StageData]:
        """Of the data sets that a stage used, those that another stage had made: id -> all that one made."""
        before = stage.checkpoint.created if stage.checkpoint else ""
        found = {use.id: self._maker(stage, use, before) for use in stage.uses}
        return {identifier: made for identifier, made in found.items() if made}

    def ancestor(self, identifier: str) -> StageFacts | None:
        """The stage that made a checkpoint of this id, if the registry holds one."""
        if not re.fullmatch(r"[0-9a-f]{16,64}", identifier):  # a hub id may look like the name of a checkpoint
            return None
        with contextlib.suppress(AlignError):
            return self.from_checkpoint(self.registry.checkpoint(identifier))
        return None

    def kept(self, loop: str) -> CheckpointRecord | None:
        """The checkpoint that stands under the name of a loop: the round that was kept."""
        return self.registry.newest_checkpoint(loop)

    def _maker(self, stage: StageFacts, use: DataUse, before: str) -> StageData | None:
        """Of several that made the same content, the one of that name, then the newest that was there in time."""
        named = f"{stage.name.rpartition('/')[0]}/{use.name}"
        same = sorted(self.registry.data_with(use.id), key=lambda record: record.name != named)
        makers = (self.made_in(run) for run in dict.fromkeys(record.run for record in same))
        return next((made for made in makers if made and made.created <= before), None)

    def _round_behind(self, record: CheckpointRecord) -> CheckpointRecord | None:
        same = (one for one in self.registry.checkpoints_of(record.run) if one.id == record.id)
        return next((one for one in same if re.fullmatch(rf"{re.escape(record.name)}\.\d+", one.name)), None)

    def _data(self, identifiers: Iterable[str]) -> dict[str, DataRecord]:
        found = {}
        for identifier in identifiers:
            with contextlib.suppress(AlignError):
                found[identifier] = self.registry.data(identifier)
        return found
