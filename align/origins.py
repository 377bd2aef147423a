"""Names in a recipe -> checked folders, content ids and cache keys. What the plan and the run agree on stands here.

A stage's key is a hash of everything that can change what it makes: its kind and resolved settings, the content of its
parent, its data, template and judge, and the versions of the libraries whose numbers it uses.
"""

from __future__ import annotations

import difflib
import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.content_ids import content_id
from align.data.prepare import prepare, source_key
from align.data.prepared import PreparedData, read_prepared, write_prepared
from align.errors import AlignError
from align.models.source import Source, located, source_of
from align.recipe.critique_settings import CritiqueSettings, JudgeCritic
from align.recipe.file import with_learning_rates
from align.recipe.graph import critic_reference, reward_references
from align.recipe.outputs import outputs_in
from align.recipe.ppo_settings import FunctionReward, JudgeReward, PpoSettings, Reward
from align.recipe.rounds import round_of, written_out
from align.recipe.settings import ConstitutionSettings, DataSettings, PretrainSettings, Recipe, Stage, TrainingSettings
from align.recipe_files import RecipeFiles
from align.registry.artifacts import disk_errors_explained
from align.registry.hashing import sha256_json
from align.registry.records import CheckpointRecord, DataRecord, StageData

if TYPE_CHECKING:
    from align.constitution import Constitution
    from align.estimate.rows import Rows
    from align.judge import Judge
    from align.registry.store import Registry

KEPT_OUT = {"log_steps", "save_steps", "from_", "seed", "data"}  # of a key: named in it otherwise, or without effect
ASKING = {"from_", "concurrency", "requests_per_minute", "timeout_seconds", "retries", "token_budget", "key_env"}
NUMERICS = 4  # raised whenever the same inputs would give other weights
VERSIONS = ("torch", "transformers", "peft", "bitsandbytes", "tokenizers")


@dataclass(frozen=True)
class Origin:
    """Where a stage starts: loadable weights, the hash of their content, and the checkpoint they are, if one of ours."""

    source: Source
    id: str
    name: str
    record: CheckpointRecord | None = None


@dataclass(frozen=True)
class Weights:
    """The checkpoints that a stage works on: its start, the reward models that score it, and its critic's model."""

    start: Origin
    rewards: Mapping[str, Origin] = field(default_factory=dict)
    critic: Origin | None = None


@dataclass(frozen=True)
class Workshop:
    """A recipe, the folder its paths are relative to, and the registry it works in.

    written: the recipe as the user wrote it; `recipe` is the same with its loops written out.
    Data, template, judges and reward functions are read once: an edit while stages run is for the next run, and no key or
    record can name other content than what was trained on. rows_seen: what predictions found rows to be like; see costs.py.
    """

    written: Recipe
    folder: Path
    registry: Registry
    rows_seen: dict[Any, Rows | None] = field(default_factory=dict, repr=False, compare=False)
    _made_data: dict[str, DataRecord] = field(default_factory=dict, repr=False, compare=False)
    _data_keys: dict[str, str] = field(default_factory=dict, repr=False, compare=False)
    _data: dict[str, tuple[DataRecord, PreparedData]] = field(default_factory=dict, repr=False, compare=False)
    _prepared: dict[str, PreparedData] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def files(self) -> RecipeFiles:
        """The judges, constitutions, templates and functions that the recipe names."""
        return RecipeFiles(self.folder)

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe that is run: each round of a loop is stages of its own."""
        return with_learning_rates(written_out(self.written))

    def stage(self, name: str) -> Stage:
        """Settings of the stage of that name."""
        return self.recipe.stages[name]

    def seed(self, name: str) -> int:
        """Seed of a stage: its own, else the recipe's."""
        own = self.stage(name).seed
        return self.recipe.seed if own is None else own

    def full_name(self, name: str) -> str:
        """The name that a stage or a data set of this recipe has in the registry."""
        return f"{self.recipe.name}/{name}"

    @cached_property
    def model(self) -> Origin:
        """The recipe's own model."""
        return self._origin(self.recipe.model)

    def weights(self, name: str, made: Mapping[str, CheckpointRecord]) -> Weights | None:
        """The checkpoints that a stage works on; None while one of them is still to be made.

        made: what this recipe has made, by stage. Raises AlignError for one that is not what the stage needs.
        """
        start, rewards = self.starting_point(name, made), self.reward_points(name, made)
        critic = self.critic_point(name, made)
        if start is None or rewards is None or (critic is None and critic_reference(self.stage(name))):
            return None
        return Weights(start, rewards, critic)

    def starting_point(self, name: str, made: Mapping[str, CheckpointRecord]) -> Origin | None:
        """Where a stage starts; None while the stage before it has not been made. `made`: this recipe's, by stage name."""
        start = self.stage(name).from_
        if start is None:
            return self.model
        if start in self.recipe.stages:
            return self._recorded(made[start]) if start in made else None
        return self._origin(start)

    def reward_points(self, name: str, made: Mapping[str, CheckpointRecord]) -> dict[str, Origin] | None:
        """The reward models of a stage by the `from:` that names them; None while one of them has not been made.

        Raises AlignError for a checkpoint that is no reward model, whatever is still to be made.
        """
        stages, references = self.recipe.stages, reward_references(self.stage(name))
        found = {
            reference: self.reward_point(name, reference, made.get(reference))
            for reference in references
            if reference not in stages or reference in made
        }
        return found if len(found) == len(references) else None

    def reward_point(self, name: str, reference: str, made: CheckpointRecord | None = None) -> Origin:
        """One reward model of a stage. made: what a stage of this recipe made, where the reference names one."""
        try:
            origin = self._recorded(made) if made else self._origin(reference, scores=True)
        except AlignError as error:
            error.message = f"stage '{name}': its reward '{reference}': {error.message}"
            raise
        if not origin.source.is_reward:
            raise AlignError(
                f"stage '{name}': its reward '{reference}' is a language model, not a reward model",
                "Name a stage of kind reward, or a checkpoint that `align checkpoints list` shows as one.",
            )
        return origin

    def critic_point(self, name: str, made: Mapping[str, CheckpointRecord]) -> Origin | None:
        """The model of a stage's critic, where that is a checkpoint; None: it has none, or that is still to be made."""
        reference = critic_reference(self.stage(name))
        if reference is None or (reference in self.recipe.stages and reference not in made):
            return None
        try:
            origin = self._recorded(made[reference]) if reference in made else self._origin(reference)
        except AlignError as error:
            error.message = f"stage '{name}': its critic '{reference}': {error.message}"
            raise
        if origin.source.is_reward:
            raise AlignError(f"stage '{name}': its critic '{reference}' is a reward model, which writes no text")
        return origin

    def judges(self, name: str) -> dict[str | None, Judge]:
        """The judges that score or criticise in a stage, by the file that the recipe names; None is that of `evaluation:`."""
        files = _judge_files(self.stage(name))
        judges = {file: self.files.judge(file)[1] if file else self.judge() for file in files}
        return {file: judge for file, judge in judges.items() if judge is not None}

    def constitution(self, name: str) -> Constitution | None:
        """The constitution of a critique stage; None for any other stage."""
        stage = self.stage(name)
        if not isinstance(stage, CritiqueSettings):
            return None
        whole = self.files.constitution(stage.constitution)[1]
        try:
            return whole.tagged(stage.tags)
        except AlignError as error:
            error.message = f"stage '{name}': {stage.constitution}: {error.message}"
            raise

    def deliver(self, name: str, made: StageData) -> None:
        """Makes what a stage of this recipe has made known to the stages that train on it."""
        for output, record in made.outputs.items():
            data = f"{name}.{output}"
            if self._made_data.get(data) != record:
                self._made_data[data] = record
                for kept in (self._data, self._data_keys, self._prepared):
                    for known in [one for one in kept if data in outputs_in(self.recipe, one)]:
                        del kept[known]

    def unmade(self, data: str) -> list[str]:
        """What stages are still to make before a data set is there."""
        return [output for output in outputs_in(self.recipe, data) if output not in self._made_data]

    def waits_for(self, name: str) -> list[str]:
        """Data sets of other stages that a stage trains on and that are still to be made."""
        stage = self.stage(name)
        return self.unmade(stage.data) if isinstance(stage, TrainingSettings) else []

    def data_names(self, name: str) -> list[str]:
        """Data sets that a stage reads: its own, and the one whose held-out prompts are answered."""
        stage = self.stage(name)
        own = [stage.data] if isinstance(stage, TrainingSettings | CritiqueSettings) else []
        asked = self.asked(name)
        return list(dict.fromkeys([*own, *([asked] if asked else [])]))

    def asked(self, name: str) -> str | None:
        """The data set whose held-out prompts a stage is measured on; None: its own. All rounds of a loop have the loop's."""
        place = round_of(self.recipe, name)
        loop = self.stage(place[0]) if place else None
        return self.recipe.evaluation.prompts or (loop.data if isinstance(loop, ConstitutionSettings) else None)

    def data_key(self, name: str) -> str:
        """Content hash of a data set: the bytes of its files and the settings that choose among its rows."""
        if name not in self._data_keys:
            made = self._made_data.get(name)
            self._data_keys[name] = made.key if made else source_key(name, self.sources(), **self._read_by)
        return self._data_keys[name]

    def _data_content(self, name: str) -> str:
        """What a stage's key has of a data set: of one that a stage made its rows, for a critic may not say the same twice."""
        made = self._made_data.get(name)
        return made.id if made else self.data_key(name)

    def sources(self) -> dict[str, DataSettings]:
        """Where all data sets come from: those of the recipe, and the files of those that stages have made."""
        made = {name: _settings_of(record) for name, record in self._made_data.items()}
        return {**self.recipe.data, **made}

    def data(self, name: str) -> tuple[DataRecord, PreparedData]:
        """A data set, checked, filtered and split; prepared once for each content and kept in the registry."""
        if name not in self._data:
            record = (
                self._made_data.get(name) or self.registry.data_by_key(self.data_key(name)) or self._added_data(name)
            )
            self.registry.check_unchanged(record)
            self._data[name] = record, read_prepared(record.path)
        return self._data[name]

    def prepared(self, name: str) -> PreparedData:
        """The rows of a data set as `data` has them, without putting them into the registry: what is only checked stays out."""
        if name in self._data or name in self._made_data or self.registry.data_by_key(self.data_key(name)):
            return self.data(name)[1]
        if name not in self._prepared:
            self._prepared[name] = prepare(name, self.sources(), **self._read_by)
        return self._prepared[name]

    @property
    def _read_by(self) -> dict[str, Any]:
        return {"folder": self.folder, "seed": self.recipe.seed}

    def _added_data(self, name: str) -> DataRecord:
        prepared = self._prepared.pop(name, None) or prepare(name, self.sources(), **self._read_by)
        aside = self.registry.new_folder("data")
        with disk_errors_explained(aside):
            write_prepared(prepared, aside)
        return self.registry.add_data(self.full_name(name), self.data_key(name), aside, prepared.report.as_dict())

    def key(self, name: str, weights: Weights) -> str:
        """Cache key of a stage."""
        return sha256_json(self.ingredients(name, weights))

    def ingredients(self, name: str, weights: Weights) -> dict[str, Any]:
        """All that the key of a stage is made from, readable: the plan names what differs."""
        evaluation, template = self.recipe.evaluation, self.recipe.template
        return {
            "settings": stage_settings(self.stage(name)),
            "seed": self.seed(name),
            "parent": weights.start.id,
            "data": {data: self._data_content(data) for data in self.data_names(name)},
            "template": self.files.template(template)[0] if template else None,
            "judge": self.files.judge(evaluation.judge)[0] if evaluation.judge else None,
            "evaluation": evaluation.model_dump(mode="json", exclude={"judge", "samples"}),
            "versions": {"numerics": str(NUMERICS), **library_versions()},
            **self._judged_by(name, weights),
        }

    def _judged_by(self, name: str, weights: Weights) -> dict[str, Any]:
        """Content of all that a stage's answers are scored or criticised by; what a function's module imports does not
        count."""
        stage = self.stage(name)
        judges = {file: self.files.judge(file)[0] for file in _judge_files(stage) if file}
        if isinstance(stage, CritiqueSettings):
            critic = weights.critic.id if weights.critic else None
            return {"constitution": self.files.constitution(stage.constitution)[0], "critic": critic, "judges": judges}
        if not isinstance(stage, PpoSettings):
            return {}
        functions = [term.name for term in _terms(stage) if isinstance(term, FunctionReward)]
        return {
            "rewards": {reference: origin.id for reference, origin in weights.rewards.items()},
            "judges": judges,
            "functions": {function: self.files.function(function) for function in functions},
        }

    def _origin(self, reference: str, *, scores: bool = False) -> Origin:
        """scores: it is to give rewards, so `revision:`, which is about the recipe's model, says nothing of it."""
        as_path = self.folder / reference
        if as_path.exists():
            return self._foreign(str(as_path), reference, scores=scores)
        try:
            record = self.registry.checkpoint(reference)
        except AlignError as unknown:  # no name of the registry: a hub id, unless it is nearly a name that we have
            names = self.registry.checkpoint_names()
            if difflib.get_close_matches(reference, names, n=1, cutoff=0.8):
                raise unknown
            stages = difflib.get_close_matches(reference, self.recipe.stages, n=1, cutoff=0.6)
            if stages and "/" not in reference:  # a hub id has a slash
                raise AlignError(unknown.message, f"Did you mean '{stages[0]}'?") from None
            return self._foreign(reference, reference, scores=scores)
        return self._recorded(record)

    def judge(self) -> Judge | None:
        """The judge that marks answers, if the recipe names one."""
        file = self.recipe.evaluation.judge
        return self.files.judge(file)[1] if file else None

    def template(self) -> str | None:
        """Text of the recipe's own chat template, if it names one."""
        file = self.recipe.template
        return self.files.template(file)[1] if file else None

    def _foreign(self, path: str, name: str, *, scores: bool) -> Origin:
        scratch = any(isinstance(s, PretrainSettings) and s.from_scratch for s in self.recipe.stages.values())
        source = located(
            source_of(
                path,
                revision=None if scores else self.recipe.revision,
                trust_remote_code=self.recipe.trust_remote_code,
                needs_weights=scores or not scratch,
            )
        )
        own = content_id(Path(source.path), self.registry)
        if source.base is None:
            return Origin(source, own, name)
        source = replace(source, base=located(source.base))
        base = content_id(Path(source.root.path), self.registry)  # an adapter is other weights on another base
        return Origin(source, sha256_json([own, base]), name)

    def _recorded(self, record: CheckpointRecord) -> Origin:
        self.registry.check_unchanged(record)
        source = source_of(record.path, trust_remote_code=self.recipe.trust_remote_code)
        if source.base is not None:
            self.registry.check_folder(Path(source.base.path))
        return Origin(source, record.id, record.name, record)


def stage_settings(stage: Stage) -> dict[str, Any]:
    """Settings of a stage that can change what it makes, as JSON, with learning rate and alpha filled in."""
    settings = stage.model_dump(mode="json", by_alias=True, exclude={**dict.fromkeys(KEPT_OUT, True), "critic": ASKING})
    if isinstance(stage, TrainingSettings):
        settings["learning_rate"] = stage.peak_learning_rate()
        if stage.adapter and stage.adapter.alpha is None:
            settings["adapter"]["alpha"] = 2.0 * stage.adapter.rank
    return settings


def library_versions() -> dict[str, str]:
    """Versions of align and of the libraries that change numbers."""
    return {name: importlib.metadata.version(name) for name in ("align", *VERSIONS)}


def _judge_files(stage: Stage) -> set[str | None]:
    """Files of the judges that score or criticise in a stage; None is that of `evaluation:`."""
    if isinstance(stage, CritiqueSettings):
        return {stage.critic.file} if isinstance(stage.critic, JudgeCritic) else set()
    return {term.file for term in _terms(stage) if isinstance(term, JudgeReward)}


def _settings_of(made: DataRecord) -> DataSettings:
    """A data set that a stage made, as one to read."""
    train, test = made.path / "train.jsonl", made.path / "test.jsonl"
    held_out = {"test": str(test)} if test.stat().st_size else {"test_fraction": 0.0}
    return DataSettings.model_validate({"path": str(train), "deduplicate": False, **held_out})


def _terms(stage: Stage) -> list[Reward]:
    return [*stage.reward, *stage.watch] if isinstance(stage, PpoSettings) else []
