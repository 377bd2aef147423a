"""The prompts of a ppo stage as token ids, those that leave room for a response. No torch, so that a check can ask it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from align.chat.encoder import Encoder
from align.data.examples import Question, prompt_of
from align.errors import AlignError
from align.recipe.ppo_settings import PpoSettings


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
