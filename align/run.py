"""The whole story: plan a stage, resolve its inputs, call it, record what came out, and so on down the chain.

A stage gets checked paths and values and writes into an empty folder; only this file speaks to the registry.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from align.checks import check_critique, check_loggers, check_parts, check_ppo, check_rows, check_start
from align.data.examples import Question
from align.data.prepared import DataReport, PreparedData, write_prepared
from align.data.split import without_questions_of
from align.errors import AlignError, StageFailed
from align.fitting import begun_with
from align.launch.job import check_launch, launched, shared
from align.model_checks import stage_warnings
from align.origins import Weights, Workshop, library_versions
from align.plan import PlannedStage, output_key, plan, planned_stage
from align.products import Made, Products
from align.progress import Progress
from align.recipe.critique_settings import (
    CheckpointCritic,
    CritiqueSettings,
    EndpointCritic,
    JudgeCritic,
    SelfCritic,
)
from align.recipe.file import resolved
from align.recipe.graph import needed
from align.recipe.outputs import outputs_in
from align.recipe.ppo_settings import ModelReward, PpoSettings
from align.recipe.rounds import round_of
from align.recipe.settings import Stage, TrainingSettings
from align.registry.artifacts import disk_errors_explained
from align.registry.hashing import sha256_file
from align.registry.records import CheckpointRecord, DataUse, StageData
from align.registry.run import NewData
from align.signs import signs
from align.stages.stage import DataOutcome, Inputs, RewardInput

if TYPE_CHECKING:
    from align.models.source import Source
    from align.registry.run import Run
    from align.stages.critique import CriticParts

STAGES = {  # kind of a stage -> the module whose `run` makes it; imported when it is needed, since it brings torch
    "pretrain": "align.stages.sft",
    "sft": "align.stages.sft",
    "reward": "align.stages.reward",
    "dpo": "align.stages.dpo",
    "ppo": "align.stages.ppo",
    "critique": "align.stages.critique",
    "merge": "align.stages.merge",
}


@dataclass(frozen=True)
class Done:
    """One stage of a finished chain: what was planned, and what there is now; None: it was skipped."""

    planned: PlannedStage
    made: Made | None

    @property
    def checkpoint(self) -> CheckpointRecord:
        """What a stage that makes weights has made."""
        assert isinstance(self.made, CheckpointRecord), f"stage '{self.planned.name}' made no checkpoint"
        return self.made


class RunProgress(Progress):
    """Passes everything on to the watcher, keeps metrics and notes with the run, and says when they look wrong."""

    def __init__(self, watcher: Progress, run: Run, settings: Stage) -> None:
        self.watcher, self.run, self.settings = watcher, run, settings
        self._log: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)
        self._said: set[str] = set()
        self.bar = watcher.bar  # type: ignore[method-assign]

    def note(self, text: str) -> None:
        self.run.log(text)
        self.watcher.note(text)

    def metrics(self, step: int, values: Any) -> None:
        self.run.log_metrics(step, values)
        for name, value in values.items():
            self._log[name].append((step, value))
        for sign, sentence in signs(self.settings.kind, self.settings.model_dump(), self._log).items():
            if sign not in self._said:
                self._said.add(sign)
                self.note(f"warning: {sentence}")

    def rewind(self, step: int) -> None:
        self.run.truncate_metrics(step)


def run_recipe(
    workshop: Workshop, progress: Progress, stages: Sequence[str] = (), force: Sequence[str] = ()
) -> list[Done]:
    """Make the named stages (all, when none is named) and all they need; what is unchanged is reused.

    Raises AlignError before anything is trained for whatever is wrong with recipe, data, model or judge.
    """
    order = needed(workshop.recipe, list(stages) or list(workshop.recipe.stages))
    for run_id in workshop.registry.recover():
        progress.note(f"run {run_id} had finished when it was killed; its result is registered now")
    checked_plan(workshop, stages, force)
    register_data(workshop, order)
    products = Products(workshop)
    done = []
    for name in order:
        forced = name in force
        planned = planned_stage(workshop, name, products, forced=forced)
        progress.note(f"{workshop.full_name(name)}: {planned.action} ({planned.why})")
        if planned.action in ("run", "resume"):
            products.add(name, _made(workshop, name, products, progress, forced=forced))
        elif isinstance(planned.made, CheckpointRecord):
            products.add(name, _named(workshop, name, planned.made))
        elif planned.made is not None:
            products.add(name, _named_data(workshop, name, planned.made))
        done.append(Done(planned, products.made(name)))
    return done


def checked_plan(workshop: Workshop, stages: Sequence[str] = (), force: Sequence[str] = ()) -> list[PlannedStage]:
    """As `plan`. Raises AlignError for all that can be refused before anything is made."""
    planned = plan(workshop, stages, force)
    _check(workshop, [entry.name for entry in planned], planned)
    return planned


def _check(workshop: Workshop, order: Sequence[str], planned: Sequence[PlannedStage]) -> None:
    prepared = {data: workshop.prepared(data) for data in _given_data(workshop, order)}
    going = [entry.name for entry in planned if entry.action in ("run", "resume")]
    for name in going:
        check_rows_of(workshop, name, prepared)
    check_loggers(workshop.recipe.log_to)
    check_launch(workshop, going)
    workshop.judge()
    for name in going:
        check_start(workshop, name, prepared)
        check_ppo(workshop, name, prepared)
        check_critique(workshop, name, prepared)
        check_parts(workshop, name)


def register_data(workshop: Workshop, order: Sequence[str]) -> None:
    """Makes the registry, where it is missing, and puts the data that is read into it. After all checks: what is refused
    leaves no trace."""
    workshop.registry.make()
    for data in _given_data(workshop, order):
        workshop.data(data)


def _given_data(workshop: Workshop, order: Sequence[str]) -> list[str]:
    """Data sets that the stages read and that no stage is still to make."""
    return list(dict.fromkeys(one for stage in order for one in workshop.data_names(stage) if not workshop.unmade(one)))


def _made(workshop: Workshop, name: str, products: Products, progress: Progress, *, forced: bool) -> Made:
    """Runs a stage whose parents and data have been made."""
    weights = workshop.weights(name, products.checkpoints)
    assert weights is not None, "stages before this one have just been made"
    prepared = {data: workshop.data(data)[1] for data in workshop.data_names(name)}
    check_rows_of(workshop, name, prepared)
    return _execute(workshop, name, weights, prepared, progress, forced=forced)


def _parents(settings: Stage, weights: Weights) -> list[str]:
    """Ids of what the stage's weights come from: its start, then the reward models that it learns from."""
    terms = settings.reward if isinstance(settings, PpoSettings) else []
    learnt = [weights.rewards[term.from_].id for term in terms if isinstance(term, ModelReward)]
    return list(dict.fromkeys([weights.start.id, *learnt]))


def _as_inputs(weights: Weights) -> dict[str, Any]:
    """Names and ids, as a run records them."""
    rewards = {name: origin.id for name, origin in weights.rewards.items()}
    critic = {"critic": weights.critic.name, "critic_id": weights.critic.id} if weights.critic else {}
    start = {"parent": weights.start.name, "parent_id": weights.start.id}
    return {**start, **({"rewards": rewards} if rewards else {}), **critic}


def _named(workshop: Workshop, name: str, reused: CheckpointRecord) -> CheckpointRecord:
    """A reused checkpoint as what this stage's name stands for, whatever was made under that name since, or under which."""
    registry, full = workshop.registry, workshop.full_name(name)
    if registry.knows(full) and registry.checkpoint(full).number == reused.number:
        return reused
    return registry.name_again(reused, full)


def _named_data(workshop: Workshop, name: str, reused: StageData) -> StageData:
    """As `_named`, for the data sets that a stage made."""
    full = workshop.full_name(name)
    outputs = {}
    for output, record in reused.outputs.items():
        info = {**record.info, "stage": {**record.info["stage"], "name": full}}
        outputs[output] = workshop.registry.name_data_again(record, f"{full}.{output}", info)
    return StageData(outputs)


def _execute(
    workshop: Workshop,
    name: str,
    weights: Weights,
    prepared: dict[str, PreparedData],
    progress: Progress,
    *,
    forced: bool,
) -> Made:
    """Run one stage and register what it made; a run of the same key that was stopped goes on, unless forced anew."""
    settings, registry = workshop.stage(name), workshop.registry
    ingredients = workshop.ingredients(name, weights)
    key, uses = workshop.key(name, weights), data_uses(workshop, name)
    stopped = None if forced else registry.resumable(key)
    begun = (
        registry.resume_run(stopped.id)
        if stopped
        else registry.begin_run(
            recipe=workshop.recipe.name,
            stage=name,
            kind=settings.kind,
            key=key,
            settings={
                **ingredients,
                "recipe": resolved(workshop.written),
                "folder": str(workshop.folder),
                **launched(),
            },
            inputs={**_as_inputs(weights), "data": {use.name: use.id for use in uses}},
            seed=workshop.seed(name),
        )
    )
    with begun as run:
        inputs = _inputs(workshop, name, weights, prepared, run)
        module, heard = STAGES[settings.kind], RunProgress(progress, run, settings)
        for warning in stage_warnings(settings, weights):
            heard.note(f"warning: {warning}")
        settings = begun_with(workshop, name, heard.note)
        with disk_errors_explained(run.work), shared(workshop, name, module, inputs, heard):
            outcome = import_module(module).run(settings, inputs, run.artifact, heard)
            if isinstance(outcome, DataOutcome):
                return _recorded_data(workshop, name, run, outcome, key, {**ingredients, **_as_inputs(weights)})
        return run.finish_checkpoint(
            name=workshop.full_name(name),
            kind=outcome.kind,
            parents=_parents(settings, weights),
            data=uses,
            template_sha256=outcome.template_sha256,
            tokenizer_sha256=_tokenizer_sha256(run.artifact),
            metrics={**outcome.metrics, "lengths": outcome.lengths} if outcome.lengths else outcome.metrics,
            samples=outcome.samples,
            versions=_made_with(),
        )


def _recorded_data(
    workshop: Workshop, name: str, run: Run, outcome: DataOutcome, key: str, ingredients: Mapping[str, Any]
) -> StageData:
    """Data sets that a stage made, registered; what the stage says of itself stands with each of them.

    Raises StageFailed where it made no row; in a later round of a loop that only ends the loop.
    """
    place = round_of(workshop.recipe, name)
    if not any(prepared.train for prepared in outcome.outputs.values()) and (place is None or place[1] == 1):
        raise StageFailed(outcome.why_empty, "Other prompts, or another critic.")
    told = {
        "name": workshop.full_name(name), "kind": workshop.stage(name).kind, "template_sha256": outcome.template_sha256,
        "counts": outcome.counts, "metrics": outcome.metrics, "samples": outcome.samples,
        "ingredients": dict(ingredients), "versions": _made_with(),
    }  # fmt: skip
    new = []
    for output, prepared in outcome.outputs.items():
        folder = run.artifact / output
        write_prepared(prepared, folder)
        info = {**prepared.report.as_dict(), "stage": told}
        new.append(NewData(f"{workshop.full_name(name)}.{output}", output_key(key, output), folder, info))
    return StageData(dict(zip(outcome.outputs, run.finish_data(new), strict=True)))


def _made_with() -> dict[str, str]:
    """Versions, and what else of this process changes the last bits of numbers."""
    import torch

    from align.models.hardware import device

    return {**library_versions(), "threads": str(torch.get_num_threads()), "device": str(device())}


def _tokenizer_sha256(folder: Path) -> str | None:
    """Hash of a checkpoint's tokenizer file: two checkpoints with the same one read a text alike."""
    file = folder / "tokenizer.json"
    return sha256_file(file) if file.is_file() else None


def _inputs(
    workshop: Workshop,
    name: str,
    weights: Weights,
    prepared: dict[str, PreparedData],
    run: Run,
) -> Inputs:
    settings, recipe = workshop.stage(name), workshop.recipe
    data = (
        prepared[settings.data]
        if isinstance(settings, TrainingSettings | CritiqueSettings)
        else PreparedData("none", [], [], DataReport())
    )
    asked = workshop.asked(name)
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
        constitution=workshop.constitution(name),
        critic=weights.critic.source if weights.critic else None,
    )


def data_uses(workshop: Workshop, name: str) -> list[DataUse]:
    """The registered data set that a stage reads, and those of other stages in it; questions that it is only measured on
    are not among them."""
    stage = workshop.stage(name)
    if not isinstance(stage, TrainingSettings | CritiqueSettings):
        return []
    record = workshop.data(stage.data)[0]
    parts = record.info.get("parts") or {}
    made = [output for output in outputs_in(workshop.recipe, stage.data) if output != stage.data]
    return [
        DataUse(stage.data, record.id, int(record.info.get("train_rows", 0))),
        *(DataUse(output, workshop.data(output)[0].id, int(parts.get(output, 0))) for output in made),
    ]


def check_rows_of(workshop: Workshop, name: str, prepared: Mapping[str, PreparedData]) -> None:
    """Raises AlignError when a stage cannot use the rows of its data set, if that is there; before anything is trained."""
    stage = workshop.stage(name)
    if isinstance(stage, TrainingSettings) and stage.data in prepared:
        check_rows(name, stage, prepared[stage.data])


def _questions(asked: PreparedData, trained: PreparedData, run: Run) -> Sequence[Question]:
    """The held-out examples that can be answered, without those whose question stands in the rows trained on."""
    apart = asked.test if asked is trained else without_questions_of(trained.train, asked.test)
    if len(apart) < len(asked.test):
        run.log(f"{len(asked.test) - len(apart)} held-out questions are not asked: this stage trains on them")
    return [] if asked.kind == "text" else cast(Sequence[Question], apart)  # of one kind, all of them


def critic_of(workshop: Workshop, name: str) -> tuple[CriticParts, Source | None]:
    """The critic of a critique stage, to be asked without the stage, and the policy it writes with, if it has no model
    of its own. Raises AlignError where one of them is still to be made."""
    from align.stages.critique import CriticParts

    stage, constitution = workshop.stage(name), workshop.constitution(name)
    assert isinstance(stage, CritiqueSettings)
    assert constitution is not None, "a critique stage names one"
    products = Products(workshop)
    for need in needed(workshop.recipe, [name])[:-1]:
        planned_stage(workshop, need, products)
    policy = critic = None
    if isinstance(stage.critic, SelfCritic | JudgeCritic):
        policy = workshop.starting_point(name, products.checkpoints)
    elif isinstance(stage.critic, CheckpointCritic):
        critic = workshop.critic_point(name, products.checkpoints)
    if policy is None and critic is None and not isinstance(stage.critic, EndpointCritic):
        missing = stage.from_ if isinstance(stage.critic, SelfCritic | JudgeCritic) else stage.critic.from_
        raise AlignError(
            f"stage '{name}': its critic writes with '{missing}', which is still to be made",
            f"align run RECIPE --stage {missing}",
        )
    judges, source = workshop.judges(name), critic.source if critic else None
    parts = CriticParts(stage.critic, constitution, stage.max_new_tokens, judges, source)
    return parts, policy.source if policy else None
