"""The constitutional stage: answers criticised, revised and compared by a constitution, made into data (Bai 2022).

What happens to a row stands in critique/work.py, what is made of the rows in critique/results.py. Held-out prompts go
the same way: they make the held-out rows, and show what the revisions are worth.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from align.chat.encoder import Encoder
from align.chat.templates import check_template, prepare_tokenizer, template_sha256
from align.constitution import Constitution
from align.critique.critics import Critic, JudgeCritic, TextCritic
from align.critique.endpoint import Endpoint
from align.critique.results import counts, critic_metrics, data_sets, judge_metrics, samples
from align.critique.rows import FAULTS, Row, RowFile
from align.critique.work import Workbench
from align.critique.writers import EndpointWriter, LocalWriter
from align.critique.writing import Writer
from align.data.examples import Document
from align.judge import Judge
from align.models.folders import load_tokenizer
from align.models.loading import load_policy
from align.models.source import Quantize, Source
from align.progress import Progress
from align.recipe.critique_settings import CheckpointCritic, CritiqueSettings, EndpointCritic
from align.recipe.critique_settings import Critic as CriticSettings
from align.recipe.critique_settings import JudgeCritic as JudgeCriticSettings
from align.stages.encoding import context_of
from align.stages.stage import DataOutcome, Inputs


@dataclass(frozen=True)
class CriticParts:
    """All that a critic is made of. judges: by `file:` as the recipe writes it; source: its own model, where it has one."""

    settings: CriticSettings
    constitution: Constitution
    max_new_tokens: int
    judges: Mapping[str | None, Judge]
    source: Source | None


def run(settings: CritiqueSettings, inputs: Inputs, folder: Path, progress: Progress) -> DataOutcome:
    """Make `sft` and `preferences` from the training prompts of `inputs.data`; measured on the held-out questions."""
    constitution = inputs.constitution
    assert constitution is not None, "a critique stage has one"
    questions = [example for example in inputs.data.train if not isinstance(example, Document)]
    held_out = list(inputs.questions[: inputs.evaluation.rows])
    policy, template = open_writer(inputs.parent, progress, template=inputs.template, quantize=settings.quantize)
    parts = CriticParts(settings.critic, constitution, settings.max_new_tokens, inputs.judges, inputs.critic)
    with opened_critic(parts, policy, progress) as (critic, endpoint):
        bench = Workbench(settings, policy, critic, constitution, inputs.seed, endpoint, progress)
        tested = bench.rows(held_out, RowFile(inputs.work / "held_out.jsonl"), "held-out prompts")
        rows = bench.rows(questions, RowFile(inputs.work / "rows.jsonl"), "prompts")
    made = data_sets(rows, tested, keep_faultless=settings.keep_faultless, revises=settings.revisions > 0)
    told = counts(rows, constitution)
    beside = folder / "sft"
    beside.mkdir(exist_ok=True)
    (beside / "constitution.yaml").write_text(constitution.text, encoding="utf-8")
    for name in ("rows.jsonl", "held_out.jsonl"):  # every step of every row, also of those that are kept apart
        shutil.copyfile(inputs.work / name, beside / name)
    judge = inputs.judge
    return DataOutcome(
        outputs=made,
        template_sha256=template,
        counts=told,
        metrics={**critic_metrics(tested), **(judge_metrics(tested, judge) if judge and tested else {})},
        samples=samples(tested or rows, judge, inputs.evaluation.samples),
        why_empty=f"no row came of {len(rows)} prompts: {_reasons(rows)}",
    )


def open_writer(
    source: Source, progress: Progress, *, template: str | None = None, quantize: Quantize | None = None
) -> tuple[LocalWriter, str]:
    """A language model that answers, and the hash of the template that its prompts go through."""
    tokenizer = load_tokenizer(source)
    prepare_tokenizer(tokenizer, template)
    check_template(tokenizer)
    context = context_of(source)
    encoder = Encoder(tokenizer, max_length=context)
    model = load_policy(source, tokenizer=tokenizer, quantize=quantize)
    return LocalWriter(model, tokenizer, encoder, context, progress), template_sha256(tokenizer)


@contextmanager
def opened_critic(
    parts: CriticParts, policy: Writer | None, progress: Progress
) -> Iterator[tuple[Critic, EndpointWriter | None]]:
    """The critic, and its endpoint if it has one. policy: the model that the stage starts from, where it is the critic's
    hand."""
    settings = parts.settings
    with ExitStack() as stack:
        writer, endpoint = policy, None
        if isinstance(settings, EndpointCritic):
            opened = stack.enter_context(Endpoint.open(settings))
            writer = endpoint = EndpointWriter(opened, settings.concurrency)
        elif isinstance(settings, CheckpointCritic):
            assert parts.source is not None, "the critic's model is resolved"
            writer, _ = open_writer(parts.source, progress)
        assert writer is not None, "a critic that is no model of its own writes with the policy"
        critic: Critic = TextCritic(writer, parts.constitution, parts.max_new_tokens)
        if isinstance(settings, JudgeCriticSettings):
            critic = JudgeCritic(parts.judges[settings.file], critic)
        yield critic, endpoint


def _reasons(rows: Sequence[Row]) -> str:
    found = Counter(row.fault for row in rows if row.fault)
    return "; ".join(f"{number} times {FAULTS[fault]}" for fault, number in found.most_common()) or (
        "no two answers to a prompt differed"
    )
