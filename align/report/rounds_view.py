"""What the page shows of a loop: its held-out numbers round by round, as curves and as a table, and the round it kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from align.report import comparisons
from align.report.chips import Chip, chip
from align.report.loops import Loop
from align.report.numbers import Change, Meaning, Number, meaning_of, number_from

JUDGED = "judge.violation_rate"
FOUND = "critic.violation_rate"  # of the critic that also wrote the rows; it looks before each round only
NUMBERS = (JUDGED, "judge.correct", "judge.answered_rightly", "judge.refused_wrongly")


@dataclass(frozen=True)
class Curve:
    """One number over the rounds, as a drawing."""

    title: str
    note: str
    drawing: Markup


@dataclass(frozen=True)
class Cell:
    """A number of one round under the words of its column; both other texts are empty where it was not measured."""

    label: str
    value: str
    interval: str


@dataclass(frozen=True)
class RoundRow:
    """One line of the table: the start or a round, the anchors of its stages, its numbers in the order of the columns."""

    name: str
    anchor: str
    critique: str
    rows: str
    kept: bool
    cells: Sequence[Cell]


@dataclass(frozen=True)
class LoopView:
    """All that the page says of one loop. first: anchor of its first stage, before which it stands."""

    anchor: str
    first: str
    name: str
    sentence: str
    headline: Change | None
    headline_chart: Markup
    chip: Chip
    columns: Sequence[Meaning]
    rounds: Sequence[RoundRow]
    curves: Sequence[Curve]


def loop_view(loop: Loop) -> LoopView:
    """The view of a loop; numbers are those of the stages that train, the critic's own where no judge measured."""
    measured = {name: points for name in NUMBERS if (points := _points(loop, name))}
    if JUDGED not in measured and (found := _found(loop)):
        measured = {FOUND: found, **measured}
    main = _headline(loop, measured)
    return LoopView(
        anchor=f"loop-{loop.stages[0].key}",
        first=loop.stages[0].key,
        name=loop.name,
        sentence=_sentence(loop, main),
        headline=main,
        headline_chart=comparisons.whiskers(main) if main else Markup(""),
        chip=chip(main) if main else Chip("none kept" if loop.kept is None else "not measured", "none"),
        columns=[meaning_of(name) for name in measured],
        rounds=_rows(loop, measured),
        curves=[_curve(name, points, loop.kept) for name, points in measured.items() if len(points) > 1],
    )


def _points(loop: Loop, name: str) -> dict[int, Number]:
    """A number by round; 0 is the start, as the first round found it."""
    found = {number: number_from(stage.metrics.get(f"after.{name}")) for number, stage in loop.rounds.items()}
    if 1 in loop.rounds:
        found[0] = number_from(loop.rounds[1].metrics.get(f"before.{name}"))
    return {number: value for number, value in sorted(found.items()) if value}


def _found(loop: Loop) -> dict[int, Number]:
    """How many answers the critic of each round objected to, which is before that round trained."""
    stages = {stage.round.number: stage for stage in loop.stages if stage.round and stage.round.part == "critique"}
    found = {number - 1: number_from(stage.metrics.get(f"before.{FOUND}")) for number, stage in stages.items()}
    return {number: value for number, value in sorted(found.items()) if value}


def _headline(loop: Loop, measured: Mapping[str, Mapping[int, Number]]) -> Change | None:
    """From the start to the round that was kept."""
    name = next(iter(measured), None)
    if name is None or loop.kept is None:
        return None
    return Change(name, meaning_of(name), measured[name].get(0), measured[name].get(loop.kept))


def _sentence(loop: Loop, main: Change | None) -> str:
    made, planned = len(loop.rounds), loop.planned
    parts = [f"{made} round{'s' * (made != 1)}{f' of {planned} at most' if planned else ''}."]
    if loop.kept is None:
        return " ".join([*parts, "None of them is kept."])
    parts.append(f"Round {loop.kept} is kept.")
    if main and main.before and main.after:
        parts.append(
            f"{main.meaning.label}: {main.words(main.before)} at the start, {main.words(main.after)} after it."
        )
    return " ".join(parts)


def _rows(loop: Loop, measured: Mapping[str, Mapping[int, Number]]) -> list[RoundRow]:
    critiques = {stage.round.number: stage for stage in loop.stages if stage.round and stage.round.part == "critique"}
    start = RoundRow("Start", "", "", "", False, _cells(measured, 0))
    rows = [
        RoundRow(
            name=f"Round {number}",
            anchor=stage.key,
            critique=critiques[number].key if number in critiques else "",
            rows=f"{stage.uses[0].rows:,}" if stage.uses else "",
            kept=number == loop.kept,
            cells=_cells(measured, number),
        )
        for number, stage in loop.rounds.items()
    ]
    return [start, *rows]


def _cells(measured: Mapping[str, Mapping[int, Number]], number: int) -> list[Cell]:
    return [_cell(name, points.get(number)) for name, points in measured.items()]


def _cell(name: str, value: Number | None) -> Cell:
    change = Change(name, meaning_of(name), None, value)
    return Cell(change.meaning.label, change.words(value), change.interval_words(value))


def _curve(name: str, points: Mapping[int, Number], kept: int | None) -> Curve:
    meaning = meaning_of(name)
    better = {"lower": "lower is better", "higher": "higher is better"}.get(meaning.better, "")
    note = "; ".join(part for part in (meaning.about, better) if part)
    return Curve(meaning.label, note, comparisons.by_round(list(points.items()), kept, meaning.label))
