"""The whole story: plan a stage, resolve its inputs, call it, record what came out, and so on down the chain.

A stage gets checked paths and values and writes into an empty folder; only this file speaks to the registry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.checks import check_loggers, check_rows, check_start
from align.data.examples import Document, Question
from align.data.prepared import DataReport, PreparedData
from align.data.split import without_questions_of
from align.judge import Judge
from align.origins import Origin, Workshop, library_versions
from align.plan import PlannedStage, plan, planned_stage
from align.progress import Progress
from align.recipe.file import resolved
from align.recipe.graph import needed
from align.recipe.settings import TrainingSettings
from align.registry.artifacts import disk_errors_explained
from align.registry.hashing import sha256_file
from align.registry.records import CheckpointRecord, DataUse
from align.stages.stage import Inputs

if TYPE_CHECKING:
    from align.registry.run import Run

STAGES = {  # kind of a stage -> the module whose `run` makes it; imported when it is needed, since it brings torch
    "pretrain": "align.stages.sft",
    "sft": "align.stages.sft",
    "reward": "align.stages.reward",
    "dpo": "align.stages.dpo",
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
    judge = workshop.judge()
    for entry in plan(workshop, stages, force):
        if entry.made is None:
            check_start(workshop, entry.name)
    made: dict[str, CheckpointRecord] = {}
    done = []
    for name in order:
        planned = planned_stage(workshop, name, made, forced=name in force)
        progress.note(f"{workshop.full_name(name)}: {planned.action} ({planned.why})")
        if planned.made is None:
            origin = workshop.starting_point(name, made)
            assert origin is not None, "stages before this one have just been made"
            made[name] = _execute(workshop, name, origin, prepared, judge, progress, forced=name in force)
        else:
            made[name] = _named(workshop, name, planned.made)
        done.append(Done(planned, made[name]))
    return done


def _named(workshop: Workshop, name: str, reused: CheckpointRecord) -> CheckpointRecord:
    """A reused checkpoint as what this stage's name stands for, whatever was made under that name since, or under which."""
    registry, full = workshop.registry, workshop.full_name(name)
    if registry.knows(full) and registry.checkpoint(full).number == reused.number:
        return reused
    return registry.name_again(reused, full)


def _execute(
    workshop: Workshop,
    name: str,
    origin: Origin,
    prepared: dict[str, PreparedData],
    judge: Judge | None,
    progress: Progress,
    *,
    forced: bool,
) -> CheckpointRecord:
    """Run one stage and register what it made; a run of the same key that was stopped goes on, unless forced anew."""
    settings, registry = workshop.stage(name), workshop.registry
    ingredients, uses = workshop.ingredients(name, origin), data_uses(workshop, name)
    stopped = None if forced else registry.resumable(workshop.key(name, origin))
    begun = (
        registry.resume_run(stopped.id)
        if stopped
        else registry.begin_run(
            recipe=workshop.recipe.name,
            stage=name,
            kind=settings.kind,
            key=workshop.key(name, origin),
            settings={**ingredients, "recipe": resolved(workshop.recipe), "folder": str(workshop.folder)},
            inputs={"parent": origin.name, "parent_id": origin.id, "data": {use.name: use.id for use in uses}},
            seed=workshop.seed(name),
        )
    )
    with begun as run:
        inputs = _inputs(workshop, name, origin, prepared, judge, run)
        stage = import_module(STAGES[settings.kind])
        with disk_errors_explained(run.work):
            outcome = stage.run(settings, inputs, run.artifact, RunProgress(progress, run))
        return run.finish_checkpoint(
            name=workshop.full_name(name),
            kind=outcome.kind,
            parents=[origin.id],
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
    origin: Origin,
    prepared: dict[str, PreparedData],
    judge: Judge | None,
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
        parent=origin.source,
        parent_id=origin.id,
        data=data,
        questions=_questions(prepared[asked] if asked else data, data, run),
        judge=judge,
        template=workshop.template(),
        seed=workshop.seed(name),
        evaluation=recipe.evaluation,
        work=run.work / "state",
        cache=workshop.registry.home / "cache",
        log_to=recipe.log_to,
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
