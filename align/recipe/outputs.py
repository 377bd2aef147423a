"""Data sets that stages make: `stage.output`, as a training stage or a part of a mixture names them."""

from __future__ import annotations

from collections.abc import Iterator

from align.errors import did_you_mean
from align.recipe.critique_settings import OUTPUTS, CritiqueSettings, CritiqueWork, JudgeCritic
from align.recipe.objective_settings import DpoSettings, SigmoidLoss
from align.recipe.places import Problem
from align.recipe.settings import ConstitutionSettings, Recipe, TrainingSettings
from align.recipe.yaml_text import shown

Steps = tuple[str | int, ...]
LEARNS = {"sft": ("sft",), "reward": ("preferences",), "dpo": ("preferences",)}  # outputs that a kind of stage can use


def maker_of(recipe: Recipe, data: str) -> str | None:
    """The stage of the recipe that makes this data set; None: no stage does."""
    stage, dot, output = data.rpartition(".")
    return stage if dot and isinstance(recipe.stages.get(stage), CritiqueSettings) and output in OUTPUTS else None


def outputs_in(recipe: Recipe, data: str) -> list[str]:
    """What stages have to make before a data set is there: itself, or parts of the mixture that it is."""
    if maker_of(recipe, data):
        return [data]
    parts = recipe.data[data].mix if data in recipe.data else []
    return list(dict.fromkeys(output for part in parts for output in outputs_in(recipe, part.data)))


def output_problems(recipe: Recipe) -> Iterator[Problem]:
    """Outputs that a stage cannot learn from or does not make, and prompts that a stage would have to make first.

    For a recipe without cycles in `mix:`.
    """
    for name, stage in recipe.stages.items():
        place: Steps = ("stages", name)
        if isinstance(stage, TrainingSettings):
            for output in outputs_in(recipe, stage.data):
                data_place = (*place, type(stage).model_fields["data"].alias or "data")
                yield from _unusable(recipe, data_place, name, stage, output)
        elif isinstance(stage, CritiqueSettings | ConstitutionSettings) and outputs_in(recipe, stage.data):
            message = f"stage '{name}' cannot take its prompts from {shown(outputs_in(recipe, stage.data)[0])}."
            yield Problem((*place, "prompts"), message, "Name the prompts that the other stage started from.")
        if isinstance(stage, ConstitutionSettings):
            for index, part in enumerate(stage.mix):
                for output in outputs_in(recipe, part.data):
                    yield from _unusable(recipe, (*place, "mix", index, "data"), name, stage.train, output)
            if _makes_soft_labels(stage):
                yield from _needs_hard_labels((*place, "train", "loss"), name, stage.train, name)


def unknown_data(recipe: Recipe, place: Steps, data: str, *, made: bool) -> Iterator[Problem]:
    """The problem of a name that is no data set of the recipe; made: what a stage makes may stand there too."""
    if data in recipe.data or (made and maker_of(recipe, data)):
        return
    stage, _, _ = data.rpartition(".")
    if isinstance(recipe.stages.get(stage), CritiqueSettings):
        known = did_you_mean(data, [f"{stage}.{output}" for output in OUTPUTS]) if made else "Name one under `data:`."
        what = "makes no such data set" if made else "makes it, and it cannot be used here"
        yield Problem(place, f"{shown(data)}: stage '{stage}' {what}. {known}")
        return
    known = did_you_mean(data, recipe.data) if recipe.data else "Define it under `data:`."
    yield Problem(place, f"no data set {shown(data)} in this recipe. {known}")


def _unusable(recipe: Recipe, place: Steps, name: str, trained: TrainingSettings, output: str) -> Iterator[Problem]:
    """trained: what learns in stage `name` from the output that `place` names."""
    maker, _, what = output.rpartition(".")
    critique = recipe.stages[maker]
    assert isinstance(critique, CritiqueSettings), "only such a stage makes data"
    fitting = LEARNS.get(trained.kind, ())
    if what not in fitting:
        other = f"Use {maker}.{fitting[0]}." if fitting else "It needs a data set of the recipe."
        message = f"stage '{name}' ({trained.kind}) cannot train on '{output}': its rows are {OUTPUTS[what]}s."
        yield Problem(place, message, other)
    elif what == "sft" and not critique.revisions:
        yield Problem(place, f"'{output}' would be empty: stage '{maker}' has revisions: 0.", "Set it to 1 or more.")
    elif what == "preferences" and _makes_soft_labels(critique):
        yield from _needs_hard_labels(place, name, trained, maker)


def _makes_soft_labels(work: CritiqueWork) -> bool:
    exact = isinstance(work.critic, JudgeCritic) and work.panel == 1 and work.most_confident == 1
    return work.samples > 0 and not exact


def _needs_hard_labels(place: Steps, name: str, trained: TrainingSettings, maker: str) -> Iterator[Problem]:
    if isinstance(trained, DpoSettings) and not isinstance(trained.loss, SigmoidLoss):
        message = f"stage '{name}': loss '{trained.loss.kind}' cannot use the soft labels that stage '{maker}' makes of its samples."
        yield Problem(place, message, f"Use loss: sigmoid, or set samples: 0 in stage '{maker}'.")
