"""Verdicts in a word or two: of a change, of a check, of a judged answer. A sign before the word serves those who see no colour."""

from __future__ import annotations

from dataclasses import dataclass

from align.report.numbers import Change

SIGNS = {"better": "▲", "worse": "▼", "unclear": "≈", "same": "="}
RIGHT, WRONG = "✓", "✗"


@dataclass(frozen=True)
class Chip:
    """A verdict in a word or two, with a sign before it; style: better, worse, unclear, none."""

    text: str
    style: str
    sign: str = "·"


def chip(change: Change) -> Chip:
    """What may be said of a change, in words that also say what it was compared with."""
    verdict = change.verdict
    if change.baseline == "chance" and verdict in ("better", "worse", "unclear"):
        against = {"better": "above chance", "worse": "below chance"}.get(verdict, "not told from chance")
        return Chip(against, verdict, SIGNS[verdict])
    if verdict == "none":
        return Chip("measured", "none")
    sure = "" if change.certain or verdict in ("unclear", "same") else ", no interval"
    return Chip(f"{verdict}{sure}", "none" if verdict == "same" else verdict, SIGNS[verdict])


def marked(said: str, good: bool | None) -> Chip:
    """What a check or a judge said: right, wrong, or neither."""
    if good is None:
        return Chip(said, "none")
    return Chip(said, "better", RIGHT) if good else Chip(said, "worse", WRONG)
