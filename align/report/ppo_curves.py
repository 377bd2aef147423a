"""Charts of a ppo run: those by which to tell learning from reward hacking and collapse first, what else it recorded after.

Levels that a curve is held against (the KL limit, say) come from the settings of the stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from align.report import words
from align.report.curves import CurveChart, Level, MetricRow, Series, chart, grouped
from align.report.numbers import number_from

TITLES = {  # name of the series -> title of its chart, and what its numbers are
    "reward": ("Reward", "mean per answer"),
    "judge_score": ("Judge's score", "0 to 1"),
    "kl": ("KL from parent", "nats per answer"),
    "entropy": ("Entropy", "nats per token"),
    "length": ("Length of answers", "tokens"),
    "finished": ("Finished answers", "share that stopped by itself"),
    "value_explained": ("Value fit", "variance explained, 1 is perfect"),
    "clip_fraction": ("Clip fractions", "share of tokens"),
    "kl_coefficient": ("KL coefficient", "price of a nat"),
    "repetition": ("Repetition", "share of repeated 4-grams"),
    "length_correlation": ("Correlation with length", "of an answer's reward"),
    "reward_std": ("Spread of rewards", "deviation within a round"),
    "kl_token": ("KL from parent, per token", "nats"),
    "round_kl": ("KL from the round's start", "nats per token"),
    "mismatch": ("Mismatch of generator and trainer", "nats per token"),
}
_PARTS, _WATCHED = "reward.", "watch."
_LAST = ("kl", "entropy", "length", "finished", "value_explained", "clip_fraction", "kl_coefficient")
_ONLY_MOVING = ("kl_coefficient", "value_explained")  # constant where nothing steers it, or there is no value model
Lines = tuple[Series, ...]


def ppo_charts(rows: Iterable[MetricRow], settings: Mapping[str, Any]) -> tuple[list[CurveChart], list[CurveChart]]:
    """Charts for every reader, and the rest. settings: those of the stage."""
    lines = grouped(rows)
    levels = _levels(lines, settings)
    _join_clip_fractions(lines)
    for name in _ONLY_MOVING:
        if not _moves(lines.get(name, ())):
            lines.pop(name, None)
    charts = {name: _chart(name, found, levels.get(name, ())) for name, found in lines.items()}
    first = [charts.pop(name) for name in _first(lines)]
    return first, list(charts.values())


def _first(lines: Mapping[str, Lines]) -> list[str]:
    """Names of the charts for every reader: what is rewarded and watched, then how far and how well the policy moves."""
    parts = [name for name in lines if name.startswith(_PARTS)]
    watched = [name for name in lines if name.startswith(_WATCHED)]
    names = ["reward", *(parts if len(parts) > 1 else ()), "judge_score", *watched, *_LAST]
    return [name for name in names if name in lines]


def _chart(name: str, lines: Lines, levels: Sequence[Level]) -> CurveChart:
    title, unit = TITLES.get(name, (words.label(name), ""))
    if name.startswith(_PARTS):
        title, unit = f"Reward: {words.one_line(name.removeprefix(_PARTS), 40)}", "mean per answer"
    elif name.startswith(_WATCHED):
        title, unit = f"Watched: {words.one_line(name.removeprefix(_WATCHED), 40)}", "not trained on"
    return chart(title, lines, note=f"{unit}, by step" if unit else "by step", levels=levels)


def _join_clip_fractions(lines: dict[str, Lines]) -> None:
    """Both clip fractions as one chart, under the policy's name."""
    both = [
        Series(name, style, one.points)
        for key, name, style in (("clip_fraction", "policy", "policy"), ("value_clip_fraction", "value model", "value"))
        for one in lines.pop(key, ())
    ]
    if both:
        lines["clip_fraction"] = tuple(both)


def _moves(lines: Lines) -> bool:
    return len({value for one in lines for _, value in one.points}) > 1


def _levels(lines: Mapping[str, Lines], settings: Mapping[str, Any]) -> dict[str, list[Level]]:
    """Levels by the name of the chart that they belong to."""
    found = settings.get("guards")
    guards = found if isinstance(found, Mapping) else {}
    start = next((one.points[0][1] for one in lines.get("entropy", ())), 0.0)
    named = [
        ("kl", "target", settings.get("kl_target"), 1.0),
        ("kl", "limit", guards.get("kl_limit"), 1.0),
        ("entropy", "collapse", guards.get("entropy_floor"), start),
        ("repetition", "guard", guards.get("repetition"), 1.0),
        ("round_kl", "ends the round", settings.get("round_kl_limit"), 1.0),
    ]
    levels: dict[str, list[Level]] = {}
    for chart_name, name, value, factor in named:
        number = number_from(value)
        if number and number.value * factor > 0:
            levels.setdefault(chart_name, []).append(Level(name, number.value * factor))
    return levels
