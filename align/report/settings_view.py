"""Settings of a stage, those that differ from their default apart from the rest, with the default beside."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from align.recipe.settings import ADAPTER_FACTOR, Stage
from align.recipe.training_settings import PEAK_LEARNING_RATE
from align.report import words


@dataclass(frozen=True)
class Setting:
    """One setting: its value, its default (empty where there is none), and the sentence of `recipe.py`."""

    name: str
    value: str
    default: str
    about: str


@dataclass(frozen=True)
class SettingsView:
    """Settings that were chosen, and those left at their default."""

    chosen: tuple[Setting, ...]
    defaults: tuple[Setting, ...]


def settings_view(kind: str, settings: Mapping[str, Any]) -> SettingsView:
    """Settings of a stage of this kind; of an unknown kind, all count as chosen."""
    fields = _fields(kind)
    shown = [
        (_setting(name, value, fields), _is_default(name, value, fields) or _usual_rate(kind, name, settings))
        for name, value in settings.items()
    ]
    return SettingsView(
        tuple(setting for setting, default in shown if not default and setting.name != "kind"),
        tuple(setting for setting, default in shown if default),
    )


def _fields(kind: str) -> dict[str, Any]:
    for model in get_args(get_args(Stage)[0]):
        if issubclass(model, BaseModel) and kind in get_args(model.model_fields["kind"].annotation):
            return {info.alias or name: info for name, info in model.model_fields.items()}
    return {}


def _setting(name: str, value: Any, fields: Mapping[str, Any]) -> Setting:
    name = "from" if name == "from_" else name
    known = fields.get(name)
    default = "" if known is None or known.default is PydanticUndefined else words.plain(_simple(known.default))
    about = (known.description or "") if known else ""
    return Setting(name, words.one_line(words.plain(value), 300), default, about)


def _is_default(name: str, value: Any, fields: Mapping[str, Any]) -> bool:
    known = fields.get("from" if name == "from_" else name)
    return known is not None and bool(_simple(known.default) == value)


def _usual_rate(kind: str, name: str, settings: Mapping[str, Any]) -> bool:
    """Whether this is the learning rate that the kind of the stage brings along."""
    factor = ADAPTER_FACTOR if settings.get("adapter") else 1
    usual = PEAK_LEARNING_RATE.get(kind, 0.0) * factor
    return name == "learning_rate" and isinstance(settings[name], float) and math.isclose(settings[name], usual)


def _simple(value: Any) -> Any:
    return value.model_dump(mode="json", by_alias=True) if isinstance(value, BaseModel) else value
