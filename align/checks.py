"""Every error of a recipe that can be found without training: data, kinds of rows, models, templates, lengths."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from align.data.examples import Example, Preference
from align.data.prepare import prepare
from align.data.prepared import PreparedData
from align.errors import AlignError
from align.recipe.graph import topological_order
from align.recipe.settings import DpoSettings, KtoLoss, SigmoidLoss, TrainingSettings

if TYPE_CHECKING:
    from align.origins import Workshop

ROWS = {
    "pretrain": ("text",),
    "sft": ("conversation", "text"),
    "reward": ("preference",),
    "dpo": ("preference",),
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
    workshop.template()
    workshop.judge()
    names = dict.fromkeys(name for stage in topological_order(recipe) for name in workshop.data_names(stage))
    prepared = {name: prepare(name, recipe.data, folder=workshop.folder, seed=recipe.seed) for name in names}
    found = {name: DataCheck(name, data.report.as_dict()) for name, data in prepared.items()}
    for name in topological_order(recipe):
        stage = recipe.stages[name]
        if isinstance(stage, TrainingSettings):
            check_rows(name, stage, prepared[stage.data])
            found[stage.data].stages[name] = _lengths(workshop, name, stage, prepared[stage.data])
    return list(found.values())


def check_rows(name: str, stage: TrainingSettings, data: PreparedData) -> None:
    """Raises AlignError when a data set has rows that a stage cannot use, or none to train on."""
    wanted: Sequence[str] = ROWS[stage.kind]
    if isinstance(stage, DpoSettings) and isinstance(stage.loss, KtoLoss):
        wanted = ("rated", "preference")
    if data.kind not in wanted:
        raise AlignError(
            f"stage '{name}' ({stage.kind}) cannot train on data set '{stage.data}': its rows are of kind '{data.kind}'",
            f"It needs rows of kind {' or '.join(wanted)}.",
        )
    if not data.train:
        raise AlignError(
            f"data set '{stage.data}' has no training rows ({data.report.rows_read} read, {len(data.test)} held out)",
            "Lower test_fraction, or name a data set with more rows.",
        )
    if isinstance(stage, DpoSettings) and not isinstance(stage.loss, SigmoidLoss) and any(map(_soft, data.train)):
        raise AlignError(
            f"data set '{stage.data}' has soft labels (probability), and loss '{stage.loss.kind}' of stage '{name}' "
            "cannot use them",
            "Use loss: sigmoid, or remove the column.",
        )


def _soft(example: Example) -> bool:
    return isinstance(example, Preference) and example.probability not in (None, 1.0)


def _lengths(workshop: Workshop, name: str, stage: TrainingSettings, data: PreparedData) -> dict[str, int]:
    """Length report of a stage's training rows under the tokenizer that its parent has or will have."""
    from align.stages.encoding import Desk

    origin = workshop.starting_point(name, {}) or workshop.model
    desk = Desk.open(stage, origin.source, workshop.template())
    desk.rows(data.train, "training")
    lengths = desk.encoder.lengths.as_dict()
    desk.rows(data.test, "held-out")
    return lengths


def check_loggers(log_to: Sequence[str]) -> None:
    """Raises AlignError when a logger that the recipe asks for is not installed."""
    missing = [name for name in log_to if importlib.util.find_spec(name) is None]
    if missing:
        raise AlignError(f"log_to: {missing[0]} is not installed", f"pip install {missing[0]}, or leave it out.")


def check_start(workshop: Workshop, name: str) -> None:
    """Raises AlignError when a stage's max_length or template does not suit the model that the chain starts from."""
    from align.stages.encoding import Desk

    stage = workshop.stage(name)
    if isinstance(stage, TrainingSettings):
        origin = workshop.starting_point(name, {}) or workshop.model
        Desk.open(stage, origin.source, workshop.template())
