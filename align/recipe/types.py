"""What each setting of a recipe takes, in words, read from the pydantic models of `recipe.py`.

Error messages, the settings reference and the starter recipe all say it the same way, because they all ask here.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from align.recipe.critique_settings import Critic, EndpointCritic
from align.recipe.ppo_settings import Estimator, FunctionReward, GuardSettings, ModelReward, Reward, ValueSettings
from align.recipe.settings import AdapterSettings, DataSettings, DpoLoss, Recipe, Stage
from align.recipe.training_settings import MOST_COUNT

NAME_RULE = "letters, digits, - and _ only, a letter or digit first, at most 64"


def _pattern_of(field: FieldInfo) -> str:
    return next(str(limit.pattern) for limit in field.metadata if getattr(limit, "pattern", None))


PATTERNS = {  # of text that has to be of one form, in words
    _pattern_of(Recipe.model_fields["name"]): f"a name ({NAME_RULE})",
    _pattern_of(FunctionReward.model_fields["name"]): "module:function",
    _pattern_of(EndpointCritic.model_fields["key_env"]): "the name of an environment variable",
}

Annotation = Any  # a type as it stands in an annotation; typing has no name for that


def _members(annotation: Annotation) -> list[Annotation]:
    return [member for member, _ in _constrained(annotation, ())]


def _constrained(annotation: Annotation, constraints: tuple[Any, ...]) -> Iterator[tuple[Annotation, tuple[Any, ...]]]:
    """Each alternative of a type with the limits on it; Annotated and unions are taken apart."""
    origin = _origin(annotation)
    if origin is Annotated:
        inner, *metadata = get_args(annotation)
        limits = tuple(limit for entry in metadata for limit in getattr(entry, "metadata", [entry]))
        yield from _constrained(inner, constraints + limits)
    elif origin in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _constrained(member, constraints)
    else:
        yield annotation, constraints


def _is_model(annotation: Annotation) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _origin(annotation: Annotation) -> Annotation:
    return get_origin(annotation)


def union_models(union: Annotation) -> dict[str, type[BaseModel]]:
    """Members of a tagged union by their `kind`, in the order they are written."""
    return {kind_of(model): model for model in _members(union) if _is_model(model)}


def kind_of(model: type[BaseModel]) -> str:
    """The `kind` that chooses this model."""
    return str(get_args(model.model_fields["kind"].annotation)[0])


STAGE_MODELS = union_models(Stage)
LOSS_MODELS = union_models(DpoLoss)
REWARD_MODELS = union_models(Reward)
ESTIMATOR_MODELS = union_models(Estimator)
CRITIC_MODELS = union_models(Critic)
UNIONS = {  # by the key that takes them
    "loss": LOSS_MODELS, "reward": REWARD_MODELS, "estimator": ESTIMATOR_MODELS, "critic": CRITIC_MODELS,
}  # fmt: skip
BLOCKS: dict[str, type[BaseModel]] = {"adapter": AdapterSettings, "value": ValueSettings, "guards": GuardSettings}
BARE_KINDS: tuple[type[BaseModel], ...] = (
    *LOSS_MODELS.values(),
    *ESTIMATOR_MODELS.values(),
    *CRITIC_MODELS.values(),
    ValueSettings,
)


def keys_of(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Fields by the key that a recipe writes (`from`, not `from_`)."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def model_for(annotation: Annotation, kind: object = None) -> type[BaseModel] | None:
    """The model that a mapping of this type is read into; `kind` chooses in a tagged union. None: no such model."""
    models = [member for member in _members(one_of_list(annotation)) if _is_model(member)]
    if len(models) == 1:
        return models[0]
    return next((model for model in models if kind_of(model) == kind), None)


def model_of_word(annotation: Annotation, word: str) -> type[BaseModel] | None:
    """The model that a bare string is read into where this type is expected. None: it stands for no mapping."""
    if ModelReward in _members(one_of_list(annotation)):
        return ModelReward
    return model_for(annotation, word)


def one_of_list(annotation: Annotation) -> Annotation:
    """Type of one reward where a list of them is expected, since one may stand alone; any other type as it is."""
    item = item_type(annotation)
    return item if item is not None and ModelReward in _members(item) else annotation


def short_key(model: type[BaseModel]) -> str | None:
    """The key that a bare string stands for where a mapping of this model is expected."""
    if model in BARE_KINDS:
        return "kind"
    return {DataSettings: "path", ModelReward: "from"}.get(model)


def item_type(annotation: Annotation) -> Annotation:
    """Type of the items of a list or of the values of a mapping; None for everything else."""
    for member in _members(annotation):
        if _origin(member) in (list, dict):
            return get_args(member)[-1]
    return None


def choices(annotation: Annotation) -> list[str]:
    """The words that may stand here: a Literal's, or the kinds of a tagged union; empty when any value may."""
    found: list[str] = []
    for member in _members(annotation):
        if _origin(member) is Literal:
            found += [str(word) for word in get_args(member)]
        elif member is ValueSettings:
            found += _kinds_of(member)
        elif _is_model(member) and "kind" in member.model_fields and len(_members(annotation)) > 2:
            found.append(kind_of(member))
    return found


def in_words(annotation: Annotation, constraints: tuple[Any, ...] = ()) -> str:
    """'a number above 0', 'one of drop, cut, error', 'a list of text': what may stand here; null is not mentioned."""
    one = one_of_list(annotation)
    if one is not annotation:
        return f"{in_words(one).replace(' or ', ', ')} or a list of these"
    members = [(member, limits) for member, limits in _constrained(annotation, constraints) if member is not type(None)]
    models = [member for member, _ in members if _is_model(member)]
    short = short_key(models[0]) if models else None
    short_form = [] if not short else [_plain_form(models, short)]
    return " or ".join([*short_form, *dict.fromkeys(_member_words(member, limits) for member, limits in members)])


def allows_none(annotation: Annotation) -> bool:
    """Whether null may stand here."""
    return type(None) in _members(annotation)


def places_of(key: str) -> list[str]:
    """Where a key is known, for one that stands in the wrong place: ['stages of kind dpo', "'adapter'"]."""
    kinds = [kind for kind, model in STAGE_MODELS.items() if key in keys_of(model)]
    found = [] if not kinds else ["a stage" if kinds == list(STAGE_MODELS) else f"a stage of kind {' or '.join(kinds)}"]
    for name, field in Recipe.model_fields.items():
        inner = model_for(item_type(field.annotation) or field.annotation)
        if inner and key in keys_of(inner):
            found.append({"data": "a data set"}.get(name, f"'{name}'"))
    found += [f"'{block}'" for block, model in BLOCKS.items() if key in keys_of(model)]
    for union, models in UNIONS.items():
        having = [kind for kind, model in models.items() if key in keys_of(model)]
        if having and key != "kind":
            found.append(f"'{union}'" + ("" if len(having) == len(models) else f" of kind {' or '.join(having)}"))
    return found + (["the top of the recipe"] if key in keys_of(Recipe) else [])


def _member_words(member: Annotation, limits: tuple[Any, ...]) -> str:
    origin = _origin(member)
    if origin is Literal:
        words = [str(word) for word in get_args(member)]
        return words[0] if len(words) == 1 else "one of " + ", ".join(words)
    if origin is list:
        return "a list of " + _plural(in_words(get_args(member)[0]))
    if origin is dict:
        return "a mapping of names to " + _plural(in_words(get_args(member)[1]))
    if _is_model(member):
        return "a mapping of settings"
    if member is str:
        patterns = [getattr(limit, "pattern", None) for limit in limits]
        return next((words for pattern, words in PATTERNS.items() if pattern in patterns), "text")
    if member is bool:
        return "true or false"
    return {int: "a whole number", float: "a number"}[member] + _range(limits)


def _plain_form(models: list[type[BaseModel]], key: str) -> str:
    if key == "kind":
        return "one of " + ", ".join(kind for model in models for kind in _kinds_of(model))
    return {"from": "the name of a reward model"}.get(key, f"a {key}")


def _kinds_of(model: type[BaseModel]) -> list[str]:
    return [str(kind) for kind in get_args(model.model_fields["kind"].annotation)]


def _plural(words: str) -> str:
    return (
        words.replace("one of", "any of")
        .replace("a mapping", "mappings")
        .replace("a path", "paths")
        .replace("a name", "names")
    )


def _range(limits: tuple[Any, ...]) -> str:
    bounds: list[str] = []
    for limit in limits:
        match limit:
            case Ge(ge):
                bounds.append(f"at least {ge}")
            case Gt(gt):
                bounds.append(f"above {gt}")
            case Le(le) if le != MOST_COUNT:  # true of all that is counted; said where it is exceeded
                bounds.append(f"at most {le}")
            case Lt(lt):
                bounds.append(f"below {lt}")
    return f", {' and '.join(bounds)}" if bounds else ""
