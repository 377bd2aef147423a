"""What the page shows of a critique stage alone: what became of its rows, its principles, its critic, and its steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from align.critique.rows import FAULTS
from align.report import comparisons, words
from align.report.chips import WRONG, Chip
from align.report.numbers import VIOLATION, Change, Number, changes, meaning_of, number_from
from align.report.samples_view import MOST_SAMPLES, shown_text, verdict_chip
from align.report.stage_facts import StageFacts

AGAINST = ("critic.precision", "critic.recall", "critic.accuracy")
MOST_STEPS = 12  # of one sample
LEAST_APART = 2  # samples that are kept apart, where there are more than the page shows


@dataclass(frozen=True)
class Part:
    """Rows of one fate: style of its key, what became of them, how many."""

    style: str
    said: str
    count: str


@dataclass(frozen=True)
class PrincipleView:
    """One principle: how often it was asked about, found broken and mended in training prompts; and, where the judge
    knows it, the share of held-out answers that break it, before and after."""

    name: str
    asked: str
    found: str
    revised: str
    bar: Markup
    change: Change | None
    rates: Markup


@dataclass(frozen=True)
class CriticNumber:
    """One number of the critic held against the judge; n: looks behind it."""

    label: str
    about: str
    value: str
    interval: str
    n: str
    bar: Markup


@dataclass(frozen=True)
class StepView:
    """One look at an answer. revision: None where nothing was found; fault: why the revision was not taken."""

    principle: str
    critique: str
    revision: str | None
    fault: Chip | None


@dataclass(frozen=True)
class CritiqueSample:
    """One prompt with its answer, the steps that led on from there, and its last revision."""

    prompt: str
    answer: str
    final: str
    answer_verdict: Chip | None
    final_verdict: Chip | None
    fault: Chip | None
    preferred: str
    steps: Sequence[StepView]
    steps_left_out: int


@dataclass(frozen=True)
class CritiqueView:
    """All that the page says of a critique stage and of no other."""

    outputs: Mapping[str, str]
    parts: Sequence[Part]
    bar: Markup
    comparisons: str
    principles: Sequence[PrincipleView]
    judged: bool
    critic: Sequence[CriticNumber]
    samples: Sequence[CritiqueSample]


def critique_view(stage: StageFacts) -> CritiqueView | None:
    """The view of a stage that made data; None for any other."""
    if stage.made is None:
        return None
    info, metrics = stage.made.info, stage.metrics
    counts = _mapping(info.get("counts"))
    rows = list(_rows_of(counts))
    principles = list(_principles(_mapping(counts.get("principles")), metrics))
    return CritiqueView(
        outputs={
            f"Made: {words.one_line(name, 60)}": _output(record.info) for name, record in stage.made.outputs.items()
        },
        parts=[Part(style, said, f"{count:,}") for style, said, count in rows],
        bar=comparisons.shares_bar([(said, count, style) for style, said, count in rows]),
        comparisons=_compared(counts),
        principles=principles,
        judged=any(one.change for one in principles),
        critic=list(_critic(metrics)),
        samples=_samples(info.get("samples")),
    )


def told_apart(metrics: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Metrics for the table of held-out numbers: all but those that a critique stage shows in tables of their own."""
    if kind != "critique":
        return dict(metrics)
    names = [change.name for change in changes(metrics, kind)]
    apart = {name for name in names if name in AGAINST or name.startswith(VIOLATION)}
    return {key: value for key, value in metrics.items() if key.partition(".")[2] not in apart}


def critic_words(settings: Mapping[str, Any]) -> str:
    """Who criticised, for a sentence, where that was no other checkpoint."""
    critic = _mapping(settings.get("critic"))
    if critic.get("kind") == "endpoint":
        return words.one_line(f"{critic.get('model')} at {critic.get('url')}", 120)
    return "a judge's rules" if critic.get("kind") == "judge" else "itself"


def _output(info: Mapping[str, Any]) -> str:
    held_out = _count(info.get("test_rows"))
    return f"{_count(info.get('train_rows')):,} rows{f' and {held_out:,} held out' if held_out else ''}"


def _rows_of(counts: Mapping[str, Any]) -> Iterator[tuple[str, str, int]]:
    """What became of the prompts: style, words, count; largest first among those kept apart."""
    revised, apart = _count(counts.get("revised")), _mapping(counts.get("apart"))
    if revised:
        yield "kept", "revised", revised
    rest = _count(counts.get("prompts")) - revised - sum(map(_count, apart.values()))
    if rest > 0:
        yield "held", "answered, and not revised", rest
    for fault, count in sorted(apart.items(), key=lambda found: -_count(found[1])):
        if _count(count):
            yield "held" if fault == "nothing_found" else "dropped", _fault(fault), _count(count)


def _compared(counts: Mapping[str, Any]) -> str:
    compared, undecided = _count(counts.get("comparisons")), _count(counts.get("undecided"))
    if not compared:
        return ""
    share = words.number(undecided / compared, share=True)
    return f"{compared:,} pairs of answers were compared; {undecided:,} of them ({share}) stayed undecided and are not used."


def _principles(looks: Mapping[str, Any], metrics: Mapping[str, Any]) -> Iterator[PrincipleView]:
    """Those of the constitution in its order, then those that only the judge has."""
    judged = {
        one.name.removeprefix(VIOLATION): one for one in changes(metrics, "critique") if one.name.startswith(VIOLATION)
    }
    tops = [end for one in judged.values() for value in (one.before, one.after) for end in _ends(value)]
    most_found = max((_count(_mapping(look).get("found")) for look in looks.values()), default=0)
    for name in dict.fromkeys([*looks, *judged]):
        look = _mapping(looks.get(name))
        asked, found, revised = (_count(look.get(key)) for key in ("asked", "found", "revised"))
        change = judged.get(name)
        shown = words.one_line(name, 60)
        rates = f"{shown}: before {change.words(change.before)}, after {change.words(change.after)}" if change else ""
        yield PrincipleView(
            name=shown,
            asked=f"{asked:,}" if look else "",
            found=f"{found:,}" if look else "",
            revised=f"{revised:,}" if look else "",
            bar=comparisons.nested_bar(found, revised, most_found, f"{shown}: found {found:,}, revised {revised:,}")
            if found
            else Markup(""),
            change=change,
            rates=comparisons.side_bars(change.before, change.after, max(tops) or 1.0, rates) if change else Markup(""),
        )


def _critic(metrics: Mapping[str, Any]) -> Iterator[CriticNumber]:
    for name in AGAINST:
        value = number_from(metrics.get(f"before.{name}"))
        if value:
            change = Change(name, meaning_of(name), None, value)
            said = f"{change.meaning.label}: {change.words(value)}"
            yield CriticNumber(
                label=change.meaning.label,
                about=change.meaning.about,
                value=change.words(value) if value.n != 0 else "",
                interval=change.interval_words(value) if value.n != 0 else "",
                n="" if value.n is None else f"{value.n:,}",
                bar=comparisons.side_bars(None, value, 1.0, said) if value.n != 0 else Markup(""),
            )


def _samples(value: Any) -> list[CritiqueSample]:
    """The first ones; a few of those that are kept apart are always among them."""
    rows = [_sample(row) for row in value if isinstance(row, Mapping)] if isinstance(value, list | tuple) else []
    taken, apart = [row for row in rows if not row.fault], [row for row in rows if row.fault]
    return [*taken[: MOST_SAMPLES - min(LEAST_APART, len(apart))], *apart][:MOST_SAMPLES]


def _sample(row: Mapping[str, Any]) -> CritiqueSample:
    found = row.get("steps")
    steps = [step for step in found if isinstance(step, Mapping)] if isinstance(found, list | tuple) else []
    preferred = number_from(row.get("preferred"))
    return CritiqueSample(
        prompt=shown_text(row.get("prompt")),
        answer=shown_text(row.get("answer")),
        final=shown_text(row.get("final")),
        answer_verdict=verdict_chip(row.get("before_verdict")),
        final_verdict=verdict_chip(row.get("after_verdict")),
        fault=_fault_chip(row.get("fault")),
        preferred=words.number(preferred.value, share=True) if preferred else "",
        steps=[_step(step) for step in steps[:MOST_STEPS]],
        steps_left_out=max(0, len(steps) - MOST_STEPS),
    )


def _step(step: Mapping[str, Any]) -> StepView:
    revision = step.get("revision")
    return StepView(
        principle=words.one_line(step.get("principle", ""), 60),
        critique=shown_text(step.get("critique")),
        revision=None if revision is None else shown_text(revision),
        fault=_fault_chip(step.get("fault")),
    )


def _fault_chip(fault: Any) -> Chip | None:
    return Chip(_fault(fault), "worse", WRONG) if fault else None


def _fault(fault: Any) -> str:
    return FAULTS.get(str(fault)) or words.one_line(words.label(str(fault)), 60)


def _ends(value: Number | None) -> tuple[float, ...]:
    return (value.value, *(value.interval or ())) if value else ()


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
