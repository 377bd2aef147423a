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
from align.evaluation import judge_numbers, likelihood_numbers, preference_numbers, reward_numbers, win_rate
from align.judge import Judge
from align.opened import Policy, RewardModel, said
from align.progress import Progress
from align.rollout import Reply, Sampling
from align.scoring import answer_logps, pair_logps

TEXT_METRICS = ("exact_match", "f1", "bleu", "rouge", "numeric_match")
METRICS = ("perplexity", *TEXT_METRICS, "preference", "judge", "win_rate")
USUAL_TEXT_METRICS = ("exact_match", "f1", "bleu", "rouge")


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

    def usual_metrics(self) -> list[str]:
        """What these rows, judge and opponent allow to measure."""
        by_kind = {
            "text": ["perplexity"],
            "conversation": ["perplexity", *USUAL_TEXT_METRICS],
            "preference": ["preference"],
        }
        names = by_kind.get(self.examples[0].kind, [])
        names += ["judge"] if self.judge else []
        return names + (["win_rate"] if self.opponent else [])

    def numbers(self, names: Sequence[str]) -> dict[str, Any]:
        """The named metrics. Raises AlignError for one that is unknown or that these rows do not allow."""
        for name in names:
            if name not in METRICS:
                raise AlignError(f"no metric '{name}'", did_you_mean(name, METRICS))
        found: dict[str, Any] = {}
        if "perplexity" in names:
            found |= self._perplexity()
        if text := [name for name in names if name in TEXT_METRICS]:
            found |= self._text(text)
        if "preference" in names:
            found |= self._preference()
        if "judge" in names:
            found |= self._judged()
        if "win_rate" in names:
            found |= self._won()
        return found

    @cached_property
    def replies(self) -> list[Reply]:
        """The policy's answers to the rows' prompts."""
        return self.policy.answer(self._prompts, self.sampling, self.progress)

    @cached_property
    def _prompts(self) -> list[tuple[Message, ...]]:
        if any(isinstance(example, Document) for example in self.examples):
            raise AlignError("plain text asks nothing that could be answered", "Only perplexity can be measured on it.")
        return [prompt_of(example) for example in self.examples if not isinstance(example, Document)]

    def _perplexity(self) -> dict[str, Any]:
        rows = [example for example in self.examples if isinstance(example, Document | Conversation)]
        if len(rows) < len(self.examples):
            raise AlignError(f"perplexity needs answers or text, not {self.examples[0].kind} rows")
        encoded = self.policy.rows(rows)
        numbers = likelihood_numbers(answer_logps(self.policy.model, encoded, progress=self.progress))
        return {**numbers, **self._left_out()}

    def _text(self, names: list[str]) -> dict[str, Any]:
        from align.text_metrics import text_numbers

        right = [example.messages[-1].content for example in self.examples if isinstance(example, Conversation)]
        if len(right) < len(self.examples):
            raise AlignError(f"{names[0]} needs answers to compare with, not {self.examples[0].kind} rows")
        return dict(text_numbers([reply.text for reply in self.replies], right, names))

    def _preference(self) -> dict[str, Any]:
        pairs = [self.policy.encoder.preference(pair) for pair in preferences(self.examples)]
        numbers = preference_numbers(
            pair_logps(self.policy.model, [pair for pair in pairs if pair], progress=self.progress).logps
        )
        return {**numbers, **self._left_out()}

    def _judged(self) -> dict[str, Any]:
        if self.judge is None:
            raise AlignError("the metric 'judge' needs a judge", "Give --judge FILE.")
        expected = [getattr(example, "expected", None) for example in self.examples]
        verdicts = [
            self.judge.verdict(prompt[-1].content, reply.text, row)
            for prompt, reply, row in zip(self._prompts, self.replies, expected, strict=True)
        ]
        return {f"judge.{name}": number for name, number in judge_numbers(verdicts, expected).items()}

    def _won(self) -> dict[str, Any]:
        if self.opponent is None:
            raise AlignError(
                "the metric 'win_rate' needs a rival", "Give --against CHECKPOINT and --reward CHECKPOINT."
            )
        theirs = self.opponent.rival.answer(self._prompts, self.sampling, self.progress)
        scores = [
            self.opponent.reward.score(
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


def reward_benchmark(reward: RewardModel, examples: Sequence[Example], progress: Progress) -> dict[str, Any]:
    """`reward_numbers` on preference pairs. Raises AlignError for other rows."""
    pairs = [reward.encoder.preference(pair) for pair in preferences(examples)]
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
