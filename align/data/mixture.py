"""How the parts of a mixture become one: rows in the proportion of the weights, and figures added up."""

from __future__ import annotations

import random
from collections.abc import Mapping

from align.data.prepared import DataReport
from align.data.rows import Numbers
from align.errors import AlignError

COUNTED = (
    "rows_read", "unusable", "masked", "equal_pairs", "duplicates", "near_duplicates", "contaminated", "test_overlap",
    "unused",
)  # fmt: skip


def by_weight(name: str, rows: Mapping[str, Numbers], weights: Mapping[str, float], seed: int) -> dict[str, Numbers]:
    """Random rows of each part in the proportion of the weights: as many as go without using one twice."""
    empty = [part for part, numbers in rows.items() if not len(numbers)]
    if empty and len(empty) < len(rows):
        raise AlignError(f"data '{name}': part '{empty[0]}' has no training rows", "Take it out of `mix:`.")
    scale = min(len(rows[part]) / weight for part, weight in weights.items())
    taken = {}
    for part, numbers in rows.items():
        count = min(len(numbers), int(scale * weights[part] + 1e-6))
        taken[part] = numbers[random.Random(f"{seed} {part}").sample(range(len(numbers)), count)]
    return taken


def joined_report(parts: Mapping[str, DataReport]) -> DataReport:
    """Sums over the parts, their warnings with their names."""
    joined = DataReport(format="mix")
    for name, report in parts.items():
        for figure in COUNTED:
            setattr(joined, figure, getattr(joined, figure) + getattr(report, figure))
        joined.warnings += [f"{name}: {warning}" for warning in report.warnings]
    return joined
