"""What the stages of a recipe will cost: the recipe, its model's config and a sample of its rows, no weights read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.data.prepare import prepare
from align.errors import AlignError
from align.estimate.critique import critique_bytes
from align.estimate.merging import merge_bytes
from align.estimate.place import Place, this_place
from align.estimate.ppo import Roles, Scorer, ppo_phases
from align.estimate.rows import UNKNOWN_TOKENS, CountTokens, Rows, counter, rows_like
from align.estimate.shape import Shape
from align.estimate.speed import critique_seconds, ppo_seconds, training_seconds
from align.estimate.training import Learner, training_phases
from align.estimate.weights import frozen_bytes
from align.launch.job import SEVERAL, launch_of
from align.parallel.crew import crew
from align.recipe.critique_settings import CritiqueSettings, EndpointCritic
from align.recipe.graph import adapter_stage, reward_references
from align.recipe.ppo_settings import PpoSettings
from align.recipe.settings import (
    DataSettings,
    EvaluationSettings,
    MergeSettings,
    RewardSettings,
    Stage,
    TrainingSettings,
)
from align.recipe.training_settings import AdapterSettings

if TYPE_CHECKING:
    from align.models.source import Source
    from align.origins import Workshop
    from align.registry.records import DataRecord

BFLOAT16_MIN_WIDTH = 256  # as models.hardware decides for precision: auto, without importing torch
SAMPLE_ROWS = 512
PIECE_BYTES = 2**20  # of a file, that are read at once
LONGEST_ROW = 2048  # tokens, as stages.encoding has it


@dataclass(frozen=True)
class Estimate:
    """Predicted peak memory in bytes and time in seconds of a stage; None where something is not known yet.

    Memory is that of one process, of `processes`; available_bytes: what such a process may use.
    """

    peak_memory_bytes: int | None
    seconds: float | None
    available_bytes: int | None = None
    processes: int = 1

    @property
    def fits(self) -> bool:
        """Whether what is predicted is there, as far as both are known."""
        need, room = self.peak_memory_bytes, self.available_bytes
        return need is None or room is None or need <= room


NOTHING = Estimate(0, 0)
UNKNOWN = Estimate(None, None)


def estimate(workshop: Workshop, name: str) -> Estimate:
    """What a stage will cost."""
    return estimator(workshop, name)(workshop.stage(name))


def estimator(workshop: Workshop, name: str) -> Callable[[Stage], Estimate]:
    """What a stage would cost with other settings than the recipe's: model and rows are looked at once."""
    settings = workshop.stage(name)
    start = _Start.of(workshop, name)
    if start is None or not isinstance(settings, TrainingSettings | CritiqueSettings | MergeSettings):
        return lambda _: UNKNOWN
    costing = _Costing(workshop, name, start, _place(workshop, settings))
    return costing.estimate


@dataclass(frozen=True)
class _Start:
    """What a stage starts from. adapter, quantize: of the adapter that sits on it already."""

    shape: Shape
    folder: Path
    context: int
    adapter: AdapterSettings | None
    quantize: str | None

    @classmethod
    def of(cls, workshop: Workshop, name: str) -> _Start | None:
        """None: the config says too little, or the model is not here."""
        first = name
        while (before := workshop.stage(first).from_) in workshop.recipe.stages:
            assert before is not None, "it is the name of a stage"
            first = before
        origin = workshop.starting_point(first, {}) or workshop.model
        folder = Path(origin.source.root.path)
        config = _config(folder)
        shape = Shape.of(config)
        if shape is None:
            return None
        adapter, quantize = _adapter_on(workshop, name, origin.source if first == name else None)
        context = config.get("text_config", config).get("max_position_embeddings") or LONGEST_ROW
        return cls(shape, folder, int(context), adapter, quantize)


@dataclass(frozen=True)
class _Costing:
    """A stage with all that does not depend on its numbers."""

    workshop: Workshop
    name: str
    start: _Start
    place: Place

    def estimate(self, settings: Stage) -> Estimate:
        """What the stage would cost with these settings."""
        peak, seconds = self._cost(settings)
        seconds = None if self.place.gpu else seconds
        return Estimate(int(peak), seconds, self.place.memory_bytes, self.place.processes)

    def _cost(self, settings: Stage) -> tuple[float, float | None]:
        shape, place, evaluation = self.start.shape, self.place, self.workshop.recipe.evaluation
        if isinstance(settings, MergeSettings):
            adapter = self.start.adapter
            weights = shape.adapter_parameters(adapter) if adapter else 0
            rows = self._known(self.workshop.asked(self.name), self.start.context)
            half = self._half("auto")
            return merge_bytes(shape, rows, place, quantize=self.start.quantize, adapter=weights, half=half), None
        if isinstance(settings, CritiqueSettings):
            return self._critique(settings, evaluation)
        assert isinstance(settings, TrainingSettings), "the other kinds of stages cost nothing"
        longest = min(settings.max_length or LONGEST_ROW, self.start.context)
        known = self.rows(settings.data, longest, cuts=settings.too_long == "cut" or settings.cut_prompt)
        rows = known or _unknown(settings.batch_size, longest)
        starts_adapted = settings.adapter is None and self.start.adapter is not None
        if starts_adapted:
            settings = settings.model_copy(update={"adapter": self.start.adapter, "quantize": self.start.quantize})
        half = self._half(settings.precision)
        evaluation = self._asked(evaluation, rows)
        if isinstance(settings, PpoSettings):
            learner = Learner(settings, shape, place, half)
            found = [self._scorer(reference, half) for reference in reward_references(settings)]
            scorers = [scorer for scorer in found if scorer]
            roles = Roles(learner, settings, scorers, starts_adapted)
            phases = ppo_phases(roles, rows, evaluation, place)
            return max(phases.values()), ppo_seconds(settings, shape, rows, scorers) if known else None
        phases = training_phases(settings, shape, rows, evaluation, place, half=half)
        return max(phases.values()), training_seconds(settings, shape, rows) if known else None

    def _critique(self, settings: CritiqueSettings, evaluation: EvaluationSettings) -> tuple[float, float | None]:
        known = self.rows(settings.data, self.start.context, cuts=False)
        rows = known or _unknown(1, self.start.context)
        rows = replace(rows, count=rows.count + self._asked(evaluation, rows).rows)
        quantize = self.start.quantize or settings.quantize
        adapter = self.start.adapter
        weights = self.start.shape.adapter_parameters(adapter) if adapter else None
        half = self._half("auto")
        peak = critique_bytes(
            settings, self.start.shape, rows, self.place, quantize=quantize, adapter=weights, half=half
        )  # fmt: skip
        timed = known is not None and not isinstance(settings.critic, EndpointCritic)
        return peak, critique_seconds(settings, self.start.shape, rows) if timed else None

    def _half(self, precision: str) -> bool:
        """Whether products are in bfloat16."""
        if precision != "auto":
            return precision == "bfloat16"
        return self.place.has_bfloat16 and (self.place.gpu or self.start.shape.hidden >= BFLOAT16_MIN_WIDTH)

    def _asked(self, evaluation: EvaluationSettings, rows: Rows) -> EvaluationSettings:
        """No more held-out rows than there are, where they are the stage's own."""
        there = rows.held_out if self.workshop.asked(self.name) is None else None
        return evaluation if there is None else evaluation.model_copy(update={"rows": min(evaluation.rows, there)})

    def _known(self, data: str | None, longest: int) -> Rows:
        return (self.rows(data, longest, cuts=True) if data else None) or _unknown(1, longest)

    def rows(self, data: str, longest: int, *, cuts: bool) -> Rows | None:
        """What the rows of a data set are like; None while a stage is still to make them, and where they are bad.

        They are looked at once, though many predictions are made of them.
        """
        workshop, folder = self.workshop, self.start.folder
        if workshop.unmade(data):
            return None
        key = workshop.data_key(data)
        record = workshop.registry.data_by_key(key)
        asked = (key, record and record.id, folder, longest, cuts)
        if asked not in workshop.rows_seen:
            sample = _registered(workshop, record) if record else _first_of(workshop, data)
            found = sample and rows_like(sample.rows, sample.count, _counter(folder), longest=longest, cuts=cuts)
            workshop.rows_seen[asked] = replace(found, held_out=sample.held_out) if sample and found else None
        return workshop.rows_seen[asked]

    def _scorer(self, reference: str, half: bool) -> Scorer | None:
        """A reward model of the stage; None: its shape is not known. An adapter on the policy's base costs itself alone."""
        recipe = self.workshop.recipe
        if reference not in recipe.stages:
            folder = Path(self.workshop.reward_point(self.name, reference).source.root.path)
            found, size = Shape.of(_config(folder)), sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            return Scorer(found, size) if found else None
        shape, policy, scorer = self.start.shape, adapter_stage(recipe, self.name), adapter_stage(recipe, reference)
        adapter = 4 * shape.adapter_parameters(scorer.adapter) if scorer and scorer.adapter else 0
        shared = policy and scorer and (policy.from_, policy.quantize) == (scorer.from_, scorer.quantize)
        quantize = scorer.quantize if scorer else None
        base = 0.0 if shared else frozen_bytes(shape, quantize, half=self._half("auto"), head=False)
        return Scorer(shape, base + adapter)


@dataclass(frozen=True)
class _Sample:
    """Some canonical rows of a data set, how many training rows it has, and how many held-out ones."""

    rows: Sequence[Mapping[str, Any]]
    count: int
    held_out: int


def _registered(workshop: Workshop, record: DataRecord) -> _Sample:
    """From what is registered. Raises AlignError where that is not as it was."""
    workshop.registry.check_unchanged(record)
    with (record.path / "train.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in islice(lines, SAMPLE_ROWS)]
    return _Sample(rows, int(record.info.get("train_rows", 0)), int(record.info.get("test_rows", 0)))


def _first_of(workshop: Workshop, data: str) -> _Sample | None:
    """From the first rows of its files; None where they are bad."""
    sources = {name: _first_rows(settings) for name, settings in workshop.sources().items()}
    try:
        prepared = prepare(data, sources, folder=workshop.folder, seed=workshop.recipe.seed)
    except AlignError:  # what is wrong with the rows is said by those who read all of them
        return None
    rows = [example.row() for example in islice(prepared.train, SAMPLE_ROWS)]
    count = max(len(rows), sum(_row_count(workshop, part, rows) for part in _files_of(workshop, data)))
    share = workshop.sources()[data].test_fraction
    return _Sample(rows, round(count * (1 - share)), round(count * share))


def _first_rows(settings: DataSettings) -> DataSettings:
    """So much of a data set as is looked at, none of it held out; of a mixture so much of each part."""
    if settings.mix:
        return settings
    few = {"limit": min(settings.limit or SAMPLE_ROWS, SAMPLE_ROWS), "test": None, "test_fraction": 0.0}
    return settings.model_copy(
        update={**few, "shuffle": False, "near_duplicates": None, "decontaminate": [], "bad_rows": "drop"}
    )


def _files_of(workshop: Workshop, data: str) -> Iterator[DataSettings]:
    """Where a data set comes from, those of the parts where it is a mixture."""
    settings = workshop.sources()[data]
    for part in settings.mix:
        yield from _files_of(workshop, part.data)
    if not settings.mix:
        yield settings


def _row_count(workshop: Workshop, settings: DataSettings, sample: list[dict[str, Any]]) -> int:
    """Rows of a file: its lines, or its size by that of the rows that were looked at (too few where it is packed)."""
    file = workshop.folder / (settings.path or "")
    if not file.is_file():
        return len(sample)
    if file.suffix == ".jsonl":
        with file.open("rb") as opened:
            count = sum(piece.count(b"\n") for piece in iter(partial(opened.read, PIECE_BYTES), b""))
    else:
        count = round(file.stat().st_size * len(sample) / max(1, sum(len(json.dumps(row)) for row in sample)))
    return min(count, settings.limit or count)


def _unknown(rows: int, longest: int) -> Rows:
    tokens = min(longest, UNKNOWN_TOKENS)
    return Rows(count=rows, mean=tokens, longest=tokens, prompt=tokens / 2, longest_prompt=tokens / 2)


def _place(workshop: Workshop, settings: Stage) -> Place:
    launch = launch_of(workshop)
    if settings.kind not in SEVERAL:
        return this_place()
    ours = crew()
    return this_place(launch.processes, launch.strategy, ours.here if ours else None)


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def _adapter_on(workshop: Workshop, name: str, source: Source | None) -> tuple[AdapterSettings | None, str | None]:
    """The adapter that a stage works on, its own or the one that it starts from, and the quantization of its base.

    source: what the stage starts from, where no stage of the recipe made it.
    """
    recipe, stage = workshop.recipe, workshop.stage(name)
    before = stage.from_ if isinstance(stage, MergeSettings) else name
    made = adapter_stage(recipe, before) if before in recipe.stages else None
    if made:
        return made.adapter, made.quantize
    if source is None or source.kind != ("adapter-reward" if isinstance(stage, RewardSettings) else "adapter"):
        return None, None
    config = json.loads((Path(source.path) / "adapter_config.json").read_text(encoding="utf-8"))
    return AdapterSettings(rank=int(config["r"])), source.quantize


@cache
def _counter(folder: Path) -> CountTokens:
    return counter(folder)
