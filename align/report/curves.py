"""Line charts of a run's metrics: training and held-out values of one name in one drawing, thinned to stay small.

A value that is not finite breaks the line and is marked: a run that went wrong must not look healthy.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from markupsafe import Markup

from align.report import svg, words
from align.report.svg import Point

WIDTH, HEIGHT = 360.0, 220.0
LEFT, RIGHT, TOP, BOTTOM = 48.0, 14.0, 14.0, 30.0
SMOOTHED_FROM, DOTTED_TO = 60, 20  # points of a line
RAW_POINTS, MEAN_POINTS = 120, 60  # drawn at most
FAR = 4.0  # a level beyond this many times the highest value is told in words, or it would flatten the curve
NO_CURVES = ("epoch", "number")  # say nothing that the step does not
_SOURCES = {
    "train": ("training", "train"),
    "round": ("training", "train"),
    "eval": ("held-out", "held-out"),
    "test": ("held-out", "held-out"),
}
_FIRST = ("loss", "accuracy", "margin", "kl", "learning_rate", "grad_norm", "tokens_per_second")


class MetricRow(Protocol):
    """One recorded value of a run."""

    @property
    def step(self) -> int:
        """Optimiser steps done."""

    @property
    def name(self) -> str:
        """What was measured: train.loss, eval.accuracy..."""

    @property
    def value(self) -> float:
        """The value; may be anything that a float can be."""


@dataclass(frozen=True)
class Series:
    """One line: its name in the legend, its class in the style sheet, its points by step."""

    name: str
    style: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Level:
    """A value that a curve is held against, drawn as a dashed line with its name."""

    name: str
    value: float


@dataclass(frozen=True)
class CurveChart:
    """One drawing with the words around it. note: the unit, and levels that lie too far off to be drawn."""

    title: str
    series: tuple[Series, ...]
    note: str
    drawing: Markup


def charts(rows: Iterable[MetricRow]) -> list[CurveChart]:
    """One chart per metric, `train.x` and `eval.x` together; the well-known first."""
    found = grouped(rows)
    order = {name: place for place, name in enumerate(_FIRST)}
    return [
        chart(words.label(name), found[name]) for name in sorted(found, key=lambda name: order.get(name, len(order)))
    ]


def grouped(rows: Iterable[MetricRow]) -> dict[str, tuple[Series, ...]]:
    """Lines of each metric under its name without `train`, `round` or `eval`; a lone point is no curve."""
    points: dict[str, dict[str, list[Point]]] = {}
    for row in rows:
        source, _, name = row.name.partition(".")
        bare = name if name and source in _SOURCES else row.name
        points.setdefault(bare, {}).setdefault(source, []).append((row.step, float(row.value)))
    return {
        name: _lines(sources)
        for name, sources in points.items()
        if name not in NO_CURVES and any(len(found) > 1 for found in sources.values())
    }


def chart(title: str, series: Sequence[Series], *, note: str = "by step", levels: Sequence[Level] = ()) -> CurveChart:
    """A chart with its words; of the levels, those are drawn that leave the curve its shape."""
    highest = max((abs(y) for one in series for _, y in one.points if math.isfinite(y)), default=0.0)
    near = [level for level in levels if level.value <= FAR * highest]
    told = [f"{level.name} {words.plain(float(f'{level.value:.3g}'))}" for level in levels]
    return CurveChart(title, tuple(series), "; ".join([note, *told]), line_chart(title, series, near))


def line_chart(title: str, series: Sequence[Series], levels: Sequence[Level] = ()) -> Markup:
    """The drawing: axes with round marks, one line per series; a long one is drawn faint, with its moving mean."""
    finite = [point for one in series for point in one.points if math.isfinite(point[1])]
    if not finite:
        return svg.drawing(WIDTH, 48, f"{title}: no finite value", svg.text(8, 28, "No finite value was recorded."))
    low, high = _padded([*(y for _, y in finite), *(level.value for level in levels)])
    steps = [x for one in series for x, _ in one.points]
    across = svg.scale(min(steps), max(steps), LEFT, WIDTH - RIGHT)
    up = svg.scale(low, high, HEIGHT - BOTTOM, TOP)
    parts = [*_axes(low, high, min(steps), max(steps)), *(_level(level, up) for level in levels)]
    parts += [_line(one, across, up) for one in series]
    parts += [_broken(one, across) for one in series]
    return svg.element(
        "svg", *parts, class_="chart curve", viewBox=f"0 0 {WIDTH:.0f} {HEIGHT:.0f}", width=WIDTH, height=HEIGHT,
        role="img", aria_label=_spoken(title, series), data_x=f"{min(steps)} {max(steps)}", data_y=f"{low:.6g} {high:.6g}",
        data_box=f"{LEFT:.0f} {TOP:.0f} {WIDTH - RIGHT:.0f} {HEIGHT - BOTTOM:.0f}",
    )  # fmt: skip


def _lines(sources: dict[str, list[Point]]) -> tuple[Series, ...]:
    """Held-out values come last: they lie on top."""
    styled = [(*_SOURCES.get(source, (words.label(source), "held-out")), points) for source, points in sources.items()]
    return tuple(
        Series(name, style, tuple(sorted(points)))
        for name, style, points in sorted(styled, key=lambda found: found[1] != "train")
    )


def _level(level: Level, up: svg.Scale) -> Markup:
    y = up(level.value)
    name = svg.text(LEFT + 4, y - 4, level.name, class_="quiet")
    return svg.element("g", svg.line(LEFT, y, WIDTH - RIGHT, y, "reference"), name)


def _axes(low: float, high: float, first: float, last: float) -> list[Markup]:
    up = svg.scale(low, high, HEIGHT - BOTTOM, TOP)
    across = svg.scale(first, last, LEFT, WIDTH - RIGHT)
    marks, steps = svg.ticks(low, high), [step for step in svg.ticks(first, last) if step == int(step)]
    parts = []
    for value, label in zip(marks, svg.tick_words(marks)):
        parts.append(svg.line(LEFT, up(value), WIDTH - RIGHT, up(value), "grid"))
        parts.append(svg.text(LEFT - 6, up(value) + 4, label, anchor="end"))
    for value, label in zip(steps, svg.tick_words(steps)):
        parts.append(svg.text(across(value), HEIGHT - BOTTOM + 18, label, anchor="middle"))
    return [*parts, svg.line(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, "axis")]


def _line(series: Series, across: svg.Scale, up: svg.Scale) -> Markup:
    drawn = [[(across(x), up(y)) for x, y in svg.thin(piece, RAW_POINTS)] for piece in _pieces(series.points)]
    noisy = len(series.points) >= SMOOTHED_FROM
    style = f"line {series.style}{' raw' if noisy else ''}"
    parts = [svg.element("path", d=svg.path(piece), class_=style) for piece in drawn]
    if len(series.points) <= DOTTED_TO:
        parts += [svg.element("circle", cx=x, cy=y, r=2.2, class_=f"dot {series.style}") for p in drawn for x, y in p]
    line = svg.element("g", *parts, data_name=series.name)
    if not noisy:
        return line
    means = [
        [(across(x), up(y)) for x, y in svg.thin(moving_mean(piece), MEAN_POINTS)] for piece in _pieces(series.points)
    ]
    smooth = [svg.element("path", d=svg.path(piece), class_=f"line {series.style}") for piece in means]
    return Markup("").join([line, *smooth])


def _pieces(points: Sequence[Point]) -> list[list[Point]]:
    """Stretches of finite values."""
    pieces: list[list[Point]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            pieces[-1].append(point)
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def moving_mean(points: Sequence[Point]) -> list[Point]:
    """Moving mean over a window of 1/20 of the points, centred, narrower at the ends."""
    half = max(1, len(points) // 40)
    totals = [0.0, *itertools.accumulate(y for _, y in points)]
    spans = ((max(0, i - min(half, i)), min(len(points), i + min(half, i) + 1)) for i in range(len(points)))
    return [(x, (totals[b] - totals[a]) / (b - a)) for (x, _), (a, b) in zip(points, spans)]


def _broken(series: Series, across: svg.Scale) -> Markup:
    steps = [x for x, y in series.points if not math.isfinite(y)][:40]
    marks = [svg.text(across(x), HEIGHT - BOTTOM - 4, "×", anchor="middle", class_="broken") for x in steps]
    return svg.element("g", *marks, aria_label="not finite") if marks else Markup("")


def _padded(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (max(0.0, low - room) if low >= 0 else low - room), high + room


def _spoken(title: str, series: Sequence[Series]) -> str:
    ends = [
        f"{one.name} from {words.number(one.points[0][1])} at step {one.points[0][0]:.0f} "
        f"to {words.number(one.points[-1][1])} at step {one.points[-1][0]:.0f}"
        for one in series
    ]
    return f"{title}: {'; '.join(ends)}"
