"""What is wrong with a recipe, each point with its file and line: pydantic's errors put into sentences.

recipes/dpo.yaml:9: unknown key 'bata' in stage 'dpo'. Did you mean 'beta'?
recipes/dpo.yaml:12: 'epochs' of stage 'sft' is 'three'; it must be a number, above 0.
"""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from align.errors import did_you_mean
from align.recipe.places import Path, Problem, child_at, node_at
from align.recipe.settings import Recipe
from align.recipe.training_settings import MOST_COUNT
from align.recipe.types import (
    NAME_RULE,
    STAGE_MODELS,
    choices,
    in_words,
    item_type,
    keys_of,
    model_for,
    model_of_word,
    one_of_list,
    places_of,
)
from align.recipe.yaml_text import Node, shown


def problems_of(error: ValidationError, root: Node) -> list[Problem]:
    """Pydantic's errors about the tree `root`; several about one value (a union's members) become one."""
    return list(dict.fromkeys(_problem(details, root) for details in error.errors(include_url=False)))


def owner(path: Path) -> str:
    """What a path leads to, in words: ('stages', 'dpo', 'loss') is "'loss' of stage 'dpo'"."""
    match path:
        case ():
            return "the recipe"
        case ("data", name):
            return f"data set {shown(name)}"
        case ("stages", name):
            return f"stage {shown(name)}"
        case (*above, int(index)):
            return f"part {index + 1} of {owner(tuple(above))}"
        case (key,):
            return shown(key)
        case (*above, key):
            return f"{shown(key)} of {owner(tuple(above))}"
    raise AssertionError(path)


def field_at(root: Node, path: Path) -> FieldInfo | None:
    """The setting that a path leads to, or None where it leads to no single setting."""
    annotation: Any = Recipe
    field: FieldInfo | None = None
    node: Node | None = root
    for step in path:
        model = _model_of(annotation, node)
        field = keys_of(model).get(str(step)) if model and isinstance(step, str) else None
        annotation = field.annotation if field else item_type(annotation)
        node = child_at(node, step) if node else None
    return field


def model_at(root: Node, path: Path) -> type[BaseModel] | None:
    """The model that reads the mapping at `path`."""
    annotation: Any = Recipe
    node: Node | None = root
    for step in path:
        model = _model_of(annotation, node)
        field = keys_of(model).get(str(step)) if model else None
        annotation = field.annotation if field else item_type(annotation)
        node = child_at(node, step) if node else None
    return _model_of(annotation, node)


def _model_of(annotation: Any, node: Node | None) -> type[BaseModel] | None:
    if node is None or isinstance(node.value, str):
        return model_of_word(annotation, node.value) if node and isinstance(node.value, str) else model_for(annotation)
    kind = child_at(node, "kind")
    return model_for(annotation, kind and kind.value)


def _problem(details: ErrorDetails, root: Node) -> Problem:
    location = _without_tag(details["loc"])
    node, path = node_at(root, location)
    match details["type"]:
        case "extra_forbidden":
            return _unknown_key(root, path)
        case "missing":
            return _missing(root, path, str(location[-1]))
        case "union_tag_not_found" if isinstance(node.value, dict):
            return _missing(root, path, "kind")
        case "union_tag_invalid":
            return _unknown_kind(root, path, details)
        case "too_short" if isinstance(node.value, list):
            return Problem(path, f"{owner(path)} is empty; it needs at least one entry.")
        case "value_error":
            return Problem(path, f"{owner(path)}: {details['ctx']['error']}.", at_key=True)
        case "less_than_equal" if details["ctx"]["le"] == MOST_COUNT:
            return Problem(path, f"{owner(path)} is {node.shown()}; it must be at most {MOST_COUNT}.")
    if location and location[-1] == "[key]":
        return Problem(path, f"{owner(path)} needs another name: {NAME_RULE}.", at_key=True)
    return _wrong_value(root, path, node)


def _without_tag(location: Path) -> Path:
    """Pydantic's place without the kind that it names after a stage; `reward` is both a kind and a key."""
    tagged = location[:1] == ("stages",) and len(location) > 2 and location[2] in STAGE_MODELS
    return (*location[:2], *location[3:]) if tagged else location


def _unknown_key(root: Node, path: Path) -> Problem:
    *above, key = path
    mapping = node_at(root, above)[0].value
    model = model_at(root, tuple(above))
    known = list(keys_of(model)) if model else []
    free = [name for name in known if not isinstance(mapping, dict) or name not in mapping]
    near = [word for words in (free, known) for word in difflib.get_close_matches(str(key), words, n=1, cutoff=0.6)]
    elsewhere = places_of(str(key))
    advice = did_you_mean(str(key), near[:1] or known)
    if elsewhere and not near:
        advice = f"It belongs in {' or '.join(elsewhere)}."
    return Problem(path, f"unknown key {shown(key)} in {owner(tuple(above))}. {advice}", at_key=True)


def _missing(root: Node, path: Path, key: str) -> Problem:
    field = field_at(root, (*path, key))
    if key == "kind":
        return Problem(path, f"{owner(path)} has no 'kind'.", f"Known kinds: {_kinds(root, path)}.", at_key=True)
    return Problem(path, f"{owner(path)} has no '{key}'.", _sentence(key, field), at_key=True)


def _unknown_kind(root: Node, path: Path, details: ErrorDetails) -> Problem:
    node, _ = node_at(root, path)
    place = path if not isinstance(node.value, dict) else (*path, "kind")
    tag = str(details["ctx"]["tag"])
    return Problem(place, f"unknown kind {shown(tag)} of {owner(path)}. {did_you_mean(tag, _kind_list(root, path))}")


def _wrong_value(root: Node, path: Path, node: Node) -> Problem:
    field = field_at(root, path)
    expected = in_words(field.annotation, tuple(field.metadata)) if field else _item_words(root, path)
    message = f"{owner(path)} is {node.shown()}; it must be {expected}."
    options = choices(field.annotation) if field else []
    if isinstance(node.value, str) and difflib.get_close_matches(node.value, options, n=1, cutoff=0.6):
        message += f" {did_you_mean(node.value, options)}"
    if expected.startswith(("text", "a name")) and isinstance(node.value, int | float):
        message += f" In quotes it is: '{node.text}'."
    return Problem(path, message, _sentence(str(path[-1]), field) if path else "")


def _item_words(root: Node, path: Path) -> str:
    if not path:
        return "a mapping with 'name', 'model', 'data' and 'stages'"
    above = field_at(root, path[:-1])
    return in_words(item_type(above.annotation)) if above else "something else"


def _kinds(root: Node, path: Path) -> str:
    return ", ".join(_kind_list(root, path))


def _kind_list(root: Node, path: Path) -> list[str]:
    field = field_at(root, path)
    if field:
        return choices(one_of_list(field.annotation))
    above = field_at(root, path[:-1])
    return choices(item_type(above.annotation)) if above else []


def _sentence(key: str, field: FieldInfo | None) -> str:
    return f"{key}: {field.description}" if field and field.description else ""
