"""Peak memory of a stage that trains on rows: pretrain, sft, reward, dpo.

    before      weights, and asking the model
    learning    weights, the optimiser's state from the second step on, gradients, activations
    saving      of a model in parts: what its first process gathers
    after       weights, the optimiser's state, asking the model (dpo: also its reference, opened once more)
    reference   dpo on a CPU: the files of the reference beside the heap of the training, which is kept

The peak is the largest of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from align.estimate.activations import (
    FLOAT,
    HALF,
    Arithmetic,
    copied_keys,
    trunk_bytes,
    working_bytes,
)
from align.estimate.asking import reading_bytes, writing_bytes
from align.estimate.logits import Head
from align.estimate.place import Place
from align.estimate.rows import Rows
from align.estimate.shape import Shape
from align.estimate.weights import MOMENTS_BYTES, frozen_bytes, fused_bytes
from align.recipe.settings import DpoSettings, EvaluationSettings, KtoLoss, PretrainSettings, RewardSettings
from align.recipe.training_settings import TrainingSettings


@dataclass(frozen=True)
class Learner:
    """Weights that train, and how they compute. half: whether products are in bfloat16.

    head: whether logits are computed; a reward model has none.
    """

    settings: TrainingSettings
    shape: Shape
    place: Place
    half: bool
    head: bool = True

    @property
    def arithmetic(self) -> Arithmetic:
        """How it computes."""
        adapter = self.settings.adapter
        return Arithmetic(self.half, adapter.rank if adapter else None, self.settings.quantize)

    @property
    def logits(self) -> Head:
        """How its head's logits are turned into log-probabilities."""
        return Head(self.shape.vocabulary, self.half, self.settings.adapter is None, self.shape.plain_head)

    @property
    def parameters(self) -> int:
        """All weights of the model below an adapter."""
        return self.shape.parameters if self.head else self.shape.classifier_parameters

    @property
    def trained(self) -> int:
        """Weights that train."""
        adapter = self.settings.adapter
        return self.shape.adapter_parameters(adapter) if adapter else self.parameters

    @property
    def weights(self) -> float:
        """Bytes of all weights."""
        if self.settings.adapter is None:
            return FLOAT * self.parameters
        base = frozen_bytes(self.shape, self.settings.quantize, half=self.half, head=self.head)
        return base + FLOAT * self.trained

    @property
    def state(self) -> float:
        """Bytes of the optimiser's state, of this process's part where it is divided."""
        return MOMENTS_BYTES[self.settings.optimizer] * self.trained / self.place.parts

    @property
    def gradients(self) -> float:
        """Bytes of the gradients, likewise."""
        return FLOAT * self.trained / self.place.parts

    def learning(self, rows: Rows, share: float = 1.0) -> float:
        """Most bytes that a step takes besides the weights. share: of a step's rows that are this process's.

        While the loss is computed all activations are there, and at the end of the backward pass all gradients. Where a
        step has several micro-batches, the gradients of the first are there in all others.
        """
        steps = self.settings.steps(rows.count)
        step = share * rows.step_tokens(self.settings.batch_size, steps)
        several = step > self.settings.batch_tokens
        tokens = max(self.settings.batch_tokens, rows.longest) if several else step
        computed = rows.computed_tokens(tokens, steps * step / tokens)
        micro_batch = self.micro_batch(computed, tokens * rows.predicted) + self._gathered
        if rows.computed < 1:
            micro_batch += copied_keys(self.shape, tokens, checkpointing=self.settings.gradient_checkpointing)
        if not several:
            return self.state + max(micro_batch, self.gradients)
        return self.state + self.gradients + self.place.spread(micro_batch)

    def micro_batch(self, computed: float, predicted: float) -> float:
        """Activations, and the larger of what the loss and what a block take for a moment. predicted: tokens that the head
        sees."""
        checkpointing = self.settings.gradient_checkpointing
        kept = trunk_bytes(self.shape, self.arithmetic, computed, checkpointing=checkpointing) + self._casts
        table = FLOAT * self.shape.table if self.head and not self.settings.adapter else 0.0  # gradient of the head
        block = working_bytes(self.shape, computed, self.arithmetic.width)
        return kept + table + max(self._loss(predicted), block)

    @property
    def _gathered(self) -> float:
        """Of a model in parts: embeddings and head, and the layer at hand, whole while they are used, with gradients."""
        if self.place.parts == 1:
            return 0.0
        table = self.parameters - self.shape.block_parameters
        return 2 * FLOAT * (table + self.shape.block_parameters / self.shape.layers)

    def _loss(self, predicted: float) -> float:
        if not self.head:
            return 0.0
        hidden = 2 * FLOAT * self.shape.hidden * predicted
        return hidden + self.logits.kept(predicted) + self.logits.working(predicted)

    @property
    def _casts(self) -> float:
        """Weights that train are turned into bfloat16 once for a forward pass and its backward pass."""
        if self.settings.adapter is not None or not self.half:
            return 0.0
        return HALF * (self.parameters if self.head else self.shape.block_parameters)


def training_phases(
    settings: TrainingSettings, shape: Shape, rows: Rows, evaluation: EvaluationSettings, place: Place, *, half: bool
) -> Mapping[str, float]:
    """Bytes of each phase of a stage in one process, by name."""
    learner = Learner(settings, shape, place, half, head=not isinstance(settings, RewardSettings))
    if isinstance(settings, DpoSettings) and isinstance(settings.loss, KtoLoss):
        rows = rows.halved()
    asking = _asking(learner, rows, evaluation)
    base, asked = place.libraries_bytes, max(asking, _reference(learner, rows, evaluation))
    learning = base + learner.weights / place.parts + learner.learning(rows, share=1 / place.processes)
    return {
        "before": base + learner.weights + asking,
        "learning": learning,
        "saving": base + learner.weights / place.parts + learner.state + _gathered_state(learner),
        "after": base + learner.weights + learner.state + asked,
        "reference": learning + _mapped(learner) if isinstance(settings, DpoSettings) else 0.0,
    }


def _mapped(learner: Learner) -> float:
    """The files of the reference, which are mapped into memory while the heap of the training is kept (allocator.py)."""
    return 0.0 if learner.place.gpu else learner.shape.stored * learner.shape.parameters


def _gathered_state(learner: Learner) -> float:
    """What the first of several processes gathers of a model in parts to save it; on a GPU that goes to the host."""
    if learner.place.parts == 1 or learner.place.gpu:
        return 0.0
    return learner.place.parts * learner.state + FLOAT * learner.trained


def _asking(learner: Learner, rows: Rows, evaluation: EvaluationSettings) -> float:
    """Answers to held-out questions, and held-out rows."""
    settings, shape = learner.settings, learner.shape
    half = learner.half and settings.adapter is not None  # outside of training, weights in float32 compute in float32
    reading = reading_bytes(shape, rows.mean * rows.computed * evaluation.rows, rows.predicted, half=half)
    if isinstance(settings, PretrainSettings | RewardSettings):
        return reading
    fused = fused_bytes(shape, half=half, adapted=settings.adapter is not None, quantize=settings.quantize)
    writing = writing_bytes(
        shape, evaluation.rows, rows.longest_prompt, evaluation.max_new_tokens, half=half, mean_prompt=rows.prompt
    )
    return max(reading, fused + writing)


def _reference(learner: Learner, rows: Rows, evaluation: EvaluationSettings) -> float:
    """The checkpoint that a dpo stage starts from, opened once more when it is over, and replies read by it."""
    settings, shape = learner.settings, learner.shape
    if not isinstance(settings, DpoSettings):
        return 0.0
    tokens = evaluation.rows * (rows.prompt + evaluation.max_new_tokens)
    share = evaluation.max_new_tokens / (rows.prompt + evaluation.max_new_tokens)
    opened = frozen_bytes(shape, settings.quantize, half=learner.half)
    return opened + reading_bytes(shape, tokens, share, half=learner.half)
