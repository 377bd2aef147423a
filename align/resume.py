"""A run that stopped, taken up again: the recipe that it recorded, and whether it still means the same."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from align.errors import AlignError
from align.origins import Workshop
from align.plan import PlannedStage, differences, plan, planned_stage
from align.products import Products
from align.recipe.graph import needed
from align.recipe.settings import Recipe

if TYPE_CHECKING:
    from align.registry.records import RunRecord
    from align.registry.store import Registry


def stopped_run(registry: Registry, run_id: str) -> tuple[Workshop, str]:
    """The recipe of a run that did not finish, as it was recorded, and the stage that goes on.

    Raises AlignError when there is nothing to go on with, and when data, parent or versions are not what they were.
    """
    record = registry.run(run_id)
    if record.status in ("finished", "running"):
        raise AlignError(f"run {record.id} is {record.status}; there is nothing to resume")
    workshop = _workshop(registry, record)
    _refuse_unless_same(workshop, record, plan(workshop, [record.stage]))
    return workshop, record.stage


def _workshop(registry: Registry, record: RunRecord) -> Workshop:
    try:
        recipe = Recipe.model_validate(record.settings["recipe"])
        return Workshop(recipe, Path(record.settings["folder"]), registry)
    except (KeyError, ValidationError) as error:
        raise AlignError(
            f"run {record.id} has no recipe on record that this version can read", "Run its stage with `align run`."
        ) from error


def _refuse_unless_same(workshop: Workshop, record: RunRecord, planned: list[PlannedStage]) -> None:
    """A resumed run is the same run: same key, same folder, and everything before it is there."""
    *before, stage = planned
    hint = f"`align run RECIPE --stage {record.stage}` starts afresh on what is there now."
    if changed := [entry for entry in before if entry.action not in ("reuse", "skip")]:
        raise AlignError(
            f"run {record.id} cannot go on: stage '{changed[0].name}', which it needs, is not what it was "
            f"({changed[0].why})",
            hint,
        )
    if stage.key != record.key:
        raise AlignError(f"run {record.id} cannot go on: changed: {', '.join(_changes(workshop, record))}", hint)
    if stage.made is not None:
        what = workshop.full_name(stage.name)
        raise AlignError(f"run {record.id} need not go on: {what} is there already, as it would have made it")
    last = workshop.registry.resumable(record.key)
    if last is None or last.id != record.id:
        why = f"run {last.id} took it up later" if last else "its saved state is gone"
        raise AlignError(f"run {record.id} cannot go on: {why}", f"`align runs resume {last.id}`" if last else hint)


def _changes(workshop: Workshop, record: RunRecord) -> list[str]:
    """What decides the result and is not as it was when the run began."""
    products = Products(workshop)
    for name in needed(workshop.recipe, [record.stage]):
        planned_stage(workshop, name, products)
    weights = workshop.weights(record.stage, products.checkpoints)
    assert weights is not None, "a stage before this one was missing, and that has been refused"
    now = workshop.ingredients(record.stage, weights)
    return differences({part: record.settings.get(part) for part in now}, now)
