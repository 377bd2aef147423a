"""An adapter merged into its base, as a stage: the result is a plain model that later stages can start from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from align.chat.encoder import Encoder
from align.chat.templates import template_sha256
from align.data.examples import Document, Example, Preference, Prompt, Rated, prompt_of
from align.errors import AlignError, CheckFailed
from align.models.folders import load_tokenizer
from align.models.merging import merge
from align.progress import Progress
from align.recipe.settings import MergeSettings
from align.stages.encoding import context_of
from align.stages.stage import Inputs, Outcome

COMPARED_ROWS = 64


def run(settings: MergeSettings, inputs: Inputs, folder: Path, progress: Progress) -> Outcome:
    """Merge and measure on held-out rows. Raises CheckFailed when the KL to the adapter is above `max_kl`."""
    tokenizer = load_tokenizer(inputs.parent)
    encoder = Encoder(tokenizer, max_length=context_of(inputs.parent), too_long="cut")
    rows = compared_rows(encoder, inputs.questions)
    if not rows:
        raise AlignError(
            "a merge is measured on held-out text, and this recipe names none",
            "Set evaluation.prompts to a data set with held-out rows.",
        )
    verdict = merge(inputs.parent, folder, rows=rows, into=settings.into, max_kl=settings.max_kl)
    numbers = f"KL {verdict.kl:.5f} nats per token, top-1 agreement {verdict.top1_agreement:.1%}"
    progress.note(f"merged into the {verdict.into} base ({verdict.why}): {numbers}")
    if not verdict.holds:
        raise CheckFailed(
            f"the merged model is not the adapter: {numbers}, allowed {verdict.max_kl}", "Use into: auto."
        )
    return Outcome(
        kind="reward" if inputs.parent.is_reward else "model",
        template_sha256=template_sha256(tokenizer),
        metrics={f"merge.{name}": value for name, value in verdict.as_dict().items()},
    )


def compared_rows(encoder: Encoder, examples: Sequence[Example]) -> list[list[int]]:
    """Token ids of the first rows: whole conversations where there are answers, prompts where there are none."""
    return [row for example in examples[:COMPARED_ROWS] if (row := _ids(encoder, example))]


def _ids(encoder: Encoder, example: Example) -> list[int]:
    if isinstance(example, Document):
        return encoder.documents(example)[0].ids
    if isinstance(example, Prompt):
        return encoder.prompt(example.messages)
    if isinstance(example, Preference):
        return encoder.reply(example.prompt, example.chosen).ids
    if isinstance(example, Rated):
        return encoder.reply(example.prompt, example.completion).ids
    return encoder.reply(prompt_of(example), example.messages[-1:]).ids
