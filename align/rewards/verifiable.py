"""Rewards that follow from the text of a response by a rule: the right answer, a pattern, a length, a judge's score."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from align.answers import Answer, comparable, matches
from align.data.examples import Question, prompt_of
from align.errors import AlignError
from align.progress import Progress
from align.recipe.yaml_text import shown
from align.rewards.response import Response, Reward

if TYPE_CHECKING:
    from align.judge import Judge


class AnswerMatch(Reward):
    """1 where a response is right, else 0: by `expected.answer`, of which, in a list, one suffices."""

    def __init__(self, compare: Literal["exact", "numeric"]) -> None:
        self.compare = compare

    def check(self, questions: Sequence[Question]) -> None:
        for number, question in enumerate(questions, 1):
            self._accepted(question.expected, f"prompt {number}")

    def __call__(self, responses: Sequence[Response], progress: Progress) -> list[float]:
        found = []
        for number, response in enumerate(responses, 1):
            accepted = self._accepted(response.expected, f"the prompt of response {number}")
            found.append(float(any(matches(response.text, answer, self.compare) for answer in accepted)))
        return found

    def _accepted(self, expected: Mapping[str, Any] | None, asked: str) -> list[Answer]:
        """The right answers that can be compared. Raises AlignError, with what was `asked`, where there is none."""
        answer = (expected or {}).get("answer")
        if answer is None or answer == []:
            raise AlignError(f"{asked} has no expected.answer", "Give it one (text, number or list), or drop the row.")
        listed = answer if isinstance(answer, list) else [answer]
        if any(isinstance(one, bool) or not isinstance(one, str | int | float) for one in listed):
            raise AlignError(
                f"{asked} has expected.answer {shown(answer)}", "It takes text, a number or a list of them."
            )
        accepted = [one for one in listed if comparable(one, self.compare)]
        if not accepted:
            lack = "a number" if self.compare == "numeric" else "a word"
            raise AlignError(f"{asked} has expected.answer {shown(answer)}, without {lack}", "Mend or drop the row.")
        return accepted


class Regex(Reward):
    """1 where the pattern is found in the response, else 0."""

    def __init__(self, pattern: str) -> None:
        self.pattern = re.compile(pattern)

    def __call__(self, responses: Sequence[Response], progress: Progress) -> list[float]:
        return [float(self.pattern.search(response.text) is not None) for response in responses]


class Length(Reward):
    """0 at the target, falling to -1 at no token and at twice the target, and no lower."""

    def __init__(self, target_tokens: int) -> None:
        self.target_tokens = target_tokens

    def __call__(self, responses: Sequence[Response], progress: Progress) -> list[float]:
        distances = (abs(response.tokens - self.target_tokens) / self.target_tokens for response in responses)
        return [-min(distance, 1.0) for distance in distances]


class Judged(Reward):
    """The judge's score, in [0, 1]."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge

    def check(self, questions: Sequence[Question]) -> None:
        for question in questions:
            self.judge.verdict(prompt_of(question)[-1].content, "", question.expected)

    def __call__(self, responses: Sequence[Response], progress: Progress) -> list[float]:
        return [self.judge.verdict(r.question, r.text, r.expected).score for r in responses]
