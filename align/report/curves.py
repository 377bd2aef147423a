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
NO_CURVES = ("epoch",)  # says nothing that the step does not
_SOURCES = {"train": ("training", "train"), "eval": ("held-out", "held-out"), "test": ("held-out", "held-out")}
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
class CurveChart:
    """One drawing with the words around it."""

    title: str
    series: tuple[Series, ...]
    drawing: Markup


def charts(rows: Iterable[MetricRow]) -> list[CurveChart]:
    """One chart per metric, `train.x` and `eval.x` together; the well-known first, a lone point is no curve."""
    grouped: dict[str, dict[str, list[Point]]] = {}
    for row in rows:
        source, _, name = row.name.partition(".")
        bare = name if name and source in _SOURCES else row.name
        grouped.setdefault(bare, {}).setdefault(source, []).append((row.step, float(row.value)))
    order = {name: place for place, name in enumerate(_FIRST)}
    names = sorted((name for name in grouped if name not in NO_CURVES), key=lambda name: order.get(name, len(order)))
    return [_chart(name, grouped[name]) for name in names if any(len(points) > 1 for points in grouped[name].values())]


def line_chart(title: str, series: Sequence[Series]) -> Markup:
    """The drawing: axes with round marks, one line per series; a long one is drawn faint, with its moving mean."""
    finite = [point for one in series for point in one.points if math.isfinite(point[1])]
    if not finite:
        return svg.drawing(WIDTH, 48, f"{title}: no finite value", svg.text(8, 28, "No finite value was recorded."))
    low, high = _padded([y for _, y in finite])
    steps = [x for one in series for x, _ in one.points]
    across = svg.scale(min(steps), max(steps), LEFT, WIDTH - RIGHT)
    up = svg.scale(low, high, HEIGHT - BOTTOM, TOP)
    parts = [*_axes(low, high, min(steps), max(steps)), *(_line(one, across, up) for one in series)]
    parts += [_broken(one, across) for one in series]
    return svg.element(
        "svg", *parts, class_="chart curve", viewBox=f"0 0 {WIDTH:.0f} {HEIGHT:.0f}", width=WIDTH, height=HEIGHT,
        role="img", aria_label=_spoken(title, series), data_x=f"{min(steps)} {max(steps)}", data_y=f"{low:.6g} {high:.6g}",
        data_box=f"{LEFT:.0f} {TOP:.0f} {WIDTH - RIGHT:.0f} {HEIGHT - BOTTOM:.0f}",
    )  # fmt: skip


def _chart(name: str, sources: dict[str, list[Point]]) -> CurveChart:
    series = []
    for source, points in sorted(sources.items(), key=lambda found: found[0] != "train"):  # held-out lies on top
        title, style = _SOURCES.get(source, (words.label(source), "held-out"))
        series.append(Series(title, style, tuple(sorted(points))))
    title = words.label(name)
    return CurveChart(title, tuple(series), line_chart(title, series))


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
