"""Which prompts a round answers and which of its responses an optimiser step learns from: decided by the seed alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from align.batches import epoch_order
from align.chat.encoder import Encoder
from align.data.examples import Question, prompt_of
from align.errors import AlignError
from align.recipe.ppo_settings import PpoSettings
from align.trainer import Stream


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt and its token ids."""

    question: Question
    ids: list[int]


def encoded_prompts(
    questions: Sequence[Question], encoder: Encoder, settings: PpoSettings, longest: int
) -> tuple[list[EncodedPrompt], dict[str, int]]:
    """The prompts that leave room for a response, and what the length policy did to the others.

    longest: most tokens of a prompt with its response. Raises AlignError when none is left, or `too_long: error` says so.
    """
    room = longest - settings.max_new_tokens
    kept: list[EncodedPrompt] = []
    counts = {"rows": len(questions), "dropped": 0, "cut_prompts": 0}
    for number, question in enumerate(questions, 1):
        ids = encoder.prompt(prompt_of(question))
        if len(ids) > room and settings.cut_prompt and room > 0:
            ids = encoder.cut_prompt(ids, room)
            counts["cut_prompts"] += 1
        if len(ids) <= room:
            kept.append(EncodedPrompt(question, ids))
        elif settings.too_long == "error":
            raise AlignError(
                f"prompt {number} has {len(ids)} tokens; with max_new_tokens: {settings.max_new_tokens} it is longer than "
                f"the {longest} tokens allowed",
                "Shorten it, lower max_new_tokens, or set too_long: drop or cut_prompt: true.",
            )
        else:
            counts["dropped"] += 1
    if not kept:
        raise AlignError(
            f"none of the {len(questions)} prompts leaves room for a response of max_new_tokens: {settings.max_new_tokens} "
            f"within {longest} tokens",
            "Lower max_new_tokens, raise max_length (up to the model's context), or set cut_prompt: true.",
        )
    lengths = sorted(len(prompt.ids) for prompt in kept)
    sizes = {
        "longest": lengths[-1],
        "p50": lengths[(len(lengths) - 1) // 2],
        "p95": lengths[(len(lengths) - 1) * 95 // 100],
    }
    return kept, {**counts, "tokens": sum(lengths), **sizes}


def rounds_of(prompts: int, settings: PpoSettings) -> int:
    """Rounds of a run over that many prompts: as the recipe says, else until each was answered `epochs` times."""
    if settings.rounds is not None:
        return settings.rounds
    return max(1, math.ceil(settings.epochs * prompts * settings.samples / settings.rollouts))


def prompts_of_round(number: int, prompts: int, settings: PpoSettings, seed: int) -> list[int]:
    """Places of a round's prompts, each as often as the estimator takes samples, those side by side.

    The rounds together go through shuffled epochs, one after the other, across their seams.
    """
    count = settings.rollouts // settings.samples
    positions = range(number * count, (number + 1) * count)
    epochs = range(positions[0] // prompts, positions[-1] // prompts + 1)
    orders = {epoch: epoch_order(prompts, seed, epoch) for epoch in epochs}
    places = [orders[position // prompts][position % prompts] for position in positions]
    return [place for place in places for _ in range(settings.samples)]


class RoundStream(Stream):
    """Tickets of each optimiser step: round number times `rollouts`, plus the place of a response in the round."""

    def __init__(self, rounds: int, settings: PpoSettings, seed: int) -> None:
        self.rounds, self.settings, self.seed = rounds, settings, seed
        self.steps_per_round = settings.round_epochs * math.ceil(settings.rollouts / settings.batch_size)
        self.steps = min(rounds * self.steps_per_round, settings.max_steps or rounds * self.steps_per_round)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.steps):
            number, step_in_round = divmod(step, self.steps_per_round)
            epoch, batch = divmod(step_in_round, math.ceil(self.settings.rollouts / self.settings.batch_size))
            order = epoch_order(self.settings.rollouts, self.seed, number * self.settings.round_epochs + epoch)
            chosen = order[batch * self.settings.batch_size : (batch + 1) * self.settings.batch_size]
            yield [number * self.settings.rollouts + place for place in chosen]
