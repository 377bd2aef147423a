"""Loops of a chain: which stages are rounds of one `constitution` stage, and which round it kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from align.report.shelf import Shelf
from align.report.stage_facts import StageFacts


@dataclass(frozen=True)
class Loop:
    """A loop: its stages in the order of the chain, those that train by round, and the round that was kept (None: it is not among them, or not chosen yet)."""

    name: str
    stages: tuple[StageFacts, ...]
    rounds: dict[int, StageFacts]
    kept: int | None

    @property
    def planned(self) -> int | None:
        """Rounds at most, as the recipe has it; None where no run recorded that."""
        for stage in self.stages:
            found: Any = stage.run.settings if stage.run else {}
            for key in ("recipe", "stages", self.name.rpartition("/")[2], "rounds"):
                found = found.get(key) if isinstance(found, dict) else None
            if isinstance(found, int):
                return found
        return None


def loops_in(stages: Sequence[StageFacts], shelf: Shelf) -> tuple[Loop, ...]:
    """The loops of which these stages hold a round that trained."""
    found: dict[str, list[StageFacts]] = {}
    for stage in stages:
        if stage.round:
            found.setdefault(stage.round.loop, []).append(stage)
    loops = (_loop(name, members, shelf) for name, members in found.items())
    return tuple(loop for loop in loops if loop.rounds)


def without_stale_rounds(stages: Iterable[StageFacts]) -> list[StageFacts]:
    """All but rounds of an earlier run of a loop: those that did not start from what is now the round before them."""
    ends: dict[tuple[str, int], str] = {}
    kept = []
    for stage in sorted(stages, key=_place):
        place = stage.round
        if place and place.number > 1 and stage.parents[:1] != (ends.get((place.loop, place.number - 1)),):
            continue
        if place and not place.part and stage.checkpoint:
            ends[place.loop, place.number] = stage.checkpoint.id
        kept.append(stage)
    return kept


def _place(stage: StageFacts) -> tuple[str, int]:
    return (stage.round.loop, stage.round.number) if stage.round else ("", 0)


def _loop(name: str, members: Sequence[StageFacts], shelf: Shelf) -> Loop:
    trained = {place.number: one for one in members if (place := one.round) and not place.part and one.checkpoint}
    choice = shelf.kept(name)
    kept = [number for number, one in trained.items() if choice and one.run and choice.run == one.run.id]
    return Loop(name, tuple(members), dict(sorted(trained.items())), kept[0] if kept else None)
