"""What a model folder is, told from its files alone: no torch, no weights read, no network.

A hub id passes through untouched; hub.py brings its files here when they are needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from align.errors import AlignError, did_you_mean
from align.registry.hashing import sha256_file, sha256_json

Kind = Literal["model", "adapter", "reward", "adapter-reward"]
Quantize = Literal["nf4", "int8"]
Json = dict[str, Any]

ADAPTER_RECORD = "align_adapter.json"  # stands beside adapter_config.json; peft does not read it
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
POINTER = b"version https://git-lfs."  # what Git LFS leaves in the place of a file that it has not brought
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")


@dataclass(frozen=True)
class Source:
    """Where weights come from, and what they are.

    quantize, base_sha256, dtype: what the base of an adapter was when it was trained (None: not on record).
    hub_id: the name that a downloaded folder has on the hub.
    """

    path: str
    kind: Kind
    base: Source | None = None
    quantize: Quantize | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    base_sha256: str | None = None
    dtype: str | None = None
    hub_id: str | None = None

    @property
    def is_adapter(self) -> bool:
        """Whether it needs its base to be a model."""
        return self.kind in ("adapter", "adapter-reward")

    @property
    def is_reward(self) -> bool:
        """Whether it gives rewards rather than text."""
        return self.kind in ("reward", "adapter-reward")

    @property
    def root(self) -> Source:
        """The model itself, or the base of an adapter."""
        return self.base if self.base is not None else self


def source_of(
    path_or_id: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    needs_weights: bool = True,
) -> Source:
    """What stands at a path (or hub id). needs_weights: False where a config alone will do (training from scratch).

    Raises AlignError for a folder that is no model, has only pickled or damaged weights, or whose base is missing.
    """
    name = str(path_or_id)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        _refuse_typo(name, folder)
        return _from_hub_cache(name, revision, trust_remote_code)
    _refuse_pointers(folder)
    if (folder / "adapter_config.json").is_file():
        return _adapter(folder, trust_remote_code)
    config = _read_config(folder)
    if needs_weights:
        _require_weights(folder, "model")
    _refuse_foreign_code(folder, config, trust_remote_code)
    return Source(str(folder.resolve()), _kind_of(folder, config), None, None, revision, trust_remote_code)


def located(source: Source) -> Source:
    """The same source as a local folder; downloads a hub model unless HF_HUB_OFFLINE is set or the cache has it."""
    if Path(source.path).is_dir():
        return source
    from align.models.hub import download

    found = source_of(
        download(source.path, source.revision, with_code=source.trust_remote_code),
        trust_remote_code=source.trust_remote_code,
    )
    commit = Path(found.path).name  # the cache keeps each commit in a folder of its name
    return replace(found, revision=commit, hub_id=source.path)


def weights_sha256(source: Source) -> str:
    """Identity of a local model's weights: the hash of the names and contents of its safetensors files."""
    files = sorted(Path(source.path).glob("*.safetensors"))
    return sha256_json([[file.name, _file_sha256(str(file), *file_marks(file))] for file in files])


def weight_files(source: Source) -> list[Path]:
    """The safetensors files that a local source is loaded from; not those of an adapter's base."""
    folder, stem = Path(source.path), "adapter_model" if source.is_adapter else "model"
    whole, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    return [folder / name for name in _shards(index)] if index.is_file() and not whole.is_file() else [whole]


def saved_vocabulary(source: Source) -> int:
    """Rows that the embeddings of an adapter's base need for the tokens that the adapter trained; 0 when it trained none."""
    indices = read_json(Path(source.path) / "adapter_config.json").get("trainable_token_indices") or {}
    lists = indices.values() if isinstance(indices, dict) else [indices]
    return max((max(ids) + 1 for ids in lists if ids), default=0)


def read_json(file: Path) -> Json:
    """A JSON object from a model folder. Raises AlignError when it is not one."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AlignError(
            f"{file}: cannot be read as JSON ({error})", "The folder is damaged; copy it again."
        ) from error
    if not isinstance(value, dict):
        raise AlignError(f"{file}: holds no JSON object", "The folder is damaged; copy it again.")
    return value


def _read_config(folder: Path) -> Json:
    file = folder / "config.json"
    if not file.is_file():
        raise AlignError(
            f"{folder}: not a model folder, it has neither config.json nor adapter_config.json",
            "Name a folder that transformers' or peft's save_pretrained wrote.",
        )
    config = read_json(file)
    if (named := config.get("transformers_weights")) not in (None, "model.safetensors"):
        raise AlignError(
            f"{file}: names {str(named)[:80]!r} as its weights (transformers_weights)",
            "Take that line out, and let the weights be in model.safetensors or in shards with an index.",
        )
    if "quantization_config" in config:
        how = config["quantization_config"]
        method = how.get("quant_method", "unknown") if isinstance(how, dict) else how
        raise AlignError(
            f"{folder}: its weights are already quantized ({method})",
            "Use the full-precision model; `quantize: nf4` makes it small while it is loaded.",
        )
    return config


def _kind_of(folder: Path, config: Json) -> Kind:
    architectures = [str(name) for name in config.get("architectures") or []]
    if not any(name.endswith("ForSequenceClassification") for name in architectures):
        return "model"
    labels = len(config.get("id2label") or {"0": "", "1": ""})
    if labels != 1:
        raise AlignError(
            f"{folder}: a classifier with {labels} labels, not a reward model",
            "A reward model is a ForSequenceClassification model with one label.",
        )
    return "reward"


def _require_weights(folder: Path, stem: Literal["model", "adapter_model"]) -> None:
    """Refuses a folder whose safetensors files are absent, not all there, or damaged as far as their headers tell."""
    index = folder / f"{stem}.safetensors.index.json"
    if (folder / f"{stem}.safetensors").is_file():  # which is loaded, whatever an index beside it names
        _check_header(folder / f"{stem}.safetensors")
        return
    if index.is_file():
        shards = _shards(index)
        lost = [name for name in shards if not (folder / name).is_file()]
        if lost or not shards:
            raise AlignError(f"{folder}: weights are missing: {', '.join(lost) or 'all'}", "Copy the folder again.")
        for name in shards:
            _check_header(folder / name)
        return
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise AlignError(
            f"{folder}: its weights are pickled ({', '.join(pickles[:3])}), and loading a pickle can run any program",
            'If you trust its author, convert it once: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}').save_pretrained('NEW_FOLDER')\", and copy the tokenizer files.",
        )
    raise AlignError(f"{folder}: no weights, {stem}.safetensors is missing", "Copy the folder again.")


def _shards(index: Path) -> list[str]:
    """The files that an index names. Raises AlignError unless they are names of files beside it."""
    places = read_json(index).get("weight_map", {})
    names = list(places.values()) if isinstance(places, dict) else [places]
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise AlignError(
                f"{index}: names {str(name)[:80]!r}, which is no file beside it",
                "The folder is damaged; copy it again.",
            )
    return sorted(set(names))


def _check_header(file: Path) -> None:
    """Refuses a file that is no safetensors file, or is shorter or longer than its own header says."""
    try:
        with safe_open(file, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise AlignError(f"{file}: cannot be opened: {error}", "The file is damaged; copy it again.") from error


def _refuse_pointers(folder: Path) -> None:
    """A folder from `git clone` without Git LFS looks whole, and holds three lines of text for each large file."""
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.stat().st_size < 1024 and file.read_bytes().startswith(POINTER):
            raise AlignError(
                f"{file}: a pointer of Git LFS, not the file itself", f"Run `git lfs pull` in {folder}, or download it."
            )


def _adapter(folder: Path, trust_remote_code: bool) -> Source:
    config = read_json(folder / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise AlignError(f"{folder}: an adapter of type {config.get('peft_type')}", "Only LORA adapters are supported.")
    _require_weights(folder, "adapter_model")
    record = read_json(folder / ADAPTER_RECORD) if (folder / ADAPTER_RECORD).is_file() else {}
    return Source(
        str(folder.resolve()),
        "adapter-reward" if config.get("task_type") == "SEQ_CLS" else "adapter",
        base=_base_of(folder, config, trust_remote_code),
        quantize=record.get("quantize"),
        trust_remote_code=trust_remote_code,
        base_sha256=record.get("base_sha256"),
        dtype=record.get("dtype"),
    )


def _base_of(folder: Path, config: Json, trust_remote_code: bool) -> Source:
    """The base that an adapter names: a path as seen from its folder or from here, one beside it (a store that was moved), or
    a hub id."""
    recorded = str(config.get("base_model_name_or_path") or "")
    if not recorded:
        raise AlignError(f"{folder}: adapter_config.json names no base", "Add its base_model_name_or_path.")
    for place in (folder / recorded, Path(recorded), folder.resolve().parent / Path(recorded).name):
        if place.is_dir():
            if (place / "adapter_config.json").is_file():
                raise AlignError(f"{folder}: its base {place} is an adapter itself", "Merge that one first.")
            return source_of(place, trust_remote_code=trust_remote_code)
    if Path(recorded).is_absolute() or not HUB_ID.match(recorded):
        raise AlignError(
            f"{folder}: the base of this adapter is missing: {recorded}",
            "Put the base back there, put it beside the adapter, or mend base_model_name_or_path in adapter_config.json.",
        )
    return source_of(recorded, revision=config.get("revision"), trust_remote_code=trust_remote_code)


def _refuse_typo(name: str, folder: Path) -> None:
    """A name that can only be a path, and is not there, is never looked for on a network."""
    if folder.is_file():
        raise AlignError(f"{name}: a file, not a model folder", "Name the folder that holds config.json.")
    if HUB_ID.match(name) and not folder.parent.is_dir():
        return
    siblings = [entry.name for entry in folder.parent.iterdir() if entry.is_dir()] if folder.parent.is_dir() else []
    raise AlignError(
        f"{name}: no such folder" + ("" if "/" in name else ", and a hub id has the form org/name"),
        did_you_mean(folder.name, siblings[:20]) if siblings else f"{folder.parent} does not exist either.",
    )


def _from_hub_cache(name: str, revision: str | None, trust_remote_code: bool) -> Source:
    """A hub id, with its kind where the cache already knows it; nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache

    for wanted in ("adapter_config.json", "config.json"):
        file = try_to_load_from_cache(name, wanted, revision=revision)
        if not isinstance(file, str):
            continue
        if wanted == "adapter_config.json":
            return replace(_adapter(Path(file).parent, trust_remote_code), path=name, revision=revision)
        kind = _kind_of(Path(file).parent, read_json(Path(file)))
        return Source(name, kind, None, None, revision, trust_remote_code)
    return Source(name, "model", None, None, revision, trust_remote_code)


def _refuse_foreign_code(folder: Path, config: Json, trusted: bool) -> None:
    """A model whose own Python is needed is refused here, not after its weights are loaded."""
    if trusted or "auto_map" not in config:
        return
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if config.get("model_type") not in CONFIG_MAPPING_NAMES:
        raise AlignError(
            f"{folder}: this model ({config.get('model_type')}) runs Python code of its own",
            "Read that code, then set `trust_remote_code: true` in the recipe.",
        )


def file_marks(file: Path) -> Sequence[int]:
    """What stays as it is while a file is not written: inode, size and times."""
    status = file.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@lru_cache(maxsize=256)
def _file_sha256(path: str, *_marks: int) -> str:
    """Hash of a file, read once while its inode, size and times stay as they are."""
    return sha256_file(Path(path))
