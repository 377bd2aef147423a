"""A language model opened for use: model, tokenizer and encoder that belong together. Training opens its models itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from align.chat.encoded import Encoded
from align.chat.encoder import Encoder
from align.chat.templates import prepare_tokenizer, stop_token_ids
from align.data.examples import Conversation, Document, Messages
from align.errors import AlignError
from align.models.folders import load_tokenizer
from align.models.loading import load_policy
from align.models.source import Source
from align.progress import Progress
from align.rewards.model import context_encoder
from align.rollout.generation import OnToken, Reply, Sampling, generate


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
        return cls(model, tokenizer, context_encoder(model, tokenizer))

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
