"""Who finds fault with answers, mends them, and says which of two is better: a writer asked in the constitution's words,
or a judge's rules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from align.constitution import Constitution, Principle
from align.critique.writing import Writer, Written
from align.data.examples import Messages
from align.judge import Judge


@dataclass(frozen=True, slots=True)
class Case:
    """An answer that is looked at under one principle. expected: what the data say is right, for a judge."""

    prompt: Messages
    answer: str
    principle: Principle
    critique: str = ""
    expected: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Contest:
    """Two answers to one prompt, to be compared under one principle."""

    prompt: Messages
    first: str
    second: str
    principle: Principle
    expected: Mapping[str, Any] | None = None

    def swapped(self) -> Contest:
        """The same with the answers in the other order."""
        return Contest(self.prompt, self.second, self.first, self.principle, self.expected)


class Critic(Protocol):
    """All answers are in the order of what was asked; None where a request was longer than the context."""

    def critiques(self, cases: Sequence[Case]) -> list[Written | None]:
        """What is wrong with each answer."""

    def revisions(self, cases: Sequence[Case]) -> list[Written | None]:
        """A better answer for each, in view of its critique."""

    def choices(self, contests: Sequence[Contest]) -> list[float | None]:
        """Probability that the first answer is the better one, in the order in which they stand."""


@dataclass(frozen=True)
class TextCritic:
    """A model that is asked in the words of the constitution."""

    writer: Writer
    constitution: Constitution
    max_new_tokens: int

    def critiques(self, cases: Sequence[Case]) -> list[Written | None]:
        """Greedy critiques."""
        asked = [self.constitution.critique_request(case.principle, case.prompt, case.answer) for case in cases]
        return self.writer.write(asked, self.max_new_tokens)

    def revisions(self, cases: Sequence[Case]) -> list[Written | None]:
        """Greedy revisions."""
        asked = [
            self.constitution.revision_request(case.principle, case.prompt, case.answer, case.critique)
            for case in cases
        ]
        return self.writer.write(asked, self.max_new_tokens)

    def choices(self, contests: Sequence[Contest]) -> list[float | None]:
        """From the log-probabilities of the two options."""
        asked = [self.constitution.preference_request(c.principle, c.prompt, c.first, c.second) for c in contests]
        return self.writer.choose(asked, self.constitution.options)


@dataclass(frozen=True)
class JudgeCritic:
    """Rules that find fault and choose exactly; `reviser` writes, since rules cannot."""

    judge: Judge
    reviser: Critic

    def critiques(self, cases: Sequence[Case]) -> list[Written | None]:
        """The title of the principle where it is broken, else nothing."""
        return [Written(self._finding(case), finished=True) for case in cases]

    def revisions(self, cases: Sequence[Case]) -> list[Written | None]:
        """The reviser's."""
        return self.reviser.revisions(cases)

    def choices(self, contests: Sequence[Contest]) -> list[float | None]:
        """1 or 0 where only one of the two breaks the principle; else where the score of one is higher; else a half."""
        return [self._choice(contest) for contest in contests]

    def _finding(self, case: Case) -> str:
        verdict = self.judge.verdict(case.prompt[-1].content, case.answer, case.expected)
        broken = case.principle.id in verdict.violations
        return f"It breaks this principle: {case.principle.title or case.principle.id}." if broken else ""

    def _choice(self, contest: Contest) -> float:
        asked = contest.prompt[-1].content
        verdicts = [self.judge.verdict(asked, text, contest.expected) for text in (contest.first, contest.second)]
        broken = [contest.principle.id in verdict.violations for verdict in verdicts]
        if broken[0] != broken[1]:
            return float(broken[1])
        first, second = (verdict.score for verdict in verdicts)
        return 0.5 if first == second else float(first > second)
