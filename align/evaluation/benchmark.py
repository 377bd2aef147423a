"""All numbers of one checkpoint on one set of rows, by name: what `align eval` prints.

perplexity needs answers or text; exact_match, f1, bleu, rouge and numeric_match need answers to compare with;
preference needs pairs; judge needs a judge; win_rate a rival and a reward model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from align.data.examples import Conversation, Document, Example, Message, Preference, prompt_of
from align.errors import AlignError, did_you_mean
from align.evaluation.numbers import judge_numbers, likelihood_numbers, preference_numbers, reward_numbers, win_rate
from align.judge import Judge
from align.models.source import Source
from align.progress import Progress
from align.rewards.model import RewardModel, said
from align.rollout.generation import Reply, Sampling
from align.rollout.scoring import answer_logps, pair_logps
from align.use.opened import Policy

TEXT_METRICS = ("exact_match", "f1", "bleu", "rouge", "numeric_match")
ANSWER_METRICS = ("judge", "win_rate")
METRICS_BY_KIND: dict[str, tuple[str, ...]] = {
    "text": ("perplexity",),
    "conversation": ("perplexity", *TEXT_METRICS, *ANSWER_METRICS),
    "preference": ("preference", *ANSWER_METRICS),
    "rated": ANSWER_METRICS,
    "prompt": ANSWER_METRICS,
}
METRICS = ("perplexity", *TEXT_METRICS, "preference", *ANSWER_METRICS)
NEEDS = {"judge": "--judge FILE", "win_rate": "--against CHECKPOINT and --reward CHECKPOINT"}


def chosen_metrics(kind: str, names: Sequence[str], *, judged: bool, opposed: bool) -> list[str]:
    """What will be measured on rows of a kind: the named metrics, else all that apply but numeric_match.

    Raises AlignError for a name that is unknown, that such rows do not allow, or whose judge or rival is missing.
    """
    present = {"judge": judged, "win_rate": opposed}
    allowed = [name for name in METRICS_BY_KIND[kind] if present.get(name, True)]
    for name in names:
        if name not in METRICS:
            raise AlignError(f"no metric '{name}'", did_you_mean(name, METRICS))
        if name not in METRICS_BY_KIND[kind]:
            raise AlignError(f"{name} cannot be measured on {kind} rows", did_you_mean(name, METRICS_BY_KIND[kind]))
        if name not in allowed:
            raise AlignError(f"the metric '{name}' needs more than rows", f"Give {NEEDS[name]}.")
    chosen = list(names) or [name for name in allowed if name != "numeric_match"]
    if not chosen:
        raise AlignError(f"{kind} rows say nothing about right answers", "Give --judge, or --against and --reward.")
    return chosen


@dataclass(frozen=True)
class Opponent:
    """Another checkpoint to answer the same prompts, and who says which reply is better."""

    rival: Policy
    reward: RewardModel


@dataclass
class Benchmark:
    """A policy's numbers on rows of one kind; the prompts are answered once, whatever is asked of the answers."""

    policy: Policy
    examples: Sequence[Example]
    sampling: Sampling = field(default_factory=Sampling)
    progress: Progress = field(default_factory=Progress)
    judge: Judge | None = None
    opponent: Opponent | None = None

    def numbers(self, names: Sequence[str]) -> dict[str, Any]:
        """The metrics that `chosen_metrics` let through for these rows."""
        found: dict[str, Any] = {}
        if "perplexity" in names:
            found |= self._perplexity()
        if text := [name for name in names if name in TEXT_METRICS]:
            found |= self._text(text)
        if "preference" in names:
            found |= self._preference()
        if "judge" in names and self.judge is not None:
            found |= self._judged(self.judge)
        if "win_rate" in names and self.opponent is not None:
            found |= self._won(self.opponent)
        return found

    @cached_property
    def replies(self) -> list[Reply]:
        """The policy's answers to the rows' prompts."""
        return self.policy.answer(self._prompts, self.sampling, self.progress)

    @cached_property
    def _prompts(self) -> list[tuple[Message, ...]]:
        return [prompt_of(example) for example in self.examples if not isinstance(example, Document)]

    def _perplexity(self) -> dict[str, Any]:
        rows = [example for example in self.examples if isinstance(example, Document | Conversation)]
        encoded = self.policy.rows(rows)
        numbers = likelihood_numbers(answer_logps(self.policy.model, encoded, progress=self.progress))
        return {**numbers, **self._left_out()}

    def _text(self, names: list[str]) -> dict[str, Any]:
        from align.evaluation.text_metrics import text_numbers

        right = [example.messages[-1].content for example in self.examples if isinstance(example, Conversation)]
        return dict(text_numbers([reply.text for reply in self.replies], right, names))

    def _preference(self) -> dict[str, Any]:
        pairs = [self.policy.encoder.preference(pair) for pair in preferences(self.examples)]
        numbers = preference_numbers(
            pair_logps(self.policy.model, [pair for pair in pairs if pair], progress=self.progress).logps
        )
        return {**numbers, **self._left_out()}

    def _judged(self, judge: Judge) -> dict[str, Any]:
        expected = [getattr(example, "expected", None) for example in self.examples]
        verdicts = [
            judge.verdict(prompt[-1].content, reply.text, row)
            for prompt, reply, row in zip(self._prompts, self.replies, expected, strict=True)
        ]
        return {f"judge.{name}": number for name, number in judge_numbers(verdicts, expected).items()}

    def _won(self, opponent: Opponent) -> dict[str, Any]:
        theirs = opponent.rival.answer(self._prompts, self.sampling, self.progress)
        scores = [
            opponent.reward.score(
                [(prompt, said(reply.text)) for prompt, reply in zip(self._prompts, replies, strict=True)],
                self.progress,
            )
            for replies in (self.replies, theirs)
        ]
        return {"win_rate": win_rate(*scores)}

    def _left_out(self) -> dict[str, Any]:
        lengths = self.policy.encoder.lengths
        left_out = lengths.dropped + lengths.equal_pairs + lengths.without_answer
        return {"rows_left_out": left_out} if left_out else {}


def reward_benchmark(source: Source, examples: Sequence[Example], progress: Progress) -> dict[str, Any]:
    """`reward_numbers` of a reward model on preference pairs. Raises AlignError for other rows."""
    rows = preferences(examples)
    reward = RewardModel.open(source)
    pairs = [reward.encoder.preference(pair) for pair in rows]
    kept = [pair for pair in pairs if pair]
    numbers: dict[str, Any] = dict(reward_numbers(reward.model, kept, progress=progress))
    return numbers | ({"rows_left_out": len(pairs) - len(kept)} if len(kept) < len(pairs) else {})


def preferences(examples: Sequence[Example]) -> list[Preference]:
    """The rows as pairs. Raises AlignError when one is none."""
    pairs = [example for example in examples if isinstance(example, Preference)]
    if len(pairs) < len(examples):
        raise AlignError(
            f"preference accuracy needs pairs, not {examples[0].kind} rows", "A row needs prompt, chosen and rejected."
        )
    return pairs
