"""What the page shows of a ppo run alone: the proof at step 0, and the guards that were raised."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.report import words
from align.report.chips import Chip, marked
from align.report.numbers import number_from

GUARDS = {
    "kl": "KL limit",
    "entropy": "Entropy collapse",
    "length": "Reward for length",
    "repetition": "Repeated text",
    "overoptimisation": "Over-optimisation",
}


@dataclass(frozen=True)
class Check:
    """One check of the proof: what must hold, what was measured, and the most that is allowed."""

    said: str
    value: str
    limit: str
    chip: Chip


@dataclass(frozen=True)
class Warned:
    """A guard that was raised: what it said first, the rounds in which it was raised, value and limit of the first."""

    guard: str
    said: str
    rounds: str
    measured: str


@dataclass(frozen=True)
class PpoView:
    """Proof and guards. guards: None where the record does not say whether one was raised."""

    proof: Sequence[Check]
    guards: Sequence[Warned] | None
    stopped_by: str


def ppo_view(metrics: Mapping[str, Any]) -> PpoView:
    """The view of a ppo checkpoint's metrics; of those of any other stage, an empty one."""
    stopped = metrics.get("stopped_by")
    return PpoView(
        proof=[_check(row) for row in _rows(metrics.get("proof"))],
        guards=list(_warned(_rows(metrics["guards"]))) if isinstance(metrics.get("guards"), list | tuple) else None,
        stopped_by=_guard(stopped) if stopped else "",
    )


def _rows(value: Any) -> list[Mapping[str, Any]]:
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list | tuple) else []


def _check(row: Mapping[str, Any]) -> Check:
    holds = row.get("holds") is True
    said = words.one_line(row.get("check", ""), 200)
    return Check(
        said, _words(row.get("value")), _words(row.get("limit")), marked("holds" if holds else "broken", holds)
    )


def _warned(rows: Sequence[Mapping[str, Any]]) -> Iterator[Warned]:
    """One entry for each guard, in the order in which they were first raised."""
    for guard in dict.fromkeys(str(row.get("guard", "")) for row in rows):
        raised = [row for row in rows if str(row.get("guard", "")) == guard]
        value, limit = (_words(raised[0].get(key)) for key in ("value", "limit"))
        yield Warned(
            guard=_guard(guard),
            said=words.printable(raised[0].get("said") or "", 600),
            rounds=_rounds([words.one_line(words.plain(row.get("round", "?")), 20) for row in raised]),
            measured=", ".join(f"{name} {part}" for name, part in (("measured", value), ("limit", limit)) if part),
        )


def _rounds(raised: Sequence[str]) -> str:
    if len(raised) < 4:
        return f"round{'s' * (len(raised) > 1)} {' and '.join(raised)}"
    return f"{len(raised)} times from round {raised[0]} to {raised[-1]}"


def _guard(name: Any) -> str:
    return GUARDS.get(str(name)) or words.one_line(words.label(str(name)), 60)


def _words(value: Any) -> str:
    found = number_from(value)
    if found is None:
        return ""
    return words.number(float(found.value)) if found.value else "0"
