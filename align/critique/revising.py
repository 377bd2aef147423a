"""The supervised half: an answer is criticised and revised, once or several times, and every step is kept (Bai 2022, 3.1)."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from align.constitution import Constitution, Principle
from align.critique.critics import Case, Contest, Critic
from align.critique.panel import panel_probabilities
from align.critique.rows import Fault, Row, Step
from align.critique.writing import Written


def revise(
    rows: Sequence[Row], critic: Critic, constitution: Constitution, *, rounds: int, seed: int, check: bool
) -> None:
    """Fills in the steps, the last revision and the fault of each row whose answer is whole.

    rounds: of critique and revision, each under another principle; drawn by (seed, the row's index). check: ask the critic
    whether the revision is the better answer.
    """
    going = [row for row in rows if not row.fault]
    drawn = {row.index: constitution.draw(random.Random(f"{seed} {row.index}"), rounds) for row in going}
    for row in going:
        row.final = row.answer
    for number in range(max((len(principles) for principles in drawn.values()), default=0)):
        asked = [row for row in going if not row.fault]
        _look([(row, drawn[row.index][number]) for row in asked], critic, constitution)
    for row in going:
        if not row.fault and row.final == row.answer:
            row.fault = next((step.fault for step in reversed(row.steps) if step.fault), "nothing_found")
    if check:
        found = {principle.id: principle for principle in constitution.principles}
        _check([row for row in going if not row.fault], critic, found)


def _look(asked: Sequence[tuple[Row, Principle]], critic: Critic, constitution: Constitution) -> None:
    """One round: critiques of all answers, and revisions of those in which something was found."""
    cases = [Case(row.prompt, row.final, principle, expected=row.expected) for row, principle in asked]
    told = critic.critiques(cases)
    faulty: list[tuple[Row, Case]] = []
    for (row, principle), critique in zip(asked, told, strict=True):
        if critique is None:
            row.fault = "too_long"
        elif constitution.finds_nothing(critique.text):
            row.steps.append(Step(principle.id, critique.text))
        else:
            faulty.append((row, Case(row.prompt, row.final, principle, critique.text, row.expected)))
    revisions = critic.revisions([case for _, case in faulty])
    for (row, case), revision in zip(faulty, revisions, strict=True):
        if revision is None:
            row.fault = "too_long"
            continue
        fault = _fault_of(revision, case, constitution)
        row.steps.append(Step(case.principle.id, case.critique, revision.text, fault))
        if not fault:
            row.final = revision.text


def _fault_of(revision: Written, case: Case, constitution: Constitution) -> Fault:
    text = _plain(revision.text)
    if not text:
        return "empty"
    if not revision.finished:
        return "cut"
    if constitution.leaks_template(revision.text):
        return "leaked"
    if text == _plain(case.prompt[-1].content):
        return "repeated"
    return "unchanged" if text == _plain(case.answer) else ""


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _check(rows: Sequence[Row], critic: Critic, principles: Mapping[str, Principle]) -> None:
    """Marks revisions that the critic likes less than the answers, under the principles by which they were revised."""
    groups = [
        [
            Contest(row.prompt, row.final, row.answer, principles[step.principle], row.expected)
            for step in row.steps
            if step.revision is not None and not step.fault
        ]
        for row in rows
    ]
    for row, probability in zip(rows, panel_probabilities(groups, critic), strict=True):
        row.preferred = probability
        if probability is not None and probability < 0.5:
            row.fault = "worse"
