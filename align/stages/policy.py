"""What every stage that trains a policy shares: its encoder, its answers to held-out questions, its numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from align.chat import Encoder, check_template, prepare_tokenizer, stop_token_ids
from align.data.examples import Example, prompt_of
from align.evaluation import judge_numbers
from align.models.loading import load_tokenizer, model_config
from align.progress import Progress
from align.recipe import TrainingSettings
from align.rollout import Reply, Sampling, generate
from align.stages.stage import Inputs

LONGEST_ROW = 2048  # tokens; the default of max_length where the model could take more


@dataclass(frozen=True)
class Bench:
    """A tokenizer with its template, the encoder of a stage, and the held-out questions with their judge."""

    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder
    inputs: Inputs

    @classmethod
    def open(cls, settings: TrainingSettings, inputs: Inputs) -> Bench:
        """Tokenizer of the parent (with our template where it has none) and an encoder for these settings."""
        tokenizer = load_tokenizer(inputs.parent)
        prepare_tokenizer(tokenizer, inputs.template)
        check_template(tokenizer)
        encoder = Encoder(
            tokenizer,
            max_length=longest_row(settings, inputs),
            too_long=settings.too_long,
            cut_prompt=settings.cut_prompt,
            train_on=getattr(settings, "train_on", "assistant"),
        )
        return cls(tokenizer, encoder, inputs)

    @property
    def pad_id(self) -> int:
        """Filler for batches; never looked at, since every batch carries its mask."""
        pad = self.tokenizer.pad_token_id
        return 0 if pad is None else int(pad)

    def answers(self, model: nn.Module, progress: Progress, *, temperature: float = 0.0) -> Answers:
        """The model's answers to the held-out questions: greedy, or sampled at a temperature."""
        asked = self.questions()
        if not asked:
            return Answers()
        sampling = Sampling(
            max_new_tokens=self.inputs.evaluation.max_new_tokens, temperature=temperature, seed=self.inputs.seed
        )
        prompts = [self.encoder.prompt(prompt_of(question)) for question in asked]
        replies = generate(
            model, self.tokenizer, prompts, sampling, stop_ids=stop_token_ids(self.tokenizer), progress=progress
        )
        return Answers(asked, prompts, replies)

    def questions(self) -> list[Example]:
        """The first `evaluation.rows` held-out examples that have a prompt and leave room for an answer."""
        room = self.encoder.max_length - self.inputs.evaluation.max_new_tokens
        asked = [q for q in self.inputs.questions if q.kind != "text"][: self.inputs.evaluation.rows]
        return [q for q in asked if len(self.encoder.prompt(prompt_of(q))) <= room]

    def judged(self, answers: Answers) -> dict[str, Any]:
        """The judge's numbers on these answers; {} without a judge."""
        judge = self.inputs.judge
        if judge is None or not answers.asked:
            return {}
        answers.verdicts = [
            judge.verdict(q.messages_text, reply.text, q.expected) for q, reply in zip(answers.asked, answers.replies)
        ]
        return {f"judge.{name}": value for name, value in judge_numbers(answers.verdicts).items()}


@dataclass
class Answers:
    """Questions and what a model replied; verdicts once a judge has seen them."""

    asked: Sequence[Example] = ()
    prompts: Sequence[list[int]] = ()
    replies: Sequence[Reply] = ()
    verdicts: list[Any] = field(default_factory=list)
