"""docs/settings.md and the JSON schema of a recipe, both made from the models of `recipe.py`.

`align recipe settings > docs/settings.md` writes the page anew; a test holds the file against it.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from align.recipe.settings import (
    ADAPTER_FACTOR,
    PEAK_LEARNING_RATE,
    AdapterSettings,
    DataSettings,
    EvaluationSettings,
    MixSettings,
    Recipe,
    TrainingSettings,
)
from align.recipe.types import LOSS_MODELS, STAGE_MODELS, in_words, keys_of

SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"

PREAMBLE = """# Settings of a recipe

Made from `align/recipe/settings.py` by `align recipe settings > docs/settings.md`; do not edit it by hand. `align recipe schema`
prints the same as a JSON schema for editors, `align recipe show RECIPE` a recipe with every default filled in.

Unknown keys are refused, and so is a value of another type: nothing that is written in a recipe is ever changed.
Numbers may be written as `1e-5`; `yes`, `no`, `on` and `off` are text; paths are relative to the recipe. Any key can be
set from the command line: `--set stages.sft.epochs=3`.
"""


def settings_page() -> str:
    """The whole of docs/settings.md."""
    shared = set(keys_of(TrainingSettings)) - {"kind"}
    sections = [
        _section("The recipe", Recipe, "Keys at the top of the file."),
        _section("data", DataSettings, f"{_doc(DataSettings)} Each entry of `data:` is one of these, or just a path."),
        _section("data: mix", MixSettings, f"{_doc(MixSettings)} An entry of a data set's `mix:` list."),
        _section("evaluation", EvaluationSettings, _doc(EvaluationSettings)),
        _section("Every stage that trains", TrainingSettings, _training_text(), leave_out={"kind"}),
        _section("adapter", AdapterSettings, f"{_doc(AdapterSettings)} The `adapter:` block of a stage."),
    ]
    for kind, model in STAGE_MODELS.items():
        trains = issubclass(model, TrainingSettings)
        rest = " Also has every setting of a stage that trains." if trains else ""
        sections.append(
            _section(f"kind: {kind}", model, _doc(model) + rest, leave_out={"kind", *(shared if trains else ())})
        )
    sections += [
        _section(f"loss: {kind}", model, f"{_doc(model)} A loss of a dpo stage.", leave_out={"kind"})
        for kind, model in LOSS_MODELS.items()
    ]
    return "\n".join([PREAMBLE, *sections])


def recipe_schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors (`# yaml-language-server: $schema=...`). Knows the short forms as well."""
    schema = Recipe.model_json_schema(by_alias=True)
    definitions = schema["$defs"]
    named = schema["properties"]["data"]
    for pattern, entry in named["patternProperties"].items():
        named["patternProperties"][pattern] = {"anyOf": [{"type": "string", "title": "Path"}, entry]}
    loss = definitions["DpoSettings"]["properties"]["loss"]
    union = {key: loss.pop(key) for key in ("discriminator", "oneOf")}
    loss["anyOf"] = [{"enum": list(LOSS_MODELS), "title": "Name"}, union]
    for mapping in (named, schema["properties"]["stages"]):
        mapping["additionalProperties"] = False
    return {"$schema": SCHEMA_DIALECT, **schema, "title": "Recipe of align"}


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


def _training_text() -> str:
    kinds = ", ".join(kind for kind, model in STAGE_MODELS.items() if issubclass(model, TrainingSettings))
    rates = ", ".join(f"{rate:g} for {kind}" for kind, rate in PEAK_LEARNING_RATE.items())
    return (
        f"Shared by the kinds {kinds}. The learning rate, where it is left out, is {rates}; {ADAPTER_FACTOR} times that "
        "where an adapter is trained."
    )
