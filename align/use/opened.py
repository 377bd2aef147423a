"""A checkpoint opened for use: model, tokenizer and encoder that belong together. Training opens its models itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from align.chat.encoded import Encoded
from align.chat.encoder import Encoder
from align.chat.templates import prepare_tokenizer, stop_token_ids
from align.data.examples import Conversation, Document, Message, Messages
from align.errors import AlignError
from align.models.folders import load_tokenizer
from align.models.loading import load_policy, load_reward
from align.models.rewards import require_reward
from align.models.source import Source
from align.progress import Progress
from align.rollout.generation import OnToken, Reply, Sampling, context_length, generate
from align.rollout.scoring import rewards

UNBOUNDED = 1_000_000  # longest row in tokens of a model that states no context


@dataclass(frozen=True)
class Policy:
    """A language model that can answer."""

    model: nn.Module
    tokenizer: Any
    encoder: Encoder

    @classmethod
    def open(cls, source: Source) -> Policy:
        """Load it; a tokenizer without a chat template gets ours. Raises AlignError for a reward model."""
        if source.is_reward:
            raise AlignError(f"{source.path}: a reward model, it writes no text", "Use `align score`.")
        tokenizer = load_tokenizer(source)
        prepare_tokenizer(tokenizer, None)
        model = load_policy(source, tokenizer=tokenizer)
        return cls(model, tokenizer, _encoder(model, tokenizer))

    def answer(
        self,
        prompts: Sequence[Messages],
        sampling: Sampling,
        progress: Progress | None = None,
        on_token: OnToken | None = None,
    ) -> list[Reply]:
        """One reply for each prompt, in their order."""
        return generate(
            self.model, self.tokenizer, [self.encoder.prompt(prompt) for prompt in prompts], sampling,
            stop_ids=stop_token_ids(self.tokenizer), progress=progress, on_token=on_token,
        )  # fmt: skip

    def rows(self, examples: Sequence[Document | Conversation]) -> list[Encoded]:
        """Rows whose trained tokens are the assistant's (or the text's); longer ones than the context are left out."""
        rows: list[Encoded] = []
        for example in examples:
            if isinstance(example, Document):
                rows += self.encoder.documents(example)
            elif row := self.encoder.conversation(example):
                rows.append(row)
        return rows


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
        return cls(model, _encoder(model, tokenizer))

    def score(self, replies: Sequence[tuple[Messages, Messages]], progress: Progress | None = None) -> list[float]:
        """Rewards of (prompt, reply) pairs. Raises AlignError for one that is longer than the context."""
        rows = [self.encoder.reply(prompt, reply) for prompt, reply in replies]
        context = context_length(self.model)
        for number, row in enumerate(rows, 1):
            if context is not None and len(row.ids) > context:
                raise AlignError(
                    f"reply {number} has {len(row.ids)} tokens with its prompt; the model's context is {context}",
                    "Shorten it; a reward for a part of it would say nothing.",
                )
        return [float(reward) for reward in rewards(self.model, rows, progress=progress).tolist()]


def said(text: str) -> Messages:
    """A text as an assistant's turn."""
    return (Message("assistant", text),)


def _encoder(model: nn.Module, tokenizer: Any) -> Encoder:
    return Encoder(tokenizer, max_length=context_length(model) or UNBOUNDED)
