"""What the registry holds, as stages: its checkpoints, its unfinished runs, and the data sets that stages made."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from align.errors import AlignError
from align.registry.records import DataUse, StageData
from align.report.stage_facts import StageFacts

if TYPE_CHECKING:
    from align.registry.records import CheckpointRecord, DataRecord, RunRecord
    from align.registry.store import Registry


class Shelf:
    """The registry, read once for one report."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry

    @cached_property
    def checkpoints(self) -> list[CheckpointRecord]:
        """All checkpoints, the oldest first."""
        return sorted(self.registry.all_checkpoints(), key=lambda record: record.number)

    @cached_property
    def made(self) -> list[StageData]:
        """What each run that made data has made, the oldest first."""
        found: dict[str, dict[str, DataRecord]] = {}
        for record in sorted(self.registry.all_data(), key=lambda record: record.number):
            if record.run and isinstance(record.info.get("stage"), Mapping):
                found.setdefault(record.run, {})[record.name.rpartition(".")[2]] = record
        return [StageData(outputs) for outputs in found.values()]

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
        return next((record for record in reversed(self.checkpoints) if record.name == loop), None)

    def is_loop(self, name: str) -> bool:
        """Whether checkpoints of rounds stand under this name."""
        return any(re.fullmatch(rf"{re.escape(name)}\.\d+", record.name) for record in self.checkpoints)

    def _maker(self, stage: StageFacts, use: DataUse, before: str) -> StageData | None:
        """Of several that made the same content, the one of that name, then the newest that was there in time."""
        named = f"{stage.name.rpartition('/')[0]}/{use.name}"
        fitting = [
            (any(record.name == named for record in made.outputs.values()), place, made)
            for place, made in enumerate(self.made)
            if made.created <= before and any(record.id == use.id for record in made.outputs.values())
        ]
        return max(fitting, key=lambda found: found[:2])[2] if fitting else None

    def _round_behind(self, record: CheckpointRecord) -> CheckpointRecord | None:
        same = (one for one in reversed(self.checkpoints) if one.run == record.run and one.id == record.id)
        return next((one for one in same if re.fullmatch(rf"{re.escape(record.name)}\.\d+", one.name)), None)

    def _data(self, identifiers: Iterable[str]) -> dict[str, DataRecord]:
        found = {}
        for identifier in identifiers:
            with contextlib.suppress(AlignError):
                found[identifier] = self.registry.data(identifier)
        return found
