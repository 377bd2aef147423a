"""Rows of a critique stage -> the data sets that it makes, what became of the rows, and how good critic and revisions were."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from align.constitution import Constitution
from align.critique.rows import FAULTS, Row
from align.data.examples import Conversation, Example, Message, Preference
from align.data.prepared import DataReport, PreparedData
from align.evaluation.intervals import Estimate, mean, paired_difference, wilson
from align.evaluation.numbers import as_metrics, judge_changes, judge_numbers

if TYPE_CHECKING:
    from align.judge import Judge, Verdict


def data_sets(
    train: Sequence[Row], test: Sequence[Row], *, keep_faultless: bool, revises: bool
) -> dict[str, PreparedData]:
    """The outputs `sft` (prompt, last revision) and `preferences` (revision over answer, and comparisons)."""
    sft = [[row for row in (_demonstration(one, keep_faultless) for one in part) if row] for part in (train, test)]
    pairs = [[pair for row in part for pair in _pairs(row, revises)] for part in (train, test)]
    if not revises:
        sft = [[], []]
    return {"sft": _prepared("conversation", *sft), "preferences": _prepared("preference", *pairs)}


def counts(rows: Sequence[Row], constitution: Constitution) -> dict[str, Any]:
    """What became of the rows: faults, looks at each principle, comparisons; `undecided` are those at exactly a half."""
    faults = Counter(row.fault for row in rows if row.fault)
    looks = {principle.id: Counter[str]() for principle in constitution.principles}
    for row in rows:
        for step in row.steps:
            looks[step.principle]["asked"] += 1
            looks[step.principle]["found"] += step.revision is not None
            looks[step.principle]["revised"] += step.revision is not None and not step.fault
    compared = [one.probability for row in rows for one in row.comparisons]
    return {
        "prompts": len(rows),
        "revised": sum(bool(row.steps) and not row.fault for row in rows),
        "apart": {fault: faults[fault] for fault in FAULTS if faults[fault]},
        "principles": {name: dict(counter) for name, counter in looks.items() if counter},
        "comparisons": len(compared),
        "undecided": sum(chance is None or chance == 0.5 for chance in compared),
    }


def critic_metrics(rows: Sequence[Row]) -> dict[str, Any]:
    """Held-out numbers that need no judge: how many answers the critic objects to, how long they are, how varied."""
    looked = [row for row in rows if row.steps]
    if not looked:
        return {}
    found = sum(any(step.revision is not None for step in row.steps) for row in looked)
    words = [[len(text.split()) for text in texts] for texts in _texts(looked)]
    numbers = {
        "before.critic.violation_rate": wilson(found, len(looked)),
        "before.words": mean(words[0]),
        "after.words": mean(words[1]),
        "change.words": paired_difference(words[0], words[1]),
    }
    varied = {
        f"{when}.distinct": _distinct(texts) for when, texts in zip(("before", "after"), _texts(looked), strict=True)
    }
    preferred = [row.preferred for row in looked if row.preferred is not None]
    liked = (
        {"after.critic.preferred": wilson(sum(chance > 0.5 for chance in preferred), len(preferred))}
        if preferred
        else {}
    )
    return as_metrics({**numbers, **liked}) | varied


def judge_metrics(rows: Sequence[Row], judge: Judge) -> dict[str, Any]:
    """What the judge says of answers and last revisions, and of the critic: how often it is right where it objects
    (`precision`), and how many of the violations it looked at it found (`recall`)."""
    whole = [row for row in rows if row.fault not in ("too_long", "unanswered") or row.steps]
    expected = [row.expected for row in whole]
    before, after = (
        [_verdict(judge, row, text) for row, text in zip(whole, part, strict=True)] for part in _texts(whole)
    )
    broken = sorted({name for verdict in (*before, *after) for name in verdict.violations})
    numbers: dict[str, Any] = {
        **as_metrics(judge_numbers(before, expected, principles=broken), "before.judge."),
        **as_metrics(judge_numbers(after, expected, principles=broken), "after.judge."),
        **as_metrics(judge_changes(before, after), "change.judge."),
    }
    return numbers | as_metrics(_critic_against(whole, judge))


def samples(rows: Sequence[Row], judge: Judge | None, count: int) -> list[dict[str, Any]]:
    """Rows for the report: first those that were revised, then some that are kept apart."""
    revised = [row for row in rows if row.steps and not row.fault][:count]
    apart = [row for row in rows if row.steps and row.fault and row.fault != "nothing_found"][: max(1, count // 2)]
    return [_sample(row, judge) for row in (*revised, *(apart if count else []))]


def _sample(row: Row, judge: Judge | None) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "prompt": row.prompt[-1].content, "answer": row.answer, "final": row.final, "fault": row.fault,
        "preferred": row.preferred, "steps": [asdict(step) for step in row.steps],
    }  # fmt: skip
    if judge is not None:
        shown["before_verdict"] = asdict(_verdict(judge, row, row.answer))
        shown["after_verdict"] = asdict(_verdict(judge, row, row.final))
    return shown


def _demonstration(row: Row, keep_faultless: bool) -> Conversation | None:
    if row.fault and not (keep_faultless and row.fault == "nothing_found"):
        return None
    return Conversation((*row.prompt, Message("assistant", row.final)), expected=row.expected)


def _pairs(row: Row, revises: bool) -> list[Preference]:
    pairs = []
    if revises and not row.fault:
        pairs.append(Preference(row.prompt, _said(row.final), _said(row.answer), expected=row.expected))
    for one in row.comparisons:
        if one.probability is None or one.probability == 0.5:
            continue
        first, second = row.answers[one.first], row.answers[one.second]
        better, worse = (first, second) if one.probability > 0.5 else (second, first)
        sure = max(one.probability, 1 - one.probability)
        pairs.append(Preference(row.prompt, _said(better), _said(worse), probability=sure, expected=row.expected))
    return pairs


def _said(text: str) -> tuple[Message, ...]:
    return (Message("assistant", text),)


def _prepared(kind: str, train: Sequence[Example], test: Sequence[Example]) -> PreparedData:
    report = DataReport(
        format="made", kind=kind, rows_read=len(train) + len(test), train_rows=len(train), test_rows=len(test)
    )
    return PreparedData(kind, list(train), list(test), report)


def _texts(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """First answers and last revisions; a row that was kept apart keeps its answer."""
    kept = [row.answer if row.fault == "worse" else row.final for row in rows]
    return [row.answer or row.final for row in rows], kept


def _distinct(texts: Sequence[str]) -> float:
    """Share of distinct runs of three words among all of all texts (Li 2016); 1 where there are none."""
    words = [text.split() for text in texts]
    grams = [tuple(one[start : start + 3]) for one in words for start in range(len(one) - 2)]
    return len(set(grams)) / len(grams) if grams else 1.0


def _verdict(judge: Judge, row: Row, text: str) -> Verdict:
    return judge.verdict(row.prompt[-1].content, text, row.expected)


def _critic_against(rows: Sequence[Row], judge: Judge) -> dict[str, Estimate]:
    """The critic held against the judge, over all looks under principles that the judge knows too."""
    known = {principle.id for principle in judge.rules.principles}
    looks: Counter[tuple[bool, bool]] = Counter()
    for row in rows:
        text = row.answer
        for step in row.steps:
            if step.principle in known:
                broken = step.principle in _verdict(judge, row, text).violations
                looks[step.revision is not None, broken] += 1
            text = step.revision if step.revision is not None and not step.fault else text
    if not looks:
        return {}
    right = looks[True, True]
    return {
        "before.critic.precision": wilson(right, right + looks[True, False]),
        "before.critic.recall": wilson(right, right + looks[False, True]),
        "before.critic.accuracy": wilson(right + looks[False, False], looks.total()),
    }
