"""`align report`: the chain of a recipe, or one run or checkpoint with all before it, as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from align.registry import Registry


@click.command("report")
@click.argument("target", required=False, metavar="[RECIPE or RUN or CHECKPOINT]")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), default=Path("report.html"), show_default=True,
    help="Page to write; a page that is there is replaced.",
)  # fmt: skip
def report_command(target: str | None, out: Path) -> None:
    """Write one self-contained HTML page: lineage, held-out numbers, curves, answers, data, settings.

    RECIPE is a recipe's file or its name. Without a target, the recipe that ran last.
    """
    from align.registry import Registry
    from align.report import write_report

    registry = Registry.open(create=False)
    named = _name_of(target) if target else _newest(registry)
    write_report(registry, named, out)
    click.echo(f"wrote {out}")


def _name_of(target: str) -> str:
    """A recipe's name for its file; anything else is a name already."""
    from align.recipe.file import SUFFIXES, load_recipe

    return load_recipe(Path(target)).name if target.endswith(SUFFIXES) else target


def _newest(registry: Registry) -> str:
    from align.errors import AlignError

    found = registry.recipes()
    if not found:
        raise AlignError("nothing to report: the registry is empty", "Run a recipe first: align run RECIPE")
    return found[0]
