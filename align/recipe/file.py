"""A recipe file with its overrides -> checked settings that know where they were written.

    recipe = load_recipe(Path("recipes/quickstart.yaml"), ["stages.sft.epochs=3"])

What can be found without data, models or the registry is refused here, all of it at once. Left out: whether files and
hub ids exist, and whether data fit a stage; those who open them say so.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from align.errors import AlignError, did_you_mean
from align.recipe.graph import check_graph, trains_adapter
from align.recipe.places import node_at, refusal
from align.recipe.ppo_settings import ModelReward
from align.recipe.problems import model_at, owner, problems_of
from align.recipe.settings import ADAPTER_FACTOR, Recipe, Stage, TrainingSettings
from align.recipe.types import keys_of, kind_of, short_key
from align.recipe.yaml_text import Node, Place, decoded, parse_yaml, shown
from align.small_files import read_small

Steps = tuple[str | int, ...]  # keys and places that lead to a value of the recipe
SUFFIXES = (".yaml", ".yml", ".json")


@dataclass(frozen=True, slots=True)
class RecipeFile:
    """A recipe, the file it came from, and the place of every value in it."""

    path: Path
    recipe: Recipe
    root: Node

    @property
    def folder(self) -> Path:
        """Paths in the recipe are relative to this."""
        return self.path.parent

    def place(self, *path: str | int) -> str:
        """Where a setting was written, for error messages: place('stages', 'sft', 'data') is 'recipes/x.yaml:9'.

        For a setting that the file leaves out it is the place of what would hold it.
        """
        return str(node_at(self.root, path)[0].place)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The checked recipe in a YAML (or JSON) file. overrides: 'stages.sft.epochs=3', each a path and a YAML value.

    Raises AlignError that names file and line (or the override) of each problem.
    """
    return read_recipe(path, overrides).recipe


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> RecipeFile:
    """As `load_recipe`, with the places kept."""
    root = parse_yaml(_text_of(path), str(path))
    if root is None:
        raise AlignError(f"{path} is empty.", "`align init --model MODEL --data FILE` writes a recipe to start from.")
    if not isinstance(root.value, dict):
        raise AlignError(f"{root.place}: a recipe is a mapping with 'name', 'model', 'data' and 'stages'.")
    for override in overrides:
        root = _overridden(root, override)
    try:
        recipe = Recipe.model_validate(root.plain())
    except ValidationError as error:
        raise refusal(problems_of(error, root), root) from None
    problems = check_graph(recipe)
    if problems:
        raise refusal(problems, root)
    return RecipeFile(path, with_learning_rates(recipe), root)


def resolved(recipe: Recipe) -> dict[str, Any]:
    """Every setting with the value that is used, defaults included, as plain JSON values under the recipe's keys."""
    settings = with_learning_rates(recipe).model_dump(mode="json", by_alias=True)
    for stage in settings["stages"].values():
        if stage["seed"] is None:
            stage["seed"] = recipe.seed
        adapter = stage.get("adapter")
        if adapter and adapter["alpha"] is None:
            adapter["alpha"] = 2.0 * adapter["rank"]
    return settings


def _text_of(path: Path) -> str:
    try:
        content = read_small(path)
    except FileNotFoundError:
        raise AlignError(f"{path}: no such file.", _near_files(path)) from None
    except OSError as error:
        hint = _near_files(path) if path.is_dir() else "Check its permissions, and the way to it."
        raise AlignError(f"{path}: cannot be read: {(error.strerror or 'unknown error').lower()}.", hint) from None
    return decoded(content, path)


def _near_files(path: Path) -> str:
    folder = path if path.is_dir() else path.parent
    found = [str(file) for suffix in SUFFIXES for file in folder.glob(f"*{suffix}")]
    near = difflib.get_close_matches(str(path), found, n=1, cutoff=0.6)
    if near or found:
        return did_you_mean(str(path), near or found)
    return "`align init --model MODEL --data FILE` writes a recipe to start from."


def with_learning_rates(recipe: Recipe) -> Recipe:
    """Fills in each learning rate that was left out; a stage that goes on with an adapter gets the adapter's rate."""
    stages: dict[str, Stage] = {}
    for name, stage in recipe.stages.items():
        if isinstance(stage, TrainingSettings) and stage.learning_rate is None:
            inherited = trains_adapter(recipe, name) and not stage.adapter
            rate = round(stage.peak_learning_rate() * (ADAPTER_FACTOR if inherited else 1), 12)
            stage = stage.model_copy(update={"learning_rate": rate})
        stages[name] = stage
    return recipe.model_copy(update={"stages": stages})


# Overrides -----------------------------------------------------------------------------------------------------------


def _overridden(root: Node, override: str) -> Node:
    """The tree with one value replaced or added by 'path.to.key=value'."""
    source = f"--set {override}"
    keys, equals, text = override.partition("=")
    path = keys.strip().split(".")
    if not equals or not all(path):
        raise AlignError(f"{source}: an override is a path and a value, as in --set stages.sft.epochs=3")
    place = Place(source, 0)
    value = parse_yaml(text, source, numbered=False) or Node(None, place, place)
    return _replaced(root, root, path, 0, value)


def _replaced(root: Node, node: Node, path: Sequence[str | int], depth: int, value: Node) -> Node:
    """`node`, which lies at path[:depth], with `value` put at the end of the path."""
    if depth == len(path):
        return value
    walked, step = tuple(path[:depth]), str(path[depth])
    if isinstance(node.value, list):
        items = list(node.value)
        if not step.isdecimal() or int(step) >= len(items):
            known = f"it has the parts 0 to {len(items) - 1}" if items else "it is empty"
            raise AlignError(f"{value.place}: {owner(walked)} has no part {shown(step)}; {known}.")
        number = int(step)
        items[number] = _replaced(root, items[number], [*walked, number, *path[depth + 1 :]], depth + 1, value)
        return replace(node, value=items)
    entries = _entries(root, node, walked, value.place)
    if step not in entries:
        _check_new_key(root, walked, [str(later) for later in path[depth:]], entries, value.place)
    child = entries.get(step) or Node(None, value.place, value.place)
    return replace(node, value={**entries, step: _replaced(root, child, path, depth + 1, value)})


def _entries(root: Node, node: Node, walked: Steps, place: Place) -> dict[str, Node]:
    """Entries of the mapping that a path goes through; null is an empty one, a bare string its short form."""
    if isinstance(node.value, dict):
        return node.value
    if node.value is None:
        return {}
    model = model_at(root, walked)
    short = short_key(model) if model and isinstance(node.value, str) else None
    if model is None or short is None:
        raise AlignError(f"{place}: {owner(walked)} is {node.shown()}, which has no keys.")
    kind = {"kind": replace(node, value=kind_of(model))} if model is ModelReward else {}
    return {**kind, short: node}


def _check_new_key(root: Node, walked: Steps, rest: list[str], entries: dict[str, Node], place: Place) -> None:
    """A path may create keys that the settings know, and a whole new stage or data set, but no half of one."""
    model = model_at(root, walked)
    known = list(keys_of(model)) if model else list(entries)
    if len(rest) > 1 and rest[0] not in known:
        what = {"stages": "stage", "data": "data set"}.get(".".join(map(str, walked)), "key")
        where = "the recipe" if what != "key" else owner(walked)
        raise AlignError(f"{place}: no {what} {shown(rest[0])} in {where}. {did_you_mean(rest[0], known)}")
