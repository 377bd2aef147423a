"""docs/settings.md and the JSON schema of a recipe, both made from the models of `recipe.py`.

`align recipe settings > docs/settings.md` writes the page anew; a test holds the file against it.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from align.recipe.critique_settings import CritiqueWork
from align.recipe.loop_settings import GIVEN
from align.recipe.ppo_settings import GuardSettings, ValueSettings
from align.recipe.settings import (
    ADAPTER_FACTOR,
    AdapterSettings,
    ConstitutionSettings,
    DataSettings,
    EvaluationSettings,
    LaunchSettings,
    MixSettings,
    Recipe,
    TrainingSettings,
)
from align.recipe.training_settings import PEAK_LEARNING_RATE
from align.recipe.types import (
    CRITIC_MODELS,
    ESTIMATOR_MODELS,
    LOSS_MODELS,
    REWARD_MODELS,
    STAGE_MODELS,
    choices,
    in_words,
    keys_of,
)

SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"

PREAMBLE = """# Settings of a recipe

Made from `align/recipe/settings.py` by `align recipe settings > docs/settings.md`; do not edit it by hand. `align recipe schema`
prints the same as a JSON schema for editors, `align recipe show RECIPE` a recipe with every default filled in.

Unknown keys are refused, and so is a value of another type: nothing that is written in a recipe is ever changed.
Numbers may be written as `1e-5`, and whole numbers and `epochs` are at most 1000000000; `yes`, `no`, `on` and `off` are text;
paths are relative to the recipe. Any key can be set from the command line: `--set stages.sft.epochs=3`.
"""


def settings_page() -> str:
    """The whole of docs/settings.md."""
    shared = set(keys_of(TrainingSettings)) - {"kind"}
    sections = [
        _section("The recipe", Recipe, "Keys at the top of the file."),
        _section("data", DataSettings, f"{_doc(DataSettings)} Each entry of `data:` is one of these, or just a path."),
        _section("data: mix", MixSettings, f"{_doc(MixSettings)} An entry of a data set's `mix:` list."),
        _section("evaluation", EvaluationSettings, _doc(EvaluationSettings)),
        _section("launch", LaunchSettings, _doc(LaunchSettings)),
        _section("Every stage that trains", TrainingSettings, _training_text(), leave_out={"kind"}),
        _section("adapter", AdapterSettings, f"{_doc(AdapterSettings)} The `adapter:` block of a stage."),
    ]
    for kind, model in STAGE_MODELS.items():
        trains = issubclass(model, TrainingSettings)
        looped = keys_of(CritiqueWork) if model is ConstitutionSettings else ()
        leave_out = {"kind", *(shared if trains else ()), *looped}
        sections.append(_section(f"kind: {kind}", model, _doc(model) + _shared_text(model), leave_out=leave_out))
    for title, what, models in (
        ("loss", "A loss of a dpo stage.", LOSS_MODELS),
        ("reward", "A part of the `reward:` or `watch:` of a ppo stage.", REWARD_MODELS),
        ("estimator", "An `estimator:` of a ppo stage.", ESTIMATOR_MODELS),
        ("critic", "A `critic:` of a critique or constitution stage.", CRITIC_MODELS),
    ):
        sections += [
            _section(f"{title}: {kind}", model, f"{_doc(model)} {what}", leave_out={"kind"})
            for kind, model in models.items()
        ]
    sections += [
        _section("value", ValueSettings, f"{_doc(ValueSettings)} The `value:` block of a ppo stage."),
        _section("guards", GuardSettings, f"{_doc(GuardSettings)} The `guards:` block of a ppo stage."),
    ]
    return "\n".join([PREAMBLE, *sections])


def recipe_schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors (`# yaml-language-server: $schema=...`). Knows the short forms as well."""
    schema = Recipe.model_json_schema(by_alias=True)
    definitions = schema["$defs"]
    named = schema["properties"]["data"]
    for pattern, entry in named["patternProperties"].items():
        named["patternProperties"][pattern] = {"anyOf": [{"type": "string", "title": "Path"}, entry]}
    _free_rounds(definitions)
    ppo = definitions["PpoSettings"]["properties"]
    _allow_word(definitions["DpoSettings"]["properties"]["loss"], list(LOSS_MODELS))
    _allow_word(ppo["estimator"], list(ESTIMATOR_MODELS))
    for looping in ("CritiqueSettings", "ConstitutionSettings"):
        _allow_word(definitions[looping]["properties"]["critic"], list(CRITIC_MODELS))
    _allow_word(ppo["value"], choices(ValueSettings))
    for rewards in (ppo["reward"], ppo["watch"]):
        one = {"anyOf": [{"type": "string", "title": "Name"}, rewards.pop("items")]}
        listed = {key: rewards.pop(key) for key in ("type", "minItems") if key in rewards} | {"items": one}
        rewards["anyOf"] = [*one["anyOf"], listed]
    for mapping in (named, schema["properties"]["stages"]):
        mapping["additionalProperties"] = False
    return {"$schema": SCHEMA_DIALECT, **schema, "title": "Recipe of align"}


def _free_rounds(definitions: dict[str, Any]) -> None:
    """The blocks `train` and `reward` of a loop, whose rounds say by themselves where they start and on what they train."""
    blocks = definitions["ConstitutionSettings"]["properties"]
    for kind in ("SftSettings", "DpoSettings", "PpoSettings", "RewardSettings"):
        own = copy.deepcopy(definitions[kind])
        own["properties"] = {key: value for key, value in own["properties"].items() if key not in GIVEN}
        own["required"] = ["kind"] if kind != "RewardSettings" else []
        definitions[f"Round{kind}"] = own
    text = json.dumps({key: blocks[key] for key in ("train", "reward")})
    blocks |= json.loads(text.replace("#/$defs/", "#/$defs/Round"))


def _allow_word(schema: dict[str, Any], words: list[str]) -> None:
    """Lets a bare word stand where the schema asks for a mapping."""
    mapping = {key: schema.pop(key) for key in ("discriminator", "oneOf", "$ref") if key in schema}
    schema["anyOf"] = [{"enum": words, "title": "Name"}, mapping]


def _section(title: str, model: type[BaseModel], text: str, *, leave_out: Iterable[str] = ()) -> str:
    rows = [_row(key, field) for key, field in keys_of(model).items() if key not in set(leave_out)]
    heading = f"## {title}\n\n{text}\n"
    if not rows:
        return heading
    return "\n".join([heading, "| key | takes | default | what it does |", "|---|---|---|---|", *rows, ""])


def _row(key: str, field: FieldInfo) -> str:
    takes = in_words(field.annotation, tuple(field.metadata))
    sentence = (field.description or "").replace("|", "\\|")
    return f"| `{key}` | {takes} | {_default(field)} | {sentence} |"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if isinstance(value, BaseModel):
        return f"`{value.kind}`" if "kind" in type(value).model_fields and hasattr(value, "kind") else "its defaults"
    return "none" if value is None else f"`{json.dumps(value)}`" if not isinstance(value, str) else f"`{value}`"


def _doc(model: type[BaseModel]) -> str:
    return " ".join((inspect.getdoc(model) or "").split())


def _shared_text(model: type[BaseModel]) -> str:
    """What a stage has besides its own keys."""
    if model is ConstitutionSettings:
        return " Also has the settings of a critique stage."
    if not issubclass(model, TrainingSettings):
        return ""
    data = model.model_fields["data"].alias
    return f" Also has every setting of a stage that trains{f', with `{data}` for `data`' if data else ''}."


def _training_text() -> str:
    kinds = ", ".join(kind for kind, model in STAGE_MODELS.items() if issubclass(model, TrainingSettings))
    rates = ", ".join(f"{rate:g} for {kind}" for kind, rate in PEAK_LEARNING_RATE.items())
    return (
        f"Shared by the kinds {kinds}. The learning rate, where it is left out, is {rates}; {ADAPTER_FACTOR} times that "
        "where an adapter is trained."
    )
