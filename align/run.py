"""The whole story: plan a stage, resolve its inputs, call it, record what came out, and so on down the chain.

A stage gets checked paths and values and writes into an empty folder; only this file speaks to the registry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.checks import check_loggers, check_ppo, check_rows, check_start
from align.data.examples import Document, Question
from align.data.prepared import DataReport, PreparedData
from align.data.split import without_questions_of
from align.origins import Origin, Workshop, library_versions
from align.plan import PlannedStage, plan, planned_stage
from align.progress import Progress
from align.recipe.file import resolved
from align.recipe.graph import needed
from align.recipe.ppo_settings import ModelReward, PpoSettings
from align.recipe.settings import Stage, TrainingSettings
from align.registry.artifacts import disk_errors_explained
from align.registry.hashing import sha256_file
from align.registry.records import CheckpointRecord, DataUse
from align.stages.stage import Inputs, RewardInput

if TYPE_CHECKING:
    from align.registry.run import Run

STAGES = {  # kind of a stage -> the module whose `run` makes it; imported when it is needed, since it brings torch
    "pretrain": "align.stages.sft",
    "sft": "align.stages.sft",
    "reward": "align.stages.reward",
    "dpo": "align.stages.dpo",
    "ppo": "align.stages.ppo",
    "merge": "align.stages.merge",
}


@dataclass(frozen=True)
class Done:
    """One stage of a finished chain: what was planned, and the checkpoint there is now."""

    planned: PlannedStage
    checkpoint: CheckpointRecord


class RunProgress(Progress):
    """Passes everything on to the watcher, and keeps metrics and notes with the run."""

    def __init__(self, watcher: Progress, run: Run) -> None:
        self.watcher, self.run = watcher, run
        self.bar = watcher.bar  # type: ignore[method-assign]

    def note(self, text: str) -> None:
        self.run.log(text)
        self.watcher.note(text)

    def metrics(self, step: int, values: Any) -> None:
        self.run.log_metrics(step, values)

    def rewind(self, step: int) -> None:
        self.run.truncate_metrics(step)


def run_recipe(
    workshop: Workshop, progress: Progress, stages: Sequence[str] = (), force: Sequence[str] = ()
) -> list[Done]:
    """Make the named stages (all, when none is named) and all they need; what is unchanged is reused.

    Raises AlignError before anything is trained for whatever is wrong with recipe, data, model or judge.
    """
    order = needed(workshop.recipe, list(stages) or list(workshop.recipe.stages))
    needed(workshop.recipe, list(force))  # a forced stage that does not exist is refused
    for run_id in workshop.registry.recover():
        progress.note(f"run {run_id} had finished when it was killed; its result is registered now")
    names = dict.fromkeys(name for stage in order for name in workshop.data_names(stage))
    prepared = {name: workshop.data(name)[1] for name in names}
    for name in order:
        check_rows_of(workshop, name, prepared)
    check_loggers(workshop.recipe.log_to)
    workshop.judge()
    for entry in plan(workshop, stages, force):
        if entry.made is None:
            check_start(workshop, entry.name, prepared)
            check_ppo(workshop, entry.name, prepared)
    made: dict[str, CheckpointRecord] = {}
    done = []
    for name in order:
        planned = planned_stage(workshop, name, made, forced=name in force)
        progress.note(f"{workshop.full_name(name)}: {planned.action} ({planned.why})")
        if planned.made is None:
            inputs = _gathered(workshop, name, made)
            made[name] = _execute(workshop, name, inputs, prepared, progress, forced=name in force)
        else:
            made[name] = _named(workshop, name, planned.made)
        done.append(Done(planned, made[name]))
    return done


@dataclass(frozen=True)
class _Weights:
    """The checkpoints that a stage works on: where it starts, and the reward models that it is scored with."""

    start: Origin
    rewards: Mapping[str, Origin]

    def parents(self, settings: Stage) -> list[str]:
        """Ids of what the stage's weights come from: its start, then the reward models that it learns from."""
        terms = settings.reward if isinstance(settings, PpoSettings) else []
        learnt = [self.rewards[term.from_].id for term in terms if isinstance(term, ModelReward)]
        return list(dict.fromkeys([self.start.id, *learnt]))

    def as_inputs(self) -> dict[str, Any]:
        """Names and ids, as a run records them."""
        rewards = {name: origin.id for name, origin in self.rewards.items()}
        return {"parent": self.start.name, "parent_id": self.start.id, **({"rewards": rewards} if rewards else {})}


def _gathered(workshop: Workshop, name: str, made: Mapping[str, CheckpointRecord]) -> _Weights:
    origin, rewards = workshop.starting_point(name, made), workshop.reward_points(name, made)
    assert origin is not None, "stages before this one have just been made"
    assert rewards is not None, "stages before this one have just been made"
    return _Weights(origin, rewards)


def _named(workshop: Workshop, name: str, reused: CheckpointRecord) -> CheckpointRecord:
    """A reused checkpoint as what this stage's name stands for, whatever was made under that name since, or under which."""
    registry, full = workshop.registry, workshop.full_name(name)
    if registry.knows(full) and registry.checkpoint(full).number == reused.number:
        return reused
    return registry.name_again(reused, full)


def _execute(
    workshop: Workshop,
    name: str,
    weights: _Weights,
    prepared: dict[str, PreparedData],
    progress: Progress,
    *,
    forced: bool,
) -> CheckpointRecord:
    """Run one stage and register what it made; a run of the same key that was stopped goes on, unless forced anew."""
    settings, registry = workshop.stage(name), workshop.registry
    ingredients = workshop.ingredients(name, weights.start, weights.rewards)
    key, uses = workshop.key(name, weights.start, weights.rewards), data_uses(workshop, name)
    stopped = None if forced else registry.resumable(key)
    begun = (
        registry.resume_run(stopped.id)
        if stopped
        else registry.begin_run(
            recipe=workshop.recipe.name,
            stage=name,
            kind=settings.kind,
            key=key,
            settings={**ingredients, "recipe": resolved(workshop.recipe), "folder": str(workshop.folder)},
            inputs={**weights.as_inputs(), "data": {use.name: use.id for use in uses}},
            seed=workshop.seed(name),
        )
    )
    with begun as run:
        inputs = _inputs(workshop, name, weights, prepared, run)
        stage = import_module(STAGES[settings.kind])
        with disk_errors_explained(run.work):
            outcome = stage.run(settings, inputs, run.artifact, RunProgress(progress, run))
        return run.finish_checkpoint(
            name=workshop.full_name(name),
            kind=outcome.kind,
            parents=weights.parents(settings),
            data=uses,
            template_sha256=outcome.template_sha256,
            tokenizer_sha256=_tokenizer_sha256(run.artifact),
            metrics={**outcome.metrics, "lengths": outcome.lengths} if outcome.lengths else outcome.metrics,
            samples=outcome.samples,
            versions=library_versions(),
        )


def _tokenizer_sha256(folder: Path) -> str | None:
    """Hash of a checkpoint's tokenizer file: two checkpoints with the same one read a text alike."""
    file = folder / "tokenizer.json"
    return sha256_file(file) if file.is_file() else None


def _inputs(
    workshop: Workshop,
    name: str,
    weights: _Weights,
    prepared: dict[str, PreparedData],
    run: Run,
) -> Inputs:
    settings, recipe = workshop.stage(name), workshop.recipe
    data = (
        prepared[settings.data]
        if isinstance(settings, TrainingSettings)
        else PreparedData("none", [], [], DataReport())
    )
    asked = recipe.evaluation.prompts
    return Inputs(
        parent=weights.start.source,
        parent_id=weights.start.id,
        data=data,
        questions=_questions(prepared[asked] if asked else data, data, run),
        judge=workshop.judge(),
        template=workshop.template(),
        seed=workshop.seed(name),
        evaluation=recipe.evaluation,
        work=run.work / "state",
        cache=workshop.registry.home / "cache",
        log_to=recipe.log_to,
        rewards={name: RewardInput(origin.source, origin.id) for name, origin in weights.rewards.items()},
        judges=workshop.judges(name),
    )


def data_uses(workshop: Workshop, name: str) -> list[DataUse]:
    """The registered data set that a stage trains on; questions that it is only measured on are not among them."""
    stage = workshop.stage(name)
    if not isinstance(stage, TrainingSettings):
        return []
    record = workshop.data(stage.data)[0]
    return [DataUse(stage.data, record.id, int(record.info.get("train_rows", 0)))]


def check_rows_of(workshop: Workshop, name: str, prepared: dict[str, PreparedData]) -> None:
    """Raises AlignError when a stage cannot use the rows of its data set; before anything is trained."""
    stage = workshop.stage(name)
    if isinstance(stage, TrainingSettings):
        check_rows(name, stage, prepared[stage.data])


def _questions(asked: PreparedData, trained: PreparedData, run: Run) -> list[Question]:
    """The held-out examples that can be answered, without those whose question stands in the rows trained on."""
    apart = asked.test if asked is trained else without_questions_of(trained.train, asked.test)
    if len(apart) < len(asked.test):
        run.log(f"{len(asked.test) - len(apart)} held-out questions are not asked: this stage trains on them")
    return [example for example in apart if not isinstance(example, Document)]
