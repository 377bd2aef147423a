"""The little that our charts need of SVG: escaped elements, scales, round tick marks, thinned lines. No chart is here.

Colours come from classes that the page's style sheet sets, so that one drawing serves light, dark and print.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup, escape

from align.report import words

MOST_SAID = 2000  # characters of what a drawing says to those who cannot see it

Point = tuple[float, float]
Scale = Callable[[float], float]


def element(tag: str, *children: str | Markup, **attributes: object) -> Markup:
    """One element; texts and attribute values are escaped, `class_` and `stroke_width` become class and stroke-width.

    An attribute that is None is left out.
    """
    parts = [
        Markup(' {}="{}"').format(name.rstrip("_").replace("_", "-"), _attribute(value))
        for name, value in attributes.items()
        if value is not None
    ]
    opening = Markup("<{}{}").format(Markup(tag), Markup("").join(parts))
    if not children:
        return opening + Markup("/>")
    inner = Markup("").join(escape(words.printable(c)) if not isinstance(c, Markup) else c for c in children)
    return opening + Markup(">") + inner + Markup("</{}>").format(Markup(tag))


def drawing(
    width: float, height: float, title: str, *children: Markup, class_: str = "chart", size: float = 1.0
) -> Markup:
    """The outer element: scales with the page, and says its title to those who cannot see it.

    size: of the drawing on a page that has room for all of it.
    """
    return element(
        "svg", *children, class_=class_, viewBox=f"0 0 {_attribute(width)} {_attribute(height)}",
        width=width * size, height=height * size, role="img", aria_label=words.one_line(title, MOST_SAID), xmlns="http://www.w3.org/2000/svg",
    )  # fmt: skip


def text(x: float, y: float, content: str, *, anchor: str = "start", class_: str | None = None) -> Markup:
    """A line of text at (x, y) of its base line."""
    return element("text", content, x=x, y=y, text_anchor=None if anchor == "start" else anchor, class_=class_)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """A straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def scale(low: float, high: float, start: float, end: float) -> Scale:
    """A straight map of [low, high] onto [start, end]; an empty range maps to the middle."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return lambda _: (start + end) / 2
    return lambda value: start + (value - low) / span * (end - start)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round values inside [low, high], at most `most` of them, steps of 1, 2 or 5 times a power of ten."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return [low] if math.isfinite(low) else []
    by = step(low, high, most)
    first = math.ceil(low / by - 1e-9)
    return [round(place * by, 12) for place in range(first, math.floor(high / by + 1e-9) + 1)]


def step(low: float, high: float, most: int) -> float:
    """1, 2 or 5 times a power of ten that cuts [low, high] into fewer than `most` parts."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    return next((power * m for m in (1, 2, 5, 10) if (high - low) / (power * m) <= most - 1), power * 10)


def tick_words(values: Sequence[float]) -> list[str]:
    """Tick labels with the same number of decimals, as few as tell them apart."""
    if not values:
        return []
    size = max(abs(value) for value in values)
    if size and (size < 0.001 or size >= 1e6):
        return [_power_words(value) for value in values]
    decimals = next((d for d in range(7) if all(abs(round(v, d) - v) <= 1e-9 * max(size, 1) for v in values)), 6)
    return [f"{value:,.{decimals}f}".replace("-", words.MINUS) for value in values]


def _power_words(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("e+0", "e").replace("-", words.MINUS)


def thin(points: Sequence[Point], most: int = 160) -> list[Point]:
    """At most `most` points of a line: first, last, and the lowest and highest of each stretch, so no spike is lost."""
    if len(points) <= most:
        return list(points)
    inner = points[1:-1]
    stretches = max(1, (most - 2) // 2)
    kept = [points[0]]
    for place in range(stretches):
        part = inner[place * len(inner) // stretches : (place + 1) * len(inner) // stretches]
        if part:
            ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
            kept += sorted(ends)
    return [*kept, points[-1]]


def path(points: Sequence[Point]) -> str:
    """The `d` of a line through points on the page."""
    return "M" + "L".join(f"{_attribute(round(x, 1))},{_attribute(round(y, 1))}" for x, y in points)


def _attribute(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1f}".removesuffix(".0")
    return words.printable(value)
