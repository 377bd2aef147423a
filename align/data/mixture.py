"""How the parts of a mixture become one: rows in the proportion of the weights, and figures added up."""

from __future__ import annotations

import random
from collections.abc import Mapping

from align.data.examples import Example
from align.data.prepared import DataReport, PreparedData
from align.errors import AlignError

COUNTED = (
    "rows_read", "unusable", "masked", "equal_pairs", "duplicates", "near_duplicates", "contaminated", "test_overlap",
    "unused",
)  # fmt: skip


def by_weight(
    name: str, rows: Mapping[str, list[Example]], weights: Mapping[str, float], seed: int
) -> dict[str, list[Example]]:
    """Random rows of each part in the proportion of the weights: as many as go without using one twice."""
    empty = [part for part, part_rows in rows.items() if not part_rows]
    if empty and len(empty) < len(rows):
        raise AlignError(f"data '{name}': part '{empty[0]}' has no training rows", "Take it out of `mix:`.")
    scale = min(len(rows[part]) / weight for part, weight in weights.items())
    return {
        part: random.Random(f"{seed} {part}").sample(part_rows, min(len(part_rows), int(scale * weights[part] + 1e-6)))
        for part, part_rows in rows.items()
    }


def joined_report(parts: Mapping[str, PreparedData]) -> DataReport:
    """Sums over the parts, their warnings with their names."""
    joined = DataReport(format="mix")
    for name, part in parts.items():
        for figure in COUNTED:
            setattr(joined, figure, getattr(joined, figure) + getattr(part.report, figure))
        joined.warnings += [f"{name}: {warning}" for warning in part.report.warnings]
    return joined
