"""Direct preference optimisation and its family. The reference is the checkpoint that the stage starts from.

Its log-probabilities are computed once, while the policy still is the reference, and kept by content: a sweep over beta
or a resumed run reads them back. No second model is held while training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, overload

from torch import nn

from align.chat.encoded import Encoded, EncodedPair
from align.data.examples import Preference, Rated
from align.errors import AlignError
from align.evaluation.numbers import TIE_NATS, accuracy_change, as_metrics, kl_numbers, preference_numbers
from align.memory import Budget
from align.models.hardware import compute_dtype, width_of
from align.models.loading import load_policy
from align.models.saving import save_checkpoint
from align.objective import Objective
from align.preference_losses import Pair, log_ratios
from align.progress import Progress
from align.recipe.settings import DpoSettings, KtoLoss, SigmoidLoss
from align.rollout.scoring import AnswerLogps, answer_logps, pair_logps, reply_row
from align.stages.bench import Bench, judged, samples
from align.stages.encoding import Desk
from align.stages.objectives import ComparedPair, PreferenceLoss, RatedLoss, RatedRow
from align.stages.reference import as_floats, reference_logps, rotated
from align.stages.stage import Inputs, Outcome
from align.steps import autocast
from align.trainer import Task, train


def run(settings: DpoSettings, inputs: Inputs, folder: Path, progress: Progress) -> Outcome:
    """Train on pairs (KTO: on rated replies). Measured on held-out pairs and questions, before and after."""
    stage = _Dpo(settings, inputs, Desk.open(settings, inputs.parent, inputs.template, inputs.cache), progress)
    model = stage.open(trainable=True)
    bench = Bench(stage.desk, inputs, progress)
    rows = stage.rows(model, inputs.data.train, "training")
    lengths = stage.desk.encoder.lengths.as_dict()
    held_out = stage.rows(model, inputs.data.test, "held-out")
    before = bench.answers(model)
    measured = held_out[: inputs.evaluation.rows]
    budget = Budget.of(settings, progress.note)
    objective = stage.objective(budget)
    task = Task(
        model, objective, rows, measured, settings, inputs.seed, inputs.work, inputs.log_to, budget=budget
    )  # fmt: skip
    trained = train(task, progress)
    after = bench.answers(model)
    metrics = {
        **stage.ranking(model, held_out),
        **as_metrics(stage.drift(model, bench), "after."),
        **judged(before, after),
        **trained.as_metrics(),
    }
    save_checkpoint(model, stage.desk.tokenizer, folder)
    return Outcome(
        kind="adapter" if settings.adapter or inputs.parent.is_adapter else "model",
        template_sha256=stage.desk.template_sha256,
        metrics=metrics,
        samples=samples(before, after, inputs.evaluation.samples),
        lengths=lengths,
    )


class ComparedPairs(Sequence[ComparedPair]):
    """Pairs with the log-probabilities of their sides, (2N,), those of a pair side by side."""

    def __init__(self, pairs: Sequence[EncodedPair], logps: Sequence[float]) -> None:
        self.pairs, self.logps = pairs, logps

    def __len__(self) -> int:
        return len(self.pairs)

    @overload
    def __getitem__(self, place: int) -> ComparedPair: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[ComparedPair]: ...

    def __getitem__(self, place: int | slice) -> ComparedPair | Sequence[ComparedPair]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        number = range(len(self))[place]
        return ComparedPair(self.pairs[number], *self.logps[2 * number : 2 * number + 2])


@dataclass(frozen=True)
class _Dpo:
    """What the steps of one run share."""

    settings: DpoSettings
    inputs: Inputs
    desk: Desk
    progress: Progress

    def open(self, *, trainable: bool) -> nn.Module:
        """The parent: as the policy that trains, or once more as the frozen reference."""
        return load_policy(
            self.inputs.parent,
            quantize=self.settings.quantize,
            adapter=self.settings.adapter if trainable else None,
            trainable=trainable,
            tokenizer=self.desk.tokenizer,
            precision=self.settings.precision,
            seed=self.inputs.seed,
            gradient_checkpointing=self.settings.gradient_checkpointing,
        )

    def objective(self, budget: Budget) -> Objective:
        """The loss that the recipe chose. budget: that of the training."""
        loss, beta = self.settings.loss, self.settings.beta
        if isinstance(loss, KtoLoss):
            return RatedLoss(loss, beta=beta, budget=budget)
        return PreferenceLoss(loss, beta=beta)

    def rows(self, model: nn.Module, examples: Sequence[Any], what: str) -> Sequence[Any]:
        """Encoded rows with their reference log-probabilities; `model` must still be the reference."""
        if isinstance(self.settings.loss, KtoLoss):
            return self._rated_rows(model, [part for example in examples for part in _rated(example)], what)
        pairs = self.desk.rows(examples, what, self.progress)
        if not isinstance(self.settings.loss, SigmoidLoss) and any(p.probability not in (None, 1.0) for p in pairs):
            raise AlignError(
                f"the {what} pairs have soft labels (probability), and loss '{self.settings.loss.kind}' cannot use them",
                "Use loss: sigmoid, or remove the column.",
            )
        return ComparedPairs(pairs, as_floats(self._reference(model, pairs.sides()).sums))

    def ranking(self, model: nn.Module, rows: Sequence[Any]) -> dict[str, Any]:
        """Accuracy and margin of the implicit reward on held-out pairs, before (the reference) and after; {} for KTO."""
        if isinstance(self.settings.loss, KtoLoss) or not rows:
            return {}
        beta, seed = self.settings.beta, self.inputs.seed
        with autocast(model, self.settings.precision):
            policy = pair_logps(model, [row.pair for row in rows], progress=self.progress).logps
        reference = Pair(
            policy.chosen.new_tensor([row.chosen for row in rows]),
            policy.chosen.new_tensor([row.rejected for row in rows]),
        )
        start, end = log_ratios(reference, reference), log_ratios(policy, reference)
        return {
            **as_metrics(preference_numbers(reference, reference, beta=beta, seed=seed), "before."),
            **as_metrics(preference_numbers(policy, reference, beta=beta, seed=seed), "after."),
            **as_metrics(accuracy_change(start, end, tie=TIE_NATS, seed=seed), "change."),
        }

    def drift(self, model: nn.Module, bench: Bench) -> dict[str, Any]:
        """KL from the reference, on replies that the policy samples to the held-out questions."""
        sampled = bench.answers(model, temperature=1.0)
        rows = [reply_row(prompt, reply.ids) for prompt, reply in zip(sampled.prompts, sampled.replies, strict=True)]
        if not rows:
            return {}
        with autocast(model, self.settings.precision):
            policy = answer_logps(model, rows, progress=self.progress)
            reference = answer_logps(self.open(trainable=False), rows, progress=self.progress)
        return kl_numbers(policy, reference)

    def _rated_rows(self, model: nn.Module, examples: Sequence[Rated], what: str) -> list[RatedRow]:
        kept, rows = [], []
        for example in examples:
            row = self.desk.encoder.rated(example)
            if row is not None:
                kept.append(example.desirable)
                rows.append(row)
        if len(rows) < 2:
            if what == "held-out":
                return []  # too few to be measured
            raise AlignError(
                f"{len(rows)} {what} replies are left of {len(examples)}; KTO needs two", "Raise max_length."
            )
        mismatched = rotated(rows, [row.trained.index(True) for row in rows], self.desk.max_length)
        logps = as_floats(self._reference(model, [*rows, *mismatched]).sums)
        return [
            RatedRow(row, good, logps[i], mismatched[i], logps[len(rows) + i])
            for i, (row, good) in enumerate(zip(rows, kept, strict=True))
        ]

    def _reference(self, model: nn.Module, rows: Sequence[Encoded]) -> AnswerLogps:
        """In the arithmetic of training, so that policy and reference start out equal; kept by all that decides it."""
        settings, weights = self.settings, next(model.parameters())
        width = width_of(cast(Any, model.config))
        arithmetic = [weights.device.type, str(weights.dtype), str(compute_dtype(settings.precision, width))]
        ingredients = [self.inputs.parent_id, settings.quantize, *arithmetic]
        with autocast(model, settings.precision):
            return reference_logps(model, rows, self.inputs.cache, ingredients, self.progress)


def _rated(example: Preference | Rated) -> list[Rated]:
    """Rated replies as they are; a pair as a good and a bad one."""
    if isinstance(example, Rated):
        return [example]
    return [
        Rated(example.prompt, example.chosen, True, example.expected),
        Rated(example.prompt, example.rejected, False, example.expected),
    ]
