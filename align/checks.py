"""Every error of a recipe that can be found without training: data, kinds of rows, models, rewards, templates, lengths."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from align.critique.endpoint import Endpoint
from align.data.examples import Document, Example, Message, Preference
from align.data.prepare import prepare
from align.data.prepared import PreparedData
from align.errors import AlignError
from align.launch.job import check_launch
from align.model_checks import check_weights
from align.recipe.critique_settings import CritiqueSettings, EndpointCritic
from align.recipe.graph import topological_order
from align.recipe.outputs import outputs_in
from align.recipe.ppo_settings import FunctionReward, ModelReward, PpoSettings
from align.recipe.settings import DpoSettings, KtoLoss, Recipe, SigmoidLoss, TrainingSettings

if TYPE_CHECKING:
    from align.constitution import Constitution
    from align.judge import Judge
    from align.origins import Workshop
    from align.stages.encoding import Desk

ROWS = {
    "pretrain": ("text",),
    "sft": ("conversation", "text"),
    "reward": ("preference",),
    "dpo": ("preference",),
    "ppo": ("prompt",),
}


@dataclass
class DataCheck:
    """What became of one data set, and of its rows under the length policy of each stage that trains on it."""

    name: str
    report: dict[str, Any]
    stages: dict[str, dict[str, int]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {"name": self.name, "report": self.report, "stages": self.stages}


def check_recipe(workshop: Workshop) -> list[DataCheck]:
    """Open and check all that the recipe names. Raises AlignError for the first thing that is wrong."""
    recipe = workshop.recipe
    check_loggers(recipe.log_to)
    check_launch(workshop, list(recipe.stages))
    workshop.template()
    workshop.judge()
    names = dict.fromkeys(name for stage in topological_order(recipe) for name in workshop.data_names(stage))
    there = [name for name in names if not outputs_in(recipe, name)]
    prepared = {name: prepare(name, recipe.data, folder=workshop.folder, seed=recipe.seed) for name in there}
    found = {name: DataCheck(name, data.report.as_dict()) for name, data in prepared.items()}
    for name in topological_order(recipe):
        stage = recipe.stages[name]
        check_weights(workshop, name)
        check_critique(workshop, name, prepared)
        check_parts(workshop, name)
        if isinstance(stage, TrainingSettings) and stage.data in prepared:
            check_rows(name, stage, prepared[stage.data])
            check_ppo(workshop, name, prepared)
            found[stage.data].stages[name] = _lengths(workshop, name, stage, prepared[stage.data])
    return list(found.values())


def runs_foreign_code(recipe: Recipe) -> bool:
    """Whether a check runs Python that is not ours, which may need all that can be imported."""
    stages = [stage for stage in recipe.stages.values() if isinstance(stage, PpoSettings)]
    terms = [term for stage in stages for term in (*stage.reward, *stage.watch)]
    return recipe.trust_remote_code or any(isinstance(term, FunctionReward) for term in terms)


def check_rows(name: str, stage: TrainingSettings, data: PreparedData) -> None:
    """Raises AlignError when a data set has rows that a stage cannot use, or none to train on."""
    wanted: Sequence[str] = ROWS[stage.kind]
    if isinstance(stage, DpoSettings) and isinstance(stage.loss, KtoLoss):
        wanted = ("rated", "preference")
    if stage.kind == "ppo" and data.kind not in ("prompt", "text"):
        raise AlignError(
            f"stage '{name}' (ppo) needs prompts; the rows of '{stage.data}' have answers, which would never be read",
            f"Set `format: prompts` for '{stage.data}' to use their prompts alone.",
        )
    if data.kind not in wanted:
        raise AlignError(
            f"stage '{name}' ({stage.kind}) cannot train on data set '{stage.data}': its rows are of kind '{data.kind}'",
            f"It needs rows of kind {' or '.join(wanted)}.",
        )
    if not data.train:
        raise AlignError(
            f"data set '{stage.data}' has no training rows ({data.report.rows_read} read, {len(data.test)} held out)",
            "Lower test_fraction, or name a data set with more rows." if data.test else "Name a data set with rows.",
        )
    if isinstance(stage, DpoSettings) and not isinstance(stage.loss, SigmoidLoss) and any(map(_soft, data.train)):
        raise AlignError(
            f"data set '{stage.data}' has soft labels (probability), and loss '{stage.loss.kind}' of stage '{name}' "
            "cannot use them",
            "Use loss: sigmoid, or remove the column.",
        )


def check_parts(workshop: Workshop, name: str) -> None:
    """Raises AlignError for a mixture that waits for another stage's data, and whose given parts a stage cannot use."""
    stage, recipe = workshop.stage(name), workshop.recipe
    mixture = recipe.data.get(stage.data) if isinstance(stage, TrainingSettings) else None
    if not isinstance(stage, TrainingSettings) or mixture is None or not workshop.unmade(stage.data):
        return
    for part in mixture.mix:
        if not outputs_in(recipe, part.data):
            data = prepare(part.data, recipe.data, folder=workshop.folder, seed=recipe.seed)
            check_rows(name, stage.model_copy(update={"data": part.data}), data)


def _soft(example: Example) -> bool:
    return isinstance(example, Preference) and example.probability not in (None, 1.0)


def _lengths(workshop: Workshop, name: str, stage: TrainingSettings, data: PreparedData) -> dict[str, int]:
    """Length report of a stage's training rows under the tokenizer that its parent has or will have."""
    desk = _desk(workshop, name, stage)
    if isinstance(stage, PpoSettings):
        return _prompt_lengths(name, stage, desk, data)
    try:
        desk.rows(data.train, "training")
        lengths = desk.encoder.lengths.as_dict()
        desk.rows(data.test, "held-out")
    except AlignError as error:
        path = workshop.recipe.data[stage.data].path
        error.message = f"stage '{name}': {f'{path}: ' if path else ''}{error.message}"
        raise
    return lengths


def check_loggers(log_to: Sequence[str]) -> None:
    """Raises AlignError when a logger that the recipe asks for is not installed."""
    missing = [name for name in log_to if importlib.util.find_spec(name) is None]
    if missing:
        raise AlignError(f"log_to: {missing[0]} is not installed", f"pip install {missing[0]}, or leave it out.")


def check_start(workshop: Workshop, name: str, prepared: Mapping[str, PreparedData]) -> None:
    """Raises AlignError when a stage's lengths or template do not suit the model that the chain starts from, or weights that
    are there already are not finite."""
    check_weights(workshop, name)
    stage = workshop.stage(name)
    if isinstance(stage, TrainingSettings):
        desk = _desk(workshop, name, stage)
        if isinstance(stage, PpoSettings):
            _prompt_lengths(name, stage, desk, prepared[stage.data])


def check_ppo(workshop: Workshop, name: str, prepared: Mapping[str, PreparedData]) -> None:
    """Raises AlignError for an engine or a reward of a ppo stage that is not there, or cannot reward its prompts.

    Models that this recipe makes, and prompts that are too long for a reward model, are seen when the stage begins.
    """
    stage = workshop.stage(name)
    if not isinstance(stage, PpoSettings):
        return
    from align.rewards.total import build_rewards

    if stage.engine == "vllm" and "vllm" not in sys.modules and importlib.util.find_spec("vllm") is None:
        raise AlignError(f"stage '{name}': vllm is not installed", "pip install vllm, or set engine: local.")
    workshop.reward_points(name, {})
    data, asked = prepared[stage.data], workshop.recipe.evaluation.prompts
    held_out = prepared[asked].test if asked else data.test
    questions = [row for row in (*data.train, *held_out) if not isinstance(row, Document)]
    terms = [term for term in (*stage.reward, *stage.watch) if not isinstance(term, ModelReward)]
    try:
        build_rewards(terms, models={}, judges=workshop.judges(name)).check(questions)
    except AlignError as error:
        error.message = f"stage '{name}': {error.message}"
        raise


def check_critique(workshop: Workshop, name: str, prepared: Mapping[str, PreparedData]) -> None:
    """Raises AlignError for a critique stage whose constitution, critic or prompts are not as they have to be."""
    stage = workshop.stage(name)
    if not isinstance(stage, CritiqueSettings):
        return
    constitution = workshop.constitution(name)
    assert constitution is not None, "a critique stage names one"
    judge = next(iter(workshop.judges(name).values()), None)
    if judge is not None:
        check_judge_critic(name, judge, constitution)
    workshop.critic_point(name, {})
    if isinstance(stage.critic, EndpointCritic):
        with Endpoint.open(stage.critic) as endpoint:
            endpoint.check()
            if stage.samples or (stage.revisions and stage.check_revisions):  # a server may give no log-probabilities
                endpoint.option_logps((Message("user", "Answer with A or B."),), constitution.options)
    _check_room(workshop, name, stage)
    data = prepared[stage.data]
    if not any(not isinstance(row, Document) for row in data.train):
        raise AlignError(
            f"stage '{name}' (critique) needs prompts; data set '{stage.data}' has none ({len(data.train)} rows of kind "
            f"'{data.kind}')",
            "Name a data set of prompts, conversations or preferences.",
        )


def _check_room(workshop: Workshop, name: str, stage: CritiqueSettings) -> None:
    from align.stages.encoding import context_of

    start = workshop.starting_point(name, {}) or workshop.model
    context = context_of(start.source)
    if stage.max_new_tokens >= context:
        raise AlignError(
            f"stage '{name}': max_new_tokens is {stage.max_new_tokens} and the model's context is {context}",
            "A prompt and its answer have to fit into it; lower max_new_tokens.",
        )


def check_judge_critic(name: str, judge: Judge, constitution: Constitution) -> None:
    """Raises AlignError when a judge that is to criticise does not know all principles of the constitution."""
    known = {principle.id for principle in judge.rules.principles}
    unknown = [principle.id for principle in constitution.principles if principle.id not in known]
    if unknown:
        raise AlignError(
            f"stage '{name}': the judge that is its critic has no rule for principle '{unknown[0]}'",
            f"Its principles: {', '.join(sorted(known)) or 'none'}. Give it one of that id, or take another critic.",
        )


def _desk(workshop: Workshop, name: str, stage: TrainingSettings) -> Desk:
    """What encodes the rows of a stage; on the recipe's model where its start has not been made yet."""
    from align.stages.encoding import Desk

    origin, home = workshop.starting_point(name, {}) or workshop.model, workshop.registry.home
    template = workshop.recipe.template
    try:
        return Desk.open(stage, origin.source, workshop.template(), home / "cache" if home.is_dir() else None)
    except AlignError as error:
        read = f"model {origin.name}" + (f", template {workshop.folder / template}" if template else "")
        error.message = f"stage '{name}' ({read}): {error.message}"
        raise


def _prompt_lengths(name: str, stage: PpoSettings, desk: Desk, data: PreparedData) -> dict[str, int]:
    """Length report of a ppo stage's prompts. Raises AlignError when none of them leaves room for a response."""
    from align.ppo.encoding import encoded_prompts

    longest, what = desk.max_length, "the model's context" if desk.max_length == desk.context else "max_length"
    if stage.max_new_tokens >= longest:
        raise AlignError(
            f"stage '{name}': max_new_tokens is {stage.max_new_tokens} and {what} is {longest}",
            "A prompt and its response have to fit into it; lower max_new_tokens.",
        )
    questions = [row for row in data.train if not isinstance(row, Document)]
    try:
        return encoded_prompts(questions, desk.encoder, stage, longest)[1]
    except AlignError as error:
        error.message = f"stage '{name}': data set '{stage.data}': {error.message}"
        raise
