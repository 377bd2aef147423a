"""How listings look: one JSON document, or a table that fits 80 columns. Text from data can steer neither terminal nor table."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of a table.")
limit_option = click.option(
    "--limit", type=click.IntRange(1, 10**9), help="The newest N only. Default: 30 in a table, all in JSON."
)
TABLE_ROWS = 30


def print_json(value: Any) -> None:
    """The one document that a --json command writes on stdout."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def print_json_rows(rows: Iterable[Mapping[str, Any]]) -> None:
    """The one document of a --json listing: an array with a row a line, written as the rows come.

    ASCII only, so that nothing in the data acts on a terminal.
    """
    print_json_lines(json.dumps(row, allow_nan=False) for row in rows)


def print_json_lines(lines: Iterable[str]) -> None:
    """As `print_json_rows`, of rows that are JSON already."""
    separator = "["
    for line in lines:
        sys.stdout.write(f"{separator}\n{line}")
        separator = ","
    sys.stdout.write("[]\n" if separator == "[" else "\n]\n")
    sys.stdout.flush()


def print_rich(*things: RenderableType) -> None:
    """Tables and trees on stdout, coloured on a terminal only."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    for thing in things:
        console.print(thing)


def table(columns: Sequence[str], rows: Iterable[Sequence[str | Text]], *, right: Sequence[str] = ()) -> RenderableType:
    """A table whose cells fold instead of losing text. right: columns of numbers."""
    from rich import box
    from rich.table import Table

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for name in columns:
        drawn.add_column(name, overflow="fold", justify="right" if name in right else "left")
    for row in rows:
        drawn.add_row(*(plain(cell) if isinstance(cell, str) else cell for cell in row))
    return drawn


def facts(pairs: Iterable[tuple[str, str | Text]]) -> RenderableType:
    """Names and values, one pair a line; pairs without a value are left out."""
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in pairs:
        if value:
            grid.add_row(name, plain(value) if isinstance(value, str) else value)
    return grid


def plain(text: str, style: str = "") -> Text:
    """Text without markup, its control characters written out."""
    from rich.text import Text

    from align.registry.references import printable

    return Text(printable(text), style=style)


def more_note(shown: int, limit: int | None, noun: str) -> str:
    """What to say below a table that may have been cut by the default limit; '' when it was not."""
    cut = limit is None and shown > TABLE_ROWS
    return f"The newest {TABLE_ROWS} {noun}; --limit N shows more." if cut else ""


def size(count: int) -> str:
    """Bytes for people: 1.2 GB."""
    amount, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if amount < 1000 or unit == "TB":
            break
        amount /= 1000
    return f"{amount:.0f} {unit}" if unit == "B" or amount >= 100 else f"{amount:.1f} {unit}"


def moment(iso: str) -> str:
    """A time of the registry, in the reader's own time zone, to the minute."""
    from datetime import datetime

    return datetime.fromisoformat(iso).astimezone().strftime("%Y-%m-%d %H:%M")


def number(value: Any) -> str:
    """A metric for people: a number, or an estimate with its interval (`value`, `low`, `high`)."""
    if isinstance(value, dict):
        if value.get("value") is None:
            return "-"
        interval = f" [{value['low']:.4g}, {value['high']:.4g}]" if value.get("low") is not None else ""
        return f"{value['value']:.4g}{interval}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-" if value is None else str(value)
    return f"{value:.4g}"
