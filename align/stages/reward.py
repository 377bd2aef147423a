"""A reward model from preference pairs, saved as a plain sequence classifier with one label."""

from __future__ import annotations

from pathlib import Path

from align.errors import AlignError
from align.evaluation.numbers import accuracy_change, as_metrics, scored_numbers
from align.models.loading import load_reward
from align.models.merging import materialize
from align.models.saving import save_checkpoint
from align.progress import Progress
from align.recipe.settings import RewardSettings
from align.rollout.scoring import pair_rewards
from align.stages.encoding import Desk
from align.stages.objectives import RewardLoss
from align.stages.stage import Inputs, Outcome
from align.trainer import Task, train


def run(settings: RewardSettings, inputs: Inputs, folder: Path, progress: Progress) -> Outcome:
    """Train on the pairs of `inputs.data`. `before` is the untrained head: chance, give or take.

    A policy's adapter cannot carry a second head, so such a parent is merged first, in the stage's own folder. A new
    adapter would then rest on a base that no one keeps: that is refused.
    """
    if settings.adapter and inputs.parent.kind == "adapter":
        raise AlignError(
            "a reward adapter cannot start from a policy's adapter: its base would be a model that is not kept",
            "Put a merge stage between, or leave `adapter:` out.",
        )
    parent = inputs.parent
    desk = Desk.open(settings, parent, inputs.template, inputs.cache)
    pairs = desk.rows(inputs.data.train, "training", progress)
    lengths = desk.encoder.lengths.as_dict()
    held_out = desk.rows(inputs.data.test, "held-out", progress)
    model = load_reward(
        parent if parent.is_reward else materialize(parent, inputs.work / "merged"),
        quantize=settings.quantize,
        adapter=settings.adapter,
        trainable=True,
        tokenizer=desk.tokenizer,
        precision=settings.precision,
        seed=inputs.seed,
        gradient_checkpointing=settings.gradient_checkpointing,
    )
    before = pair_rewards(model, held_out, progress=progress)
    objective = RewardLoss(centering=settings.centering)
    measured = held_out[: inputs.evaluation.rows]
    task = Task(model, objective, pairs, measured, settings, inputs.seed, inputs.work, inputs.log_to)
    trained = train(task, progress)
    after = pair_rewards(model, held_out, progress=progress)
    save_checkpoint(model, desk.tokenizer, folder)
    return Outcome(
        kind="adapter-reward" if settings.adapter or parent.kind == "adapter-reward" else "reward",
        template_sha256=desk.template_sha256,
        metrics={
            **as_metrics(scored_numbers(before, held_out, seed=inputs.seed), "before."),
            **as_metrics(scored_numbers(after, held_out, seed=inputs.seed), "after."),
            **as_metrics(accuracy_change(before, after, seed=inputs.seed), "change."),
            **trained.as_metrics(),
        },
        lengths=lengths,
    )
