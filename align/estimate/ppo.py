"""Peak memory of a ppo stage: the roles' weights, with the larger of a round's collection and a step of learning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from align.estimate.activations import (
    FLOAT,
    HALF,
    trunk_bytes,
    working_bytes,
)
from align.estimate.asking import reading_bytes, writing_bytes
from align.estimate.logits import Head
from align.estimate.place import Place
from align.estimate.rows import Rows
from align.estimate.shape import Shape
from align.estimate.training import Learner
from align.estimate.weights import MOMENTS_BYTES, fused_bytes
from align.recipe.ppo_settings import GaeEstimator, PpoSettings
from align.recipe.settings import EvaluationSettings


@dataclass(frozen=True)
class Scorer:
    """A reward model of a ppo stage: its shape, and the bytes that its weights take beside the policy's."""

    shape: Shape
    bytes: float


@dataclass(frozen=True)
class Roles:
    """Who takes part. starts_adapted: the policy goes on with the adapter it starts from, a copy of which is the
    reference."""

    policy: Learner
    settings: PpoSettings
    scorers: Sequence[Scorer]
    starts_adapted: bool

    @property
    def value_kind(self) -> str | None:
        """What the value model is; None: there is none."""
        return value_kind(self.settings)

    @property
    def logits(self) -> Head:
        """How the policy's logits are turned into log-probabilities; for a bonus on their entropy autograd keeps them."""
        head = self.policy.logits
        return replace(head, plain=head.plain and self.settings.entropy_coefficient == 0)

    @property
    def reference(self) -> float:
        """Bytes of the reference, as far as it is not the policy's base."""
        adapter = self.settings.adapter
        if adapter is None:
            return self.policy.weights  # in float32, as what trains
        is_copy = self.starts_adapted or adapter.dora or adapter.init == "pissa"
        return FLOAT * self.policy.trained if is_copy else 0.0

    @property
    def value_trained(self) -> int:
        """Weights of the value model that train and are not the policy's."""
        kinds = {"adapter": self.policy.trained, "model": self.policy.shape.classifier_parameters}
        return kinds.get(self.value_kind or "", 0)

    @property
    def trained(self) -> int:
        """Weights that train."""
        return self.policy.trained + self.value_trained

    @property
    def weights(self) -> float:
        """Bytes of all weights."""
        scorers = sum(scorer.bytes for scorer in self.scorers)
        return self.policy.weights + self.reference + FLOAT * self.value_trained + scorers

    def learning(self, computed: float, predicted: float) -> float:
        """Bytes of a micro-batch: the activations of the policy, and of the value model at the same time."""
        policy = self.policy
        kept = trunk_bytes(
            policy.shape, policy.arithmetic, computed, checkpointing=self.settings.gradient_checkpointing
        )  # fmt: skip
        passes = 2 if self.value_kind in ("adapter", "model") else 1
        full = self.settings.adapter is None
        casts = HALF * self.trained if full and policy.half else 0.0
        table = FLOAT * policy.shape.table if full else 0.0
        logits = self.logits.kept(predicted) + self.logits.working(predicted)
        hidden = 2 * FLOAT * policy.shape.hidden * predicted
        block = working_bytes(policy.shape, computed, policy.arithmetic.width)
        return passes * kept + casts + table + max(hidden + logits, block)


def value_kind(settings: PpoSettings) -> str | None:
    """What the value model of a stage is; None: its estimator has none."""
    if not isinstance(settings.estimator, GaeEstimator):
        return None
    return {"auto": "adapter" if settings.adapter else "model"}.get(settings.value.kind, settings.value.kind)


def ppo_phases(roles: Roles, rows: Rows, evaluation: EvaluationSettings, place: Place) -> Mapping[str, float]:
    """Bytes of each phase, by name. Every response is taken to be as long as it may be."""
    settings, policy, shape = roles.settings, roles.policy, roles.policy.shape
    resident = place.libraries_bytes + roles.weights
    moments = MOMENTS_BYTES[settings.optimizer] * roles.trained
    half = policy.half and settings.adapter is not None
    fused = fused_bytes(shape, half=policy.half, adapted=settings.adapter is not None, quantize=settings.quantize)
    asked = max(
        writing_bytes(shape, count, rows.longest_prompt, tokens, half=half, mean_prompt=rows.prompt)
        for count, tokens in (
            (settings.rollouts, settings.max_new_tokens),
            (evaluation.rows, evaluation.max_new_tokens),
        )
    )
    length = rows.prompt + settings.max_new_tokens
    share = settings.max_new_tokens / length
    tokens = settings.rollouts * length
    looking = reading_bytes(shape, min(tokens, settings.batch_tokens), share, half=policy.half)
    scoring = max((reading_bytes(one.shape, tokens, 0.0, half=policy.half) for one in roles.scorers), default=0.0)
    step = min(settings.batch_size, settings.rollouts) * length
    at_once = min(step, settings.batch_tokens)
    gradients = FLOAT * roles.trained
    learning = roles.learning(at_once, share * at_once)
    if step > settings.batch_tokens:
        learning = moments + gradients + place.spread(learning)
    else:
        learning = moments + max(learning, gradients)
    return {
        "writing": resident + moments + fused + asked,
        "scoring": resident + moments + max(looking, scoring),
        "learning": resident + learning,
    }
