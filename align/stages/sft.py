"""Supervised fine-tuning and pretraining: the likelihood of answers, or of every token of plain text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from align.evaluation.numbers import as_metrics, likelihood_change, likelihood_numbers
from align.models.loading import load_policy
from align.models.saving import save_checkpoint
from align.progress import Progress
from align.recipe.settings import PretrainSettings, SftSettings
from align.rollout.scoring import AnswerLogps, answer_logps
from align.stages.bench import Bench, judged, samples
from align.stages.encoding import Desk
from align.stages.objectives import AnswerLoss
from align.stages.stage import Inputs, Outcome
from align.trainer import Task, train


def run(settings: SftSettings | PretrainSettings, inputs: Inputs, folder: Path, progress: Progress) -> Outcome:
    """Train on the rows of `inputs.data`; held-out loss and answers are measured before and after."""
    desk = Desk.open(settings, inputs.parent, inputs.template, inputs.cache)
    bench = Bench(desk, inputs, progress)
    rows = desk.rows(inputs.data.train, "training", progress)
    lengths = desk.encoder.lengths.as_dict()
    held_out = desk.rows(inputs.data.test, "held-out", progress)[: inputs.evaluation.rows]
    model = load_policy(
        inputs.parent,
        quantize=settings.quantize,
        adapter=settings.adapter,
        trainable=True,
        from_scratch=isinstance(settings, PretrainSettings) and settings.from_scratch,
        tokenizer=desk.tokenizer,
        precision=settings.precision,
        seed=inputs.seed,
        gradient_checkpointing=settings.gradient_checkpointing,
    )
    before, known = bench.answers(model), answer_logps(model, held_out, progress=progress)
    task = Task(model, AnswerLoss(), rows, held_out, settings, inputs.seed, inputs.work, inputs.log_to)
    trained = train(task, progress)
    after, learnt = bench.answers(model), answer_logps(model, held_out, progress=progress)
    save_checkpoint(model, desk.tokenizer, folder)
    return Outcome(
        kind="adapter" if settings.adapter or inputs.parent.is_adapter else "model",
        template_sha256=desk.template_sha256,
        metrics={**_likelihood(known, learnt, inputs.seed), **judged(before, after), **trained.as_metrics()},
        samples=samples(before, after, inputs.evaluation.samples),
        lengths=lengths,
    )


def _likelihood(before: AnswerLogps, after: AnswerLogps, seed: int) -> dict[str, Any]:
    """Held-out loss and perplexity before and after, and the paired change."""
    return {
        **as_metrics(likelihood_numbers(before, seed=seed), "before."),
        **as_metrics(likelihood_numbers(after, seed=seed), "after."),
        **as_metrics(likelihood_change(before, after, seed=seed), "change."),
    }
