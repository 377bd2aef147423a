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
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.data.prepare import prepare, source_key
from align.data.prepared import PreparedData, read_prepared, write_prepared
from align.errors import AlignError, did_you_mean
from align.judge import Judge
from align.models.source import Source, located, source_of
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

    Data, template and judge are read once: an edit while stages run is for the next run, and no key or record can name
    other content than what was trained on.
    """

    recipe: Recipe
    folder: Path
    registry: Registry
    _data_keys: dict[str, str] = field(default_factory=dict, repr=False, compare=False)
    _data: dict[str, tuple[DataRecord, PreparedData]] = field(default_factory=dict, repr=False, compare=False)

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

    def key(self, name: str, origin: Origin) -> str:
        """Cache key of a stage that starts at `origin`."""
        return sha256_json(self.ingredients(name, origin))

    def ingredients(self, name: str, origin: Origin) -> dict[str, Any]:
        """All that the key of a stage is made from, readable: the plan names what differs."""
        evaluation = self.recipe.evaluation
        return {
            "settings": stage_settings(self.stage(name)),
            "seed": self.seed(name),
            "parent": origin.id,
            "data": {data: self.data_key(data) for data in self.data_names(name)},
            "template": self._template_file[0],
            "judge": self._judge_file[0],
            "evaluation": evaluation.model_dump(mode="json", exclude={"judge", "samples"}),
            "versions": {"numerics": str(NUMERICS), **library_versions()},
        }

    def _origin(self, reference: str) -> Origin:
        as_path = self.folder / reference
        if as_path.exists():
            return self._foreign(str(as_path), reference)
        try:
            record = self.registry.checkpoint(reference)
        except AlignError as unknown:  # no name of the registry: a hub id, unless it is nearly a name that we have
            names = {record.name for record in self.registry.all_checkpoints()}
            if difflib.get_close_matches(reference, names, n=1, cutoff=0.8):
                raise unknown
            return self._foreign(reference, reference)
        return self._recorded(record)

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
        if not path:
            return None, None
        file = existing_file(self.folder / path)
        return sha256_file(file), Judge.load(file)

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

    def _foreign(self, path: str, name: str) -> Origin:
        scratch = any(isinstance(s, PretrainSettings) and s.from_scratch for s in self.recipe.stages.values())
        source = located(
            source_of(
                path,
                revision=self.recipe.revision,
                trust_remote_code=self.recipe.trust_remote_code,
                needs_weights=not scratch,
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
