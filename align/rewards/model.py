"""A reward model in use: the very numbers of `align score`, whoever asks for them.

Texts are encoded by the model's own tokenizer and template, a response as an assistant turn with its stop token, so it
need not share anything with the policy. Left out: training one (stages/reward.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from align.chat.encoded import Encoded
from align.chat.encoder import Encoder
from align.chat.templates import prepare_tokenizer
from align.data.examples import Message, Messages, Question, prompt_of
from align.errors import AlignError, StageFailed
from align.models.folders import load_tokenizer
from align.models.loading import load_reward
from align.models.rewards import require_reward
from align.models.source import Source
from align.progress import Progress
from align.rewards.response import Response, Reward
from align.rollout.generation import context_length
from align.rollout.scoring import rewards

UNBOUNDED = 1_000_000  # longest row in tokens of a model that states no context


@dataclass(frozen=True)
class RewardModel:
    """A model that gives one number for a prompt with its reply."""

    model: nn.Module
    encoder: Encoder

    @classmethod
    def open(cls, source: Source) -> RewardModel:
        """Load it. Raises AlignError for a language model, whose reward head would be made up."""
        require_reward(source)
        tokenizer = load_tokenizer(source)
        prepare_tokenizer(tokenizer, None)
        model = load_reward(source, tokenizer=tokenizer)
        return cls(model, context_encoder(model, tokenizer))

    def score(self, replies: Sequence[tuple[Messages, Messages]], progress: Progress | None = None) -> list[float]:
        """Rewards of (prompt, reply) pairs. Raises AlignError for one that is longer than the context."""
        rows = [self.encoder.reply(prompt, reply) for prompt, reply in replies]
        self._check_lengths(rows)
        return [float(reward) for reward in rewards(self.model, rows, progress=progress).tolist()]

    def check(self, prompts: Sequence[Messages], reply_tokens: int = 0) -> None:
        """Raises AlignError for prompts that no reply of so many tokens to could be scored: too long, or unknown to the
        template."""
        what = f"a reply of {reply_tokens} tokens to prompt" if reply_tokens else "an empty reply to prompt"
        self._check_lengths([self.encoder.reply(prompt, said("")) for prompt in prompts], what, reply_tokens)

    def _check_lengths(self, rows: Sequence[Encoded], what: str = "reply", more_tokens: int = 0) -> None:
        context = context_length(self.model)
        if context is None:
            return
        lengths = [len(row.ids) + more_tokens for row in rows]
        too_long = [(number, length) for number, length in enumerate(lengths, 1) if length > context]
        if too_long:
            number, tokens = too_long[0]
            more = f", and {len(too_long) - 1} more are too long" if too_long[1:] else ""
            raise AlignError(
                f"{what} {number} has {tokens} tokens with its prompt; the model's context is {context}{more}",
                "Shorten it; a reward for a part of it would say nothing.",
            )


class ModelReward(Reward):
    """The reward model's number."""

    def __init__(self, model: RewardModel) -> None:
        self.model = model

    def check(self, questions: Sequence[Question]) -> None:
        self.model.check([prompt_of(question) for question in questions])

    def __call__(self, responses: Sequence[Response], progress: Progress) -> list[float]:
        try:
            return self.model.score([(response.prompt, said(response.text)) for response in responses], progress)
        except StageFailed:
            raise
        except AlignError as error:  # the user cannot shorten what a policy writes
            error.hint = "Lower max_length or max_new_tokens; a reward for a part of a response would say nothing."
            raise


def said(text: str) -> Messages:
    """A text as an assistant's turn."""
    return (Message("assistant", text),)


def context_encoder(model: nn.Module, tokenizer: Any) -> Encoder:
    """An encoder whose rows may be as long as the model's context."""
    return Encoder(tokenizer, max_length=context_length(model) or UNBOUNDED)
