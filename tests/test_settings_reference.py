"""The settings page is fresh and complete, and the JSON schema accepts what the reader accepts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from align.cli.recipes import recipe_group
from align.recipe.reference import recipe_schema, settings_page
from align.recipe.settings import Recipe
from align.recipe.types import BLOCKS, STAGE_MODELS, UNIONS, in_words, keys_of, places_of
from align.recipe.yaml_text import parse_yaml

ROOT = Path(__file__).parents[1]


def test_the_settings_page_is_fresh():
    page = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
    assert page == settings_page(), "run: align recipe settings > docs/settings.md"


def test_every_key_of_every_model_stands_on_the_page_with_a_sentence():
    page = settings_page()
    unions = {f"{union}: {kind}": model for union, models in UNIONS.items() for kind, model in models.items()}
    for model in (Recipe, *STAGE_MODELS.values(), *unions.values(), *BLOCKS.values()):
        for key, field in keys_of(model).items():
            assert field.description or key == "kind"
            assert f"| `{key}` |" in page or key == "kind"
    for title in (*(f"kind: {kind}" for kind in STAGE_MODELS), *unions, *BLOCKS):
        assert re.search(rf"^## {re.escape(title)}$", page, re.MULTILINE)


def test_the_commands_print_them():
    run = CliRunner().invoke
    assert run(recipe_group, ["settings"]).output == settings_page()
    assert json.loads(run(recipe_group, ["schema"]).output) == recipe_schema()


def test_show_prints_the_resolved_recipe_and_its_yaml_reads_back():
    path = str(ROOT / "recipes/qwen3-0.6b-chain.yaml")
    run = CliRunner().invoke
    as_json = json.loads(run(recipe_group, ["show", path, "--json", "--set", "seed=3"]).output)
    assert as_json["stages"]["dpo"]["seed"] == 3
    as_yaml = run(recipe_group, ["show", path, "--set", "seed=3"]).output
    assert parse_yaml(as_yaml, "shown").plain() == as_json


@pytest.mark.parametrize(
    ("key", "places"),
    [
        ("rank", ["'adapter'"]),
        ("label_smoothing", ["'loss' of kind sigmoid or robust"]),
        ("rows", ["'evaluation'"]),
        ("beta", ["a stage of kind dpo"]),
        ("kl_limit", ["'guards'"]),
        ("divide_by_std", ["'estimator' of kind grpo"]),
        ("pattern", ["'reward' of kind regex"]),
        ("nonsense", []),
    ],
)
def test_a_key_in_the_wrong_place_is_known_where_it_belongs(key, places):
    assert places_of(key) == places


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int | None, "a whole number"),
        (str | list[str], "text or a list of text"),
        (dict[str, float], "a mapping of names to a number"),
    ],
)
def test_types_are_said_in_words(annotation, words):
    assert in_words(annotation) == words


# The schema, against a validator for the part of JSON Schema that it uses -------------------------------------------


def flaws(value: Any, schema: dict[str, Any], root: dict[str, Any], where: str = "") -> list[str]:
    """What is wrong with a value; written from the specification, independent of pydantic."""
    if "$ref" in schema:
        return flaws(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root, where)
    for word, enough in (("anyOf", lambda n: n >= 1), ("oneOf", lambda n: n == 1)):
        if word in schema:
            tried = [flaws(value, option, root, where) for option in schema[word]]
            return [] if enough(tried.count([])) else [f"{where}: fits {tried.count([])} of {word}"]
    if "const" in schema and value != schema["const"]:
        return [f"{where}: not {schema['const']}"]
    if "enum" in schema and value not in schema["enum"]:
        return [f"{where}: not one of {schema['enum']}"]
    types = {"string": str, "integer": int, "number": int | float, "boolean": bool, "null": type(None), "array": list,
             "object": dict}  # fmt: skip
    kind = schema.get("type")
    if kind and (not isinstance(value, types[kind]) or (isinstance(value, bool) and kind in ("integer", "number"))):
        return [f"{where}: no {kind}"]
    if kind in ("integer", "number"):
        return _range_flaws(value, schema, where)
    if kind == "array":
        if len(value) < schema.get("minItems", 0):
            return [f"{where}: too short"]
        return [flaw for i, item in enumerate(value) for flaw in flaws(item, schema["items"], root, f"{where}.{i}")]
    return _object_flaws(value, schema, root, where) if kind == "object" else []


def _range_flaws(value: float, schema: dict[str, Any], where: str) -> list[str]:
    holds = {
        "minimum": lambda limit: value >= limit, "exclusiveMinimum": lambda limit: value > limit,
        "maximum": lambda limit: value <= limit, "exclusiveMaximum": lambda limit: value < limit,
    }  # fmt: skip
    return [f"{where}: {word}" for word, test in holds.items() if word in schema and not test(schema[word])]


def _object_flaws(value: dict[str, Any], schema: dict[str, Any], root: dict[str, Any], where: str) -> list[str]:
    found = [f"{where}: no {key}" for key in schema.get("required", ()) if key not in value]
    for key, item in value.items():
        inner = schema.get("properties", {}).get(key)
        if inner is None:
            patterns = schema.get("patternProperties", {}).items()
            inner = next(
                (s for pattern, s in patterns if re.search(pattern, key)), schema.get("additionalProperties", True)
            )
        if inner is False:
            found.append(f"{where}: unknown {key}")
        elif isinstance(inner, dict):
            found += flaws(item, inner, root, f"{where}.{key}")
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_the_schema_accepts_every_shipped_recipe(path):
    schema = recipe_schema()
    assert schema["$schema"].startswith("https://json-schema.org/")
    recipe = parse_yaml(path.read_text(encoding="utf-8"), path.name).plain()
    if "stages" in recipe:
        assert flaws(recipe, schema, schema) == []


@pytest.mark.parametrize(
    ("change", "flawed"),
    [
        ({}, False),
        ({"data": {"d": "a/path"}}, False),
        ({"data": {"d": 3}}, True),
        ({"data": {"two words": "f"}}, True),
        ({"epochs": 3}, True),
        ({"seed": -1}, True),
        ({"seed": True}, True),
        ({"stages": {"s": {"kind": "dpo", "data": "d", "loss": "ipo"}}}, False),
        ({"stages": {"s": {"kind": "dpo", "data": "d", "loss": "ippo"}}}, True),
        ({"stages": {"s": {"kind": "dpo", "data": "d", "loss": {"kind": "robust", "label_smoothing": 0.2}}}}, False),
        ({"stages": {"s": {"kind": "dpo", "data": "d", "loss": {"kind": "ipo", "label_smoothing": 0.2}}}}, True),
        ({"stages": {"s": {"kind": "sft", "data": "d", "from": "x", "epochs": 0.5}}}, False),
        ({"stages": {"s": {"kind": "sft", "data": "d", "epochs": 0}}}, True),
        ({"stages": {"s": {"kind": "sft", "data": "d", "bata": 1}}}, True),
        ({"stages": {"s": {"kind": "sft"}}}, True),
        ({"stages": {"s": {"kind": "ppo", "prompts": "d", "reward": "r"}}}, False),
        (
            {
                "stages": {
                    "s": {
                        "kind": "ppo",
                        "prompts": "d",
                        "reward": ["r", {"kind": "judge"}],
                        "watch": {"kind": "exact_match"},
                    }
                }
            },
            False,
        ),
        (
            {"stages": {"s": {"kind": "ppo", "prompts": "d", "reward": {"kind": "model", "from": "r", "weight": -1}}}},
            False,
        ),
        ({"stages": {"s": {"kind": "ppo", "prompts": "d", "reward": 3}}}, True),
        ({"stages": {"s": {"kind": "ppo", "prompts": "d", "reward": {"kind": "length"}}}}, True),
        ({"stages": {"s": {"kind": "ppo", "prompts": "d", "reward": ["r", {"kind": "regexx"}]}}}, True),
        ({"stages": {"s": {"kind": "ppo", "prompts": "d", "reward": []}}}, True),
        (
            {"stages": {"s": {"kind": "ppo", "prompts": "d", "reward": "r", "estimator": "rloo", "value": "auto"}}},
            False,
        ),
        ({"stages": {"s": {"kind": "ppo", "prompts": "d", "reward": "r", "estimator": "gea"}}}, True),
        (
            {
                "stages": {
                    "s": {"kind": "ppo", "prompts": "d", "reward": "r", "estimator": {"kind": "gae", "lambda": 0.9}}
                }
            },
            False,
        ),
        ({"stages": {"s": {"kind": "ppo", "prompts": "d", "reward": "r", "value": "adaptr"}}}, True),
        ({"stages": {"s": {"kind": "ppo", "prompts": "d", "reward": "r", "value": {"kind": "trunk"}}}}, False),
        ({"stages": {"s": {"kind": "ppo", "prompts": "d", "reward": "r", "guards": {"stop_on": ["kl"]}}}}, False),
        ({"stages": {"s": {"kind": "ppo", "prompts": "d", "reward": "r", "data": "d"}}}, True),
    ],
)
def test_schema_and_reader_agree(change, flawed):
    schema = recipe_schema()
    recipe = {"name": "n", "model": "m", "data": {"d": "f"}, "stages": {"s": {"kind": "sft", "data": "d"}}, **change}
    assert bool(flaws(recipe, schema, schema)) is flawed
    if flawed:
        with pytest.raises(ValueError):
            Recipe.model_validate(recipe)
    else:
        Recipe.model_validate(recipe)
