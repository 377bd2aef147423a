"""Names in a recipe -> checked folders, content ids and cache keys. What the plan and the run agree on stands here.

A stage's key is a hash of everything that can change what it makes: its kind and resolved settings, the content of its
parent, its data, template and judge, and the versions of the libraries whose numbers it uses.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.data.prepare import prepare, source_key
from align.data.prepared import PreparedData, read_prepared, write_prepared
from align.errors import AlignError, did_you_mean
from align.judge import Judge
from align.models.source import Source, located, source_of
from align.recipe.graph import reward_references
from align.recipe.ppo_settings import FunctionReward, JudgeReward, PpoSettings, Reward
from align.recipe.settings import PretrainSettings, Recipe, Stage, TrainingSettings
from align.registry.artifacts import disk_errors_explained
from align.registry.hashing import folder_manifest, sha256_file, sha256_json
from align.registry.records import CheckpointRecord, DataRecord

if TYPE_CHECKING:
    from align.registry.store import Registry

NUMERICS = 1  # raised whenever the same inputs would give other weights
VERSIONS = ("torch", "transformers", "peft", "bitsandbytes", "tokenizers")


@dataclass(frozen=True)
class Origin:
    """Where a stage starts: loadable weights, the hash of their content, and the checkpoint they are, if one of ours."""

    source: Source
    id: str
    name: str
    record: CheckpointRecord | None = None


@dataclass(frozen=True)
class Workshop:
    """A recipe, the folder its paths are relative to, and the registry it works in.

    Data, template, judges and reward functions are read once: an edit while stages run is for the next run, and no key or
    record can name other content than what was trained on.
    """

    recipe: Recipe
    folder: Path
    registry: Registry
    _data_keys: dict[str, str] = field(default_factory=dict, repr=False, compare=False)
    _data: dict[str, tuple[DataRecord, PreparedData]] = field(default_factory=dict, repr=False, compare=False)
    _judges: dict[str, tuple[str, Judge]] = field(default_factory=dict, repr=False, compare=False)
    _functions: dict[str, str | None] = field(default_factory=dict, repr=False, compare=False)

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

    def judges(self, name: str) -> dict[str | None, Judge]:
        """The judges among the rewards of a stage, by the file that the recipe names; None is that of `evaluation:`."""
        files = {term.file for term in _terms(self.stage(name)) if isinstance(term, JudgeReward)}
        judges = {file: self._judge_of(file)[1] if file else self.judge() for file in files}
        return {file: judge for file, judge in judges.items() if judge is not None}

    def data_names(self, name: str) -> list[str]:
        """Data sets that a stage reads: what it trains on, and the one whose held-out prompts are answered."""
        stage = self.stage(name)
        own = [stage.data] if isinstance(stage, TrainingSettings) else []
        asked = self.recipe.evaluation.prompts
        return list(dict.fromkeys([*own, *([asked] if asked else [])]))

    def data_key(self, name: str) -> str:
        """Content hash of a data set: the bytes of its files and the settings that choose among its rows."""
        if name not in self._data_keys:
            self._data_keys[name] = source_key(name, self.recipe.data, folder=self.folder, seed=self.recipe.seed)
        return self._data_keys[name]

    def data(self, name: str) -> tuple[DataRecord, PreparedData]:
        """A data set, checked, filtered and split; prepared once for each content and kept in the registry."""
        if name not in self._data:
            record = self.registry.data_by_key(self.data_key(name)) or self._added_data(name)
            self.registry.check_unchanged(record)
            self._data[name] = record, read_prepared(record.path)
        return self._data[name]

    def _added_data(self, name: str) -> DataRecord:
        prepared = prepare(name, self.recipe.data, folder=self.folder, seed=self.recipe.seed)
        aside = self.registry.new_folder("data")
        with disk_errors_explained(aside):
            write_prepared(prepared, aside)
        return self.registry.add_data(self.full_name(name), self.data_key(name), aside, prepared.report.as_dict())

    def key(self, name: str, origin: Origin, rewards: Mapping[str, Origin]) -> str:
        """Cache key of a stage that starts at `origin` and is scored by `rewards` (see `reward_points`)."""
        return sha256_json(self.ingredients(name, origin, rewards))

    def ingredients(self, name: str, origin: Origin, rewards: Mapping[str, Origin]) -> dict[str, Any]:
        """All that the key of a stage is made from, readable: the plan names what differs."""
        evaluation = self.recipe.evaluation
        scored = self._scored_with(name, rewards) if isinstance(self.stage(name), PpoSettings) else {}
        return {
            "settings": stage_settings(self.stage(name)),
            "seed": self.seed(name),
            "parent": origin.id,
            "data": {data: self.data_key(data) for data in self.data_names(name)},
            "template": self._template_file[0],
            "judge": self._judge_file[0],
            "evaluation": evaluation.model_dump(mode="json", exclude={"judge", "samples"}),
            "versions": {"numerics": str(NUMERICS), **library_versions()},
            **scored,
        }

    def _scored_with(self, name: str, rewards: Mapping[str, Origin]) -> dict[str, Any]:
        """Content of all that scores the responses of a ppo stage; a function's module counts, what it imports does not."""
        terms = _terms(self.stage(name))
        files = {term.file for term in terms if isinstance(term, JudgeReward) and term.file}
        return {
            "rewards": {reference: origin.id for reference, origin in rewards.items()},
            "judges": {file: self._judge_of(file)[0] for file in files},
            "functions": {term.name: self._function_sha256(term) for term in terms if isinstance(term, FunctionReward)},
        }

    def _origin(self, reference: str, *, scores: bool = False) -> Origin:
        """scores: it is to give rewards, so `revision:`, which is about the recipe's model, says nothing of it."""
        as_path = self.folder / reference
        if as_path.exists():
            return self._foreign(str(as_path), reference, scores=scores)
        try:
            record = self.registry.checkpoint(reference)
        except AlignError as unknown:  # no name of the registry: a hub id, unless it is nearly a name that we have
            names = {record.name for record in self.registry.all_checkpoints()}
            if difflib.get_close_matches(reference, names, n=1, cutoff=0.8):
                raise unknown
            stages = difflib.get_close_matches(reference, self.recipe.stages, n=1, cutoff=0.6)
            if stages and "/" not in reference:  # a hub id has a slash
                raise AlignError(unknown.message, f"Did you mean '{stages[0]}'?") from None
            return self._foreign(reference, reference, scores=scores)
        return self._recorded(record)

    def _judge_of(self, file: str) -> tuple[str, Judge]:
        """Hash of a judge's file, and the judge."""
        if file not in self._judges:
            path = existing_file(self.folder / file)
            self._judges[file] = sha256_file(path), Judge.load(path)
        return self._judges[file]

    def _function_sha256(self, term: FunctionReward) -> str | None:
        """Hash of the file that holds a reward function; None where its module is no file."""
        if term.name not in self._functions:
            spec = module_spec(term.name.partition(":")[0])
            file = Path(spec.origin) if spec and spec.origin else None
            self._functions[term.name] = sha256_file(file) if file and file.is_file() else None
        return self._functions[term.name]

    def judge(self) -> Judge | None:
        """The judge that marks answers, if the recipe names one."""
        return self._judge_file[1]

    def template(self) -> str | None:
        """Text of the recipe's own chat template, if it names one."""
        return self._template_file[1]

    @cached_property
    def _judge_file(self) -> tuple[str | None, Judge | None]:
        """Hash of the judge's file, and the judge."""
        path = self.recipe.evaluation.judge
        return self._judge_of(path) if path else (None, None)

    @cached_property
    def _template_file(self) -> tuple[str | None, str | None]:
        """Hash of the template's file, and its text."""
        path = self.recipe.template
        if not path:
            return None, None
        file = existing_file(self.folder / path)
        content = file.read_bytes()
        try:
            return hashlib.sha256(content).hexdigest(), content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise AlignError(f"{file} is not UTF-8 (byte {error.start})", "Save the template as UTF-8.") from error

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
        own = _content_id(Path(source.path), self.registry)
        if source.base is None:
            return Origin(source, own, name)
        source = replace(source, base=located(source.base))
        base = _content_id(Path(source.root.path), self.registry)  # an adapter is other weights on another base
        return Origin(source, sha256_json([own, base]), name)

    def _recorded(self, record: CheckpointRecord) -> Origin:
        self.registry.check_unchanged(record)
        source = source_of(record.path, trust_remote_code=self.recipe.trust_remote_code)
        if source.base is not None:
            self.registry.check_folder(Path(source.base.path))
        return Origin(source, record.id, record.name, record)


def stage_settings(stage: Stage) -> dict[str, Any]:
    """Settings of a stage that can change what it makes, as JSON, with learning rate and alpha filled in."""
    settings = stage.model_dump(
        mode="json", by_alias=True, exclude={"log_steps", "save_steps", "from_", "seed", "data"}
    )
    if isinstance(stage, TrainingSettings):
        settings["learning_rate"] = stage.peak_learning_rate()
        if stage.adapter and stage.adapter.alpha is None:
            settings["adapter"]["alpha"] = 2.0 * stage.adapter.rank
    return settings


def library_versions() -> dict[str, str]:
    """Versions of align and of the libraries that change numbers."""
    return {name: importlib.metadata.version(name) for name in ("align", *VERSIONS)}


def module_spec(module: str) -> ModuleSpec | None:
    """Where a module is, from the working folder on, without running it or a package around it; None: there is none."""
    spec: ModuleSpec | None = None
    path: Sequence[str] | None = [str(Path.cwd()), *sys.path]
    parts = module.split(".")
    for number in range(len(parts)):
        spec = PathFinder.find_spec(".".join(parts[: number + 1]), path) if path is not None else None
        path = spec.submodule_search_locations if spec else None
    return spec


def _terms(stage: Stage) -> list[Reward]:
    return [*stage.reward, *stage.watch] if isinstance(stage, PpoSettings) else []


def existing_file(path: Path) -> Path:
    """The path, if it is a file. Raises AlignError with the nearest name beside it."""
    if path.is_file():
        return path
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    raise AlignError(f"there is no file {path}", did_you_mean(path.name, beside) if beside else "")


def _content_id(folder: Path, registry: Registry) -> str:
    """Hash of a foreign folder's files. Kept by size and change time of each file, so that a plan does not read gigabytes."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    seen = [[str(file), *_marks(file.stat())] for file in files]
    kept = registry.home / "cache" / "content-ids" / f"{sha256_json(seen)}.json"
    if kept.is_file():
        return str(json.loads(kept.read_text())["id"])
    try:
        found = folder_manifest(folder).id
    except ValueError as error:
        raise AlignError(f"the model in {folder} cannot be hashed: {error}", "Copy the folder again.") from error
    with contextlib.suppress(OSError):  # a registry that cannot be written can still be planned with
        _keep(kept, json.dumps({"id": found}))
    return found


def _keep(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(f".{os.getpid()}")
    aside.write_text(text)
    aside.rename(file)


def _marks(status: os.stat_result) -> list[int]:
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
