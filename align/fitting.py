"""Stages that will not fit into the memory that there is: refused before anything is loaded, with what would help."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from align.costs import Estimate, estimator
from align.errors import AlignError
from align.recipe.settings import Stage, TrainingSettings
from align.recipe.training_settings import AdapterSettings
from align.units import in_units

if TYPE_CHECKING:
    from align.origins import Workshop
    from align.plan import PlannedStage

BUDGETS = 64  # token budgets that are tried
LEAST_TOKENS = 64  # a smaller budget than this saves nothing


def check_memory(workshop: Workshop, planned: Sequence[PlannedStage]) -> None:
    """Raises AlignError for the first stage that is to run and is predicted to need more memory than there is.

    A stage with `fit: auto` is let through where a smaller token budget fits.
    """
    for entry in planned:
        if entry.action not in ("run", "resume") or entry.estimate.fits:
            continue
        stage = workshop.stage(entry.name)
        adapts = isinstance(stage, TrainingSettings) and stage.fit == "auto"
        if adapts and fitting_batch_tokens(workshop, entry.name) is not None:
            continue
        remedies = list(_remedies(workshop, entry.name))
        helps = f"Set {', or '.join(remedies)}." if remedies else "No setting alone is enough: take a smaller model."
        raise AlignError(
            misfit(entry), f"{helps} --force-memory runs it all the same; `align plan` shows every stage's prediction."
        )


def misfit(entry: PlannedStage) -> str:
    """One sentence about a planned stage that does not fit."""
    found = entry.estimate
    need, room = found.peak_memory_bytes or 0, found.available_bytes or 0
    each = f" in each of {found.processes} processes" if found.processes > 1 else ""
    return (
        f"stage '{entry.name}' is predicted to need {in_units(need)} of memory{each}, and {in_units(room)} are "
        f"available: {in_units(need - room)} too much"
    )


def fitting_batch_tokens(workshop: Workshop, name: str) -> int | None:
    """The largest token budget, at most the recipe's, with which a stage is predicted to fit; None where none does.

    The recipe's own where nothing is known of the stage's memory.
    """
    settings = workshop.stage(name)
    assert isinstance(settings, TrainingSettings), "only stages that train have a token budget"
    predict = estimator(workshop, name)
    return largest_budget(lambda tokens: predict(_changed(settings, batch_tokens=tokens)), settings.batch_tokens)


def begun_with(workshop: Workshop, name: str, say: Callable[[str], object]) -> Stage:
    """The settings that a stage begins with: the recipe's, with `fit: auto` with the token budget that is predicted to fit.

    say: is told where that is another one.
    """
    settings = workshop.stage(name)
    if not isinstance(settings, TrainingSettings) or settings.fit != "auto":
        return settings
    tokens = fitting_batch_tokens(workshop, name)
    if tokens is None or tokens == settings.batch_tokens:
        return settings
    say(f"{tokens} instead of {settings.batch_tokens} tokens at once are predicted to fit into memory (fit: auto)")
    return _changed(settings, batch_tokens=tokens)


def largest_budget(predict: Callable[[int], Estimate], most: int) -> int | None:
    """The largest of the budgets below `most` whose prediction fits; None where none does."""
    parts = (most * share // BUDGETS for share in range(BUDGETS, 0, -1))
    budgets = [most, *(tokens for tokens in parts if LEAST_TOKENS <= tokens < most)]
    return next((tokens for tokens in budgets if predict(tokens).fits), None)


def _remedies(workshop: Workshop, name: str) -> Iterator[str]:
    """Each setting that is enough alone, as the user would write it, and what is predicted then."""
    settings = workshop.stage(name)
    if not isinstance(settings, TrainingSettings):
        return
    predict = estimator(workshop, name)
    tokens = fitting_batch_tokens(workshop, name)
    if tokens is not None:
        yield _told(f"batch_tokens: {tokens}", predict(_changed(settings, batch_tokens=tokens)))
    changes: dict[str, dict[str, object]] = {"gradient_checkpointing: true": {"gradient_checkpointing": True}}
    if settings.adapter is None and settings.from_ is None:
        changes |= {"adapter: {kind: lora}": {"adapter": AdapterSettings()}}
    if settings.quantize is None and (settings.adapter or settings.from_ is None):
        changes |= {
            "quantize: nf4 with an adapter": {"adapter": settings.adapter or AdapterSettings(), "quantize": "nf4"}
        }
    for written, change in changes.items():
        found = predict(_changed(settings, **change))
        if found.fits:
            yield _told(written, found)


def _told(written: str, found: Estimate) -> str:
    return f"{written} ({in_units(found.peak_memory_bytes or 0)})"


def _changed(settings: TrainingSettings, **changes: object) -> Stage:
    changed: Stage = settings.model_copy(update=changes)  # type: ignore[assignment]
    return changed
