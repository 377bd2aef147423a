"""Charts that compare: dots with 95% whiskers, shares by bucket, by round and side by side, calibration, counts of rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from align.report import svg, words
from align.report.numbers import CHANCE, Change, Number, number_from

WIDTH, HEIGHT = 360.0, 220.0
LEFT, RIGHT, TOP, BOTTOM = 48.0, 20.0, 14.0, 40.0


def whiskers(change: Change, width: float = 220.0) -> Markup:
    """Before (hollow) above after (filled) on a scale of their own, whose ends are labelled."""
    numbers = [value for value in (change.before, change.after) if value and math.isfinite(value.value)]
    if len(numbers) + sum(value.interval is not None for value in numbers) < 2:
        return Markup("")  # one dot on a scale of its own says nothing
    low, high = _range(numbers, change.meaning.share)
    across = svg.scale(low, high, 10, width - 10)
    parts = [svg.line(10, 30, width - 10, 30, "axis")]
    if change.before:
        parts.append(_dot(change.before, across, 10, "before"))
    if change.after:
        parts.append(_dot(change.after, across, 20, "after"))
    labels = svg.tick_words([low * 100, high * 100] if change.meaning.share else [low, high])
    for label, x, anchor in zip(labels, (10.0, width - 10), ("start", "end")):
        parts.append(svg.text(x, 43, f"{label}%" if change.meaning.share else label, anchor=anchor))
    said = f"{change.meaning.label}: before {change.words(change.before) or 'not measured'}, after {change.words(change.after) or 'not measured'}"
    return svg.drawing(width, 48, said, *parts, class_="chart whiskers")


def buckets(rows: Sequence[Mapping[str, Any]], title: str) -> Markup:
    """Shares by bucket with their intervals, and a line at chance. rows: {"bucket", "value", "low", "high", "n"}."""
    found = [(str(row.get("bucket", "")), value) for row in rows if (value := number_from(row))][:12]
    if not found:
        return Markup("")
    up = svg.scale(0, 1, HEIGHT - BOTTOM, TOP)
    parts = [*_share_axis(up), svg.line(LEFT, up(CHANCE), WIDTH - RIGHT, up(CHANCE), "reference")]
    parts.append(svg.text(WIDTH - RIGHT, up(CHANCE) - 4, "chance", anchor="end", class_="quiet"))
    slot = (WIDTH - LEFT - RIGHT) / len(found)
    for place, (name, value) in enumerate(found):
        x = LEFT + slot * (place + 0.5)
        parts += [
            _upright(value, x, up),
            svg.text(x, HEIGHT - BOTTOM + 16, words.one_line(name, max(2, int(slot / 7))), anchor="middle"),
        ]
        if value.n is not None:
            parts.append(svg.text(x, HEIGHT - BOTTOM + 31, f"n={value.n:,}", anchor="middle", class_="quiet"))
    said = "; ".join(f"{name} {words.number(value.value, share=True)}" for name, value in found)
    return svg.drawing(WIDTH, HEIGHT, f"{title}: {said}", *parts)


def calibration(rows: Sequence[Mapping[str, Any]], title: str) -> Markup:
    """Accuracy against confidence, dots as large as their share of rows. rows: {"confidence", "accuracy", "n"}."""
    found = [point for row in rows if (point := _confidence_point(row))]
    if not found:
        return Markup("")
    low = min(CHANCE, *(min(x, y) for x, y, _ in found))
    across, up = svg.scale(low, 1, LEFT, WIDTH - RIGHT), svg.scale(low, 1, HEIGHT - BOTTOM, TOP)
    parts = [*_share_axis(up, low), svg.line(across(low), up(low), across(1), up(1), "reference")]
    for mark in svg.ticks(low, 1):
        parts.append(svg.text(across(mark), HEIGHT - BOTTOM + 16, f"{mark * 100:.0f}%", anchor="middle"))
    parts.append(svg.text(WIDTH - RIGHT, HEIGHT - 6, "confidence", anchor="end", class_="quiet"))
    parts.append(
        svg.element("path", d=svg.path([(across(x), up(y)) for x, y, _ in found]), class_="line held-out thin")
    )
    most = max(n for _, _, n in found) or 1
    for x, y, n in found:
        dot = svg.element("title", f"confidence {x:.0%}, right {y:.0%}, n={n:,.0f}")
        parts.append(
            svg.element("circle", dot, cx=across(x), cy=up(y), r=2.5 + 5 * math.sqrt(n / most), class_="dot after")
        )
    said = "; ".join(f"at {x:.0%} confidence {y:.0%} right" for x, y, _ in found)
    return svg.drawing(WIDTH, HEIGHT, f"{title}: {said}", *parts)


def shares_bar(parts: Sequence[tuple[str, float, str]]) -> Markup:
    """One bar cut by counts. parts: (name, count, class of the style sheet)."""
    total = sum(count for _, count, _ in parts)
    if total <= 0:
        return Markup("")
    x, drawn = 0.0, []
    for name, count, style in parts:
        wide = 720 * count / total
        shown = svg.element("title", f"{name}: {count:,.0f}")
        drawn.append(svg.element("rect", shown, x=x, y=0, width=max(wide - 1.5, 0.5), height=14, rx=2, class_=style))
        x += wide
    said = ", ".join(f"{name} {count:,.0f}" for name, count, _ in parts)
    return svg.element(
        "svg", *drawn, class_="bar", viewBox="0 0 720 14", preserveAspectRatio="none", role="img", aria_label=said
    )


def by_round(points: Sequence[tuple[int, Number]], kept: int | None, title: str) -> Markup:
    """Shares after each round with their intervals, round 0 being the start; the round that was kept is ringed."""
    found = [(number, value) for number, value in points if math.isfinite(value.value)]
    if len(found) < 2:
        return Markup("")
    low, high = _range([value for _, value in found], share=True)
    low = 0.0 if low < high / 2 else low
    up = svg.scale(low, high, HEIGHT - BOTTOM, TOP)
    across = svg.scale(found[0][0], found[-1][0], LEFT + 30, WIDTH - RIGHT - 30)
    drawn = [(across(number), up(value.value)) for number, value in found]
    parts = [*_share_axis(up, low, high), svg.element("path", d=svg.path(drawn), class_="line held-out")]
    for (number, value), (x, y) in zip(found, drawn):
        if number == kept:
            parts.append(svg.element("circle", cx=x, cy=y, r=9, class_="ring"))
        name = "start" if number == 0 else f"{number}"
        parts += [_upright(value, x, up), svg.text(x, HEIGHT - BOTTOM + 16, name, anchor="middle")]
        if number == kept:
            parts.append(svg.text(x, HEIGHT - BOTTOM + 31, "kept", anchor="middle", class_="quiet"))
    said = "; ".join(f"{f'round {n}' if n else 'start'} {words.number(v.value, share=True)}" for n, v in found)
    return svg.drawing(WIDTH, HEIGHT, f"{title}: {said}", *parts)


def side_bars(before: Number | None, after: Number | None, most: float, title: str) -> Markup:
    """Two shares as bars with whiskers, before above after, on a scale from 0 to `most`; a lone one stands in the middle."""
    across = svg.scale(0, most, 1, 199)
    parts = [svg.line(1, 0, 1, 26, "axis")]
    for value, y, style in ((before, 2.0 if after else 8.0, "before"), (after, 14.0 if before else 8.0, "after")):
        if value and math.isfinite(value.value):
            parts.append(
                svg.element("rect", x=1, y=y, width=across(value.value) - 1, height=10, class_=f"fill {style}")
            )
            if value.interval:
                low, high = (across(end) for end in value.interval)
                parts.append(svg.line(low, y + 5, high, y + 5, "span"))
    return svg.drawing(200, 26, title, *parts, class_="chart bars")


def nested_bar(whole: float, part: float, most: float, title: str) -> Markup:
    """A count as a bar and, within it, the part of it that came to something; on a scale from 0 to `most`."""
    across = svg.scale(0, most, 0, 160)
    parts = [
        svg.element("rect", x=0, y=1, width=across(whole), height=12, rx=2, class_="dropped"),
        svg.element("rect", x=0, y=1, width=across(part), height=12, rx=2, class_="kept"),
    ]
    return svg.drawing(160, 14, title, *parts, class_="chart bars")


def _dot(value: Number, across: svg.Scale, y: float, style: str) -> Markup:
    parts = []
    if value.interval:
        low, high = (across(end) for end in value.interval)
        parts.append(svg.line(low, y, high, y, f"whisker {style}"))
    parts.append(svg.element("circle", cx=across(value.value), cy=y, r=4.5, class_=f"dot {style}"))
    return svg.element("g", *parts)


def _upright(value: Number, x: float, up: svg.Scale) -> Markup:
    parts = []
    if value.interval:
        low, high = (up(end) for end in value.interval)
        parts.append(svg.line(x, low, x, high, "whisker after"))
    parts.append(svg.element("circle", cx=x, cy=up(value.value), r=4.5, class_="dot after"))
    parts.append(svg.element("title", words.number(value.value, share=True)))
    return svg.element("g", *parts)


def _share_axis(up: svg.Scale, low: float = 0.0, high: float = 1.0) -> list[Markup]:
    parts = []
    marks = svg.ticks(low, high, 7)
    for mark, said in zip(marks, svg.tick_words([mark * 100 for mark in marks])):
        parts.append(svg.line(LEFT, up(mark), WIDTH - RIGHT, up(mark), "grid"))
        parts.append(svg.text(LEFT - 6, up(mark) + 4, f"{said}%", anchor="end"))
    return [*parts, svg.line(LEFT, up(low), WIDTH - RIGHT, up(low), "axis")]


def _range(numbers: Sequence[Number], share: bool) -> tuple[float, float]:
    """Round ends around values and intervals; shares stay within 0 and 1."""
    ends = [end for value in numbers for end in (value.value, *(value.interval or ())) if math.isfinite(end)]
    room = (max(ends) - min(ends)) * 0.1 or abs(ends[0]) * 0.1 or 0.1
    step = svg.step(min(ends) - room, max(ends) + room, 5)
    low, high = math.floor((min(ends) - room) / step) * step, math.ceil((max(ends) + room) / step) * step
    low = max(low, 0.0) if min(ends) >= 0 else low
    return round(low, 12), round(min(high, 1.0) if share and max(ends) <= 1 else high, 12)


def _confidence_point(row: Mapping[str, Any]) -> tuple[float, float, float] | None:
    values = [number_from(row.get(key)) for key in ("confidence", "accuracy", "n")]
    x, y, n = (value.value if value else None for value in values)
    if x is None or y is None or not (math.isfinite(x) and math.isfinite(y)):
        return None
    return x, y, n if n is not None else 1.0
