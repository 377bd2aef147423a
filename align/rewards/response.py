"""What is rewarded, and what a reward is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.data.examples import Messages, Question
from align.progress import Progress


@dataclass(frozen=True, slots=True)
class Response:
    """What a policy wrote to a prompt.

    tokens: of the policy, its stop token not counted. finished: ended by its stop token, not by the length limit.
    expected: what the data say about a right answer.
    """

    prompt: Messages
    text: str
    tokens: int
    finished: bool
    expected: Mapping[str, Any] | None = None

    @property
    def question(self) -> str:
        """The text of the prompt's last turn."""
        return self.prompt[-1].content


class Reward(ABC):
    """Gives one number for each response. Its errors are AlignErrors that do not name it: `Rewards` does."""

    def check(self, questions: Sequence[Question]) -> None:  # noqa: B027, since most rewards need nothing of a prompt
        """Raises AlignError where responses to one of these could not be rewarded, whatever they say."""

    @abstractmethod
    def __call__(self, responses: Sequence[Response], progress: Progress) -> Sequence[object]:
        """One number for each response, in their order; whether they are numbers is checked by `Rewards`."""
