"""Answers to held-out prompts as the page shows them: before and after a stage, and over the rounds of a ppo run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.report import words
from align.report.chips import Chip, marked
from align.report.numbers import number_from

MOST_SAMPLES, MOST_TEXT = 8, 1200  # answers of a stage, characters of each
MOST_MOMENTS = 8  # answers to one prompt over a run
FOLDED_FROM, OPENING = 260, 120  # characters of an answer that is shown by its opening alone, and of that opening


@dataclass(frozen=True)
class Moment:
    """What was answered in a round, and its reward; of a long answer its opening, which stands for it while folded."""

    round: str
    reward: str
    text: str
    opening: str


@dataclass(frozen=True)
class Sample:
    """One prompt with the answers of parent and child, cut to a readable length, and those on the way between them."""

    prompt: str
    before: str
    after: str
    before_verdict: Chip | None
    after_verdict: Chip | None
    before_reward: str
    after_reward: str
    moments: Sequence[Moment]


def samples_view(rows: Iterable[Any]) -> list[Sample]:
    """Every sample of a checkpoint; what is no mapping is left out."""
    return [_sample(row) for row in rows if isinstance(row, Mapping)]


def _sample(row: Mapping[str, Any]) -> Sample:
    return Sample(
        prompt=shown_text(row.get("prompt")),
        before=shown_text(row.get("before")),
        after=shown_text(row.get("after")),
        before_verdict=verdict_chip(row.get("before_verdict")),
        after_verdict=verdict_chip(row.get("after_verdict")),
        before_reward=_reward(row.get("before_reward")),
        after_reward=_reward(row.get("after_reward")),
        moments=_moments(row.get("over_time")),
    )


def _moments(value: Any) -> list[Moment]:
    """First, last, and evenly chosen rounds between them."""
    rows = [row for row in value if isinstance(row, Mapping)] if isinstance(value, list | tuple) else []
    if len(rows) > MOST_MOMENTS:
        rows = [rows[place * (len(rows) - 1) // (MOST_MOMENTS - 1)] for place in range(MOST_MOMENTS)]
    return [_moment(row) for row in rows]


def _moment(row: Mapping[str, Any]) -> Moment:
    text = shown_text(row.get("text"))
    opening = words.one_line(text, OPENING) if len(text) > FOLDED_FROM else ""
    return Moment(words.one_line(words.plain(row.get("round", "")), 20), _reward(row.get("reward")), text, opening)


def _reward(value: Any) -> str:
    found = number_from(value)
    return words.number(float(found.value)) if found else ""


def shown_text(value: Any) -> str:
    """A text of a sample, or a conversation with its roles, made safe and cut to a readable length."""
    if isinstance(value, list | tuple):
        turns = [f"{turn.get('role', '')}: {turn.get('content', '')}" for turn in value if isinstance(turn, Mapping)]
        value = "\n".join(turns)
    return words.printable("" if value is None else value, MOST_TEXT)


def verdict_chip(value: Any) -> Chip | None:
    """What a judge said of an answer, whatever form it has; None where there was none."""
    if value is None or value == "":
        return None
    if isinstance(value, Mapping):
        return _judged(value)
    known = {True: "correct", False: "wrong"}
    said = words.one_line(known[value] if isinstance(value, bool) else value, 60)
    return marked(said, {"correct": True, "right": True, "wrong": False, "incorrect": False}.get(said.lower()))


def _judged(value: Mapping[str, Any]) -> Chip:
    correct, violations = value.get("correct"), value.get("violations") or ()
    said = [] if correct is None else ["correct" if correct else "wrong"]
    said += ["refused"] if value.get("refused") else []
    said += [f"breaks {words.plain(violations)}"] if violations else []
    if not said and isinstance(value.get("score"), int | float):
        said = [f"score {words.number(value['score'])}"]
    good = False if violations else None if correct is None else bool(correct)
    return marked(words.one_line(", ".join(said) or words.plain(dict(value)), 60), good)
