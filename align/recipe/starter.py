"""`align init`: a short commented recipe for a model and the user's data files.

Looks into the first rows of each file to see what they are, and makes the chain they allow: text is for pretraining,
conversations for sft, preferences for a reward model and dpo, rated answers for dpo's kto loss, prompts for measuring.
Left out: hub data sets (their rows are not here to look at), and any judgement of what suits the model's size.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from align.data.formats import detect, read_row
from align.data.problems import Problem, RowError
from align.data.sources import find_source, read_rows
from align.errors import AlignError
from align.recipe.file import load_recipe
from align.recipe.settings import Name
from align.recipe.types import NAME_RULE
from align.recipe.yaml_text import Place, scalar, shown

ROWS_LOOKED_AT = 200
PLAIN = re.compile(r"[A-Za-z0-9./_][A-Za-z0-9./_-]*")

HEAD = """\
# {run}
# First `align check` and `align plan` it. Every setting with its default: `align recipe settings`.
name: {name}
model: {model}
seed: 0

data:  # a tenth of each is held out to measure with (test_fraction)
"""

ADAPTER = """\
    adapter: {rank: 16}  # LoRA; leave the line out to train all weights
    # quantize: nf4      # QLoRA: a quarter of the memory for the frozen weights
"""

PRETRAIN = """
  pretrain:  # goes on with plain text; every token is trained
    kind: pretrain
{start}    data: {data}
    epochs: 1
"""

SFT = """
  sft:  # learns to answer as in the conversations
    kind: sft
{start}    data: {data}
    epochs: 2
"""

REWARD = """
  reward:  # learns which of two answers is better; `align score` uses it
    kind: reward
{start}    data: {data}
"""

DPO = """
  dpo:  # makes the better answers more likely
    kind: dpo
{start}    data: {data}
    beta: 0.1            # pull towards the start; smaller lets the model move further
"""

KTO = """
  kto:  # makes well rated answers more likely, badly rated ones less
    kind: dpo
    loss: kto
{start}    data: {data}
    beta: 0.1            # pull towards the start; smaller lets the model move further
"""

MOST_STEPS_UP = 3  # a file further away than this is written with its absolute path

PLANS = {"text": PRETRAIN, "conversation": SFT, "preference": REWARD, "rated": KTO}
PLURALS = {
    "text": "texts",
    "conversation": "conversations",
    "preference": "preferences",
    "rated": "rated",
    "prompt": "prompts",
}


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file that was looked into: its name in the recipe, the format of its rows and the kind of example they are."""

    name: str
    path: Path
    format: str
    kind: str


@dataclass(frozen=True, slots=True)
class Starter:
    """A recipe that was written, and a line on what was found in each file."""

    path: Path
    notes: tuple[str, ...]


def write_starter(
    model: str, files: Sequence[str], *, out: Path | None = None, name: str | None = None, force: bool = False
) -> Starter:
    """Writes the recipe to `out` (recipes/NAME.yaml). Raises AlignError when it exists, unless `force`."""
    name = _checked_name(name) if name else _recipe_name(model)
    path = out or Path("recipes") / f"{name}.yaml"
    if path.exists() and not force:
        raise AlignError(f"{path} exists.", "--force overwrites it, --out names another file.")
    found = look_into(files)
    text = starter_text(_model_from(model, path.parent), found, name=name, path=path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    load_recipe(path)
    return Starter(path, tuple(f"{file.path}: {PLURALS[file.kind]}, format {file.format}" for file in found))


def look_into(files: Iterable[str]) -> list[DataFile]:
    """Format and kind of each file. Raises AlignError when one cannot be read or fits no format."""
    found: list[DataFile] = []
    for text in dict.fromkeys(files):
        source = find_source(text, Path())
        if source.path is None:
            raise AlignError(
                f"'{text}' is no file here.",
                "`align init` looks into files; a hub data set can be put under `data:` of the recipe afterwards.",
            )
        rows = [row for row in itertools.islice(read_rows(source), ROWS_LOOKED_AT) if not isinstance(row, Problem)]
        if not rows:
            raise AlignError(
                f"{text}: none of the first {ROWS_LOOKED_AT} rows can be read.", f"`align data check {text}`"
            )
        form = detect([row.fields for row in rows])
        kinds = [kind for row in rows if (kind := _kind(form, row.fields))]
        if not kinds:
            raise AlignError(
                f"{text}: looks like {form}, but none of its first {len(rows)} rows is complete.",
                f"`align data check {text}` says what is wrong with each.",
            )
        found.append(DataFile(_free_name(source.path, found), source.path, form, kinds[0]))
    return found


def starter_text(model: str, files: Sequence[DataFile], *, name: str, path: Path) -> str:
    """The text of the recipe that will lie at `path`."""
    if all(file.kind == "prompt" for file in files):
        raise AlignError(
            "there are only prompts in these files: nothing to train on.", "Add conversations or preferences."
        )
    run = f"align run {shlex.quote(str(path))}"
    parts = [HEAD.format(run=run, name=_written(name), model=_written(model))]
    parts += [_data_line(file, path.parent) for file in files]
    names = {kind: [file.name for file in files if file.kind == kind] for kind in PLURALS}
    for kind, members in names.items():
        if len(members) > 1:
            mixed = _free_name(Path(PLURALS[kind]), files)
            parts.append(f"  {mixed}: {{mix: [{', '.join(f'{{data: {member}}}' for member in members)}]}}\n")
            names[kind] = [mixed]
    parts.append("\nstages:")
    parts += _stages({kind: members[0] for kind, members in names.items() if members})
    if names["prompt"]:
        parts.append(f"\nevaluation:\n  prompts: {names['prompt'][0]}  # answered before and after each stage\n")
    return "".join(parts)


def _stages(data: Mapping[str, str]) -> Iterator[str]:
    """Stage blocks, each on top of the last one that writes text; the first carries the adapter that all go on with."""
    start: str | None = None
    for kind, plan in PLANS.items():
        if kind not in data:
            continue
        yield _block(plan, data[kind], start)
        if kind == "preference":
            yield _block(DPO, data[kind], start)
        start = {"text": "pretrain", "conversation": "sft", "preference": "dpo"}.get(kind)


def _block(plan: str, data: str, start: str | None) -> str:
    if start:
        return plan.format(data=data, start=f"    from: {start}\n")
    return plan.format(data=data, start="") + ADAPTER


def _data_line(file: DataFile, folder: Path) -> str:
    settings = f"path: {_written(_relative(file.path, folder))}, format: {file.format}"
    if file.kind == "prompt":
        settings += ", test_fraction: 1.0"  # nothing trains on them, so all of them can measure
    return f"  {file.name}: {{{settings}}}\n"


def _kind(form: str, fields: Mapping[str, object]) -> str | None:
    try:
        return read_row(form, fields).kind
    except RowError:
        return None


def _model_from(model: str, folder: Path) -> str:
    """A local folder as the recipe in `folder` has to write it; anything else untouched."""
    path = Path(model).expanduser()
    if path.is_dir():
        relative = _relative(path, folder)
        return relative if relative.startswith((".", "/")) else f"./{relative}"
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise AlignError(f"there is no model folder '{model}'.", "Give a folder, or a hub id such as Qwen/Qwen3-0.6B.")
    return model


def _relative(path: Path, folder: Path) -> str:
    relative = Path(os.path.relpath(path.resolve(), folder.resolve()))
    far = relative.parts[: MOST_STEPS_UP + 1].count("..") > MOST_STEPS_UP
    return (path.resolve() if far else relative).as_posix()


def _checked_name(name: str) -> str:
    try:
        return TypeAdapter(Name).validate_python(name)
    except ValidationError:
        raise AlignError(f"a recipe cannot be called {shown(name)}: {NAME_RULE}.") from None


def _recipe_name(model: str) -> str:
    return _name_from(Path(model).resolve().name if Path(model).is_dir() else model.rpartition("/")[2])


def _name_from(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-_")[:48] or "recipe"


def _free_name(path: Path, taken: Sequence[DataFile]) -> str:
    """The file's stem as a name of the recipe, numbered when it is taken."""
    stem = _name_from(path.name.partition(".")[0])
    stem = stem if _is_plain(stem) else f"data-{stem}"  # 2024.jsonl would otherwise need quotes wherever it is named
    names = {file.name for file in taken}
    return next(
        name for name in itertools.chain([stem], (f"{stem}-{n}" for n in itertools.count(2))) if name not in names
    )


def _written(text: str) -> str:
    """A string as YAML: plain where that reads back as the same text, else quoted."""
    return text if _is_plain(text) else json.dumps(text, ensure_ascii=False)


def _is_plain(text: str) -> bool:
    try:
        return bool(PLAIN.fullmatch(text)) and isinstance(scalar(text, Place("", 0)), str)
    except AlignError:  # 010
        return False
