"""The rewards of a recipe as one: every part checked, named, and added up by weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

from align.data.examples import Question
from align.errors import AlignError
from align.progress import Progress
from align.recipe import ppo_settings as settings
from align.rewards.function import Function
from align.rewards.response import Response, Reward
from align.rewards.verifiable import AnswerMatch, Judged, Length, Regex

if TYPE_CHECKING:
    from align.judge import Judge
    from align.rewards.model import RewardModel

LARGEST = 3.4e38  # what float32, in which advantages are reckoned, can hold


@dataclass(frozen=True, slots=True)
class Part:
    """One reward of the sum. name: unique in it; label: the name as errors show it."""

    name: str
    label: str
    weight: float
    reward: Reward


@dataclass(frozen=True, slots=True)
class Scored:
    """Of each response its reward, and what each part gave before its weight, by the part's name."""

    totals: list[float]
    parts: dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class Rewards:
    """A weighted sum of rewards."""

    parts: tuple[Part, ...]

    def check(self, questions: Sequence[Question]) -> None:
        """Raises AlignError, naming the reward, where responses to one of these could not be rewarded."""
        for part in self.parts:
            with _naming(part.label):
                part.reward.check(questions)

    def score(self, responses: Sequence[Response], progress: Progress | None = None) -> Scored:
        """The reward of each response. Raises AlignError, naming the reward, for one that gives no finite numbers."""
        if not responses:  # nobody's function has to know what to do with none
            return Scored([], {part.name: [] for part in self.parts})
        found: dict[str, list[float]] = {}
        for part in self.parts:
            with _naming(part.label):
                values = part.reward(responses, progress or Progress())
            found[part.name] = _numbers(f"reward '{part.label}' returned", values, len(responses))
        sums = [sum(part.weight * found[part.name][i] for part in self.parts) for i in range(len(responses))]
        return Scored(_numbers("the sum of the rewards is", sums, len(responses)), found)


def build_rewards(
    terms: Sequence[settings.Reward], *, models: Mapping[str, RewardModel], judges: Mapping[str | None, Judge]
) -> Rewards:
    """The rewards of a recipe's `reward:` or `watch:`.

    models: by the term's `from`. judges: by the term's `file`, None being the judge of `evaluation:`.
    Raises AlignError for a judge that is missing and a function that cannot be imported or called.
    """
    parts: list[Part] = []
    for term in terms:
        name = _free_name(term, {part.name for part in parts})
        label = f"{name} {term.name}" if isinstance(term, settings.FunctionReward) else name
        with _naming(label):
            parts.append(Part(name, label, term.weight, _reward(term, models, judges)))
    return Rewards(tuple(parts))


def _reward(term: settings.Reward, models: Mapping[str, RewardModel], judges: Mapping[str | None, Judge]) -> Reward:
    match term:
        case settings.ModelReward():
            from align.rewards.model import ModelReward  # torch, which the other rewards can do without

            return ModelReward(models[term.from_])
        case settings.JudgeReward():
            if term.file not in judges:
                raise AlignError("there is no judge", "Set `judge:` under `evaluation:`, or `file:` of this reward.")
            return Judged(judges[term.file])
        case settings.ExactMatchReward():
            return AnswerMatch("exact")
        case settings.NumericMatchReward():
            return AnswerMatch("numeric")
        case settings.RegexReward():
            return Regex(term.pattern)
        case settings.LengthReward():
            return Length(term.target_tokens)
        case settings.FunctionReward():
            return Function(term.name)


def _free_name(term: settings.Reward, taken: set[str]) -> str:
    """The model's reference, or the kind of another reward; numbered from the second of the same name on."""
    name = term.from_ if isinstance(term, settings.ModelReward) else term.kind
    numbered = (f"{name}-{number}" for number in range(2, len(taken) + 3))
    return name if name not in taken else next(one for one in numbered if one not in taken)


def _numbers(what: str, values: Sequence[Any], count: int) -> list[float]:
    """The values as finite floats. Raises AlignError that begins with `what` for others, and another count."""
    if len(values) != count:
        raise AlignError(f"{what} {len(values)} values for {count} responses", "It has to give one for each, in order.")
    for number, value in enumerate(values, 1):
        if not isinstance(value, Real):
            raise AlignError(f"{what} {value!r:.60} for response {number}", "It has to give numbers.")
    for number, value in enumerate(values, 1):
        if not -LARGEST <= value <= LARGEST:  # also where it is nan
            raise AlignError(f"{what} {value!s:.60} for response {number}", "Rewards have to be finite numbers.")
    return [float(value) for value in values]


@contextmanager
def _naming(label: str) -> Iterator[None]:
    """Errors from inside say whose they are."""
    try:
        yield
    except AlignError as error:
        error.message = f"reward '{label}': {error.message}"
        raise
