"""The data report of a stage's data sets as the page shows it: rows kept, rows dropped and why, and what else was found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from align.report import comparisons, words
from align.report.stage_facts import StageFacts

KEPT = {"train_rows": "Training rows", "test_rows": "Held-out rows"}
DROPPED = {
    "unusable": "Unusable rows",
    "duplicates": "Duplicates",
    "near_duplicates": "Near duplicates",
    "contaminated": "Found in an evaluation set",
    "test_overlap": "Asked in the held-out rows",
    "equal_pairs": "Pairs of equal answers",
    "unused": "Not used",
}
_STYLES = {"train_rows": "kept", "test_rows": "held"}


@dataclass(frozen=True)
class DataView:
    """One data set: counts of what became of its rows with a bar, what else was measured, and warnings."""

    name: str
    identifier: str
    rows: int
    counts: tuple[tuple[str, str, str], ...]
    bar: Markup
    details: Mapping[str, str]
    warnings: tuple[str, ...]


def data_views(stage: StageFacts) -> list[DataView]:
    """A view for each data set that went into the stage, in the order of the record."""
    found = {use.id: stage.data[use.id].info if use.id in stage.data else {} for use in stage.uses}
    return [_view(use.name, use.id, use.rows, found[use.id]) for use in stage.uses]


def _view(name: str, identifier: str, rows: int, info: Mapping[str, Any]) -> DataView:
    counts = [(key, title, info[key]) for key, title in (KEPT | DROPPED).items() if _count(info.get(key))]
    bar = comparisons.shares_bar([(title, count, _STYLES.get(key, "dropped")) for key, title, count in counts])
    read = info.get("rows_read")
    shown = [(_STYLES.get(key, "dropped"), title, _portion(count, read)) for key, title, count in counts]
    made_by = info.get("stage")  # all that the stage says of itself has a section of its own
    info = dict(info) | ({"made by": made_by.get("name")} if isinstance(made_by, Mapping) else {})
    rest = {
        k: v
        for k, v in info.items()
        if k not in KEPT and k not in DROPPED and k not in ("warnings", "stage") and v not in ({}, [], "")
    }
    warnings = info.get("warnings")
    return DataView(
        name=name,
        identifier=words.short(identifier),
        rows=rows,
        counts=tuple(shown),
        bar=bar,
        details={words.label(key): words.one_line(_detail(key, value), 300) for key, value in rest.items()},
        warnings=tuple(words.one_line(text, 400) for text in warnings) if isinstance(warnings, list | tuple) else (),
    )


def _detail(key: str, value: Any) -> str:
    if isinstance(value, float) and key.endswith(("_share", "_fraction")):
        return words.number(value, share=True)
    return words.counted(value)


def _portion(count: int, read: Any) -> str:
    if _count(read) and count <= read:
        return f"{count:,} ({words.number(count / read, share=True)})"
    return f"{count:,}"


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
