"""`align runs`: what was tried, how it ended, and the numbers it left."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from align.cli.listing import (
    TABLE_ROWS,
    facts,
    json_option,
    limit_option,
    moment,
    more_note,
    number,
    plain,
    print_json,
    print_json_rows,
    print_rich,
    table,
)  # fmt: skip
from align.cli.run import force_memory_option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType
    from rich.text import Text

    from align.registry.records import MetricRow, RunRecord

STYLES = {"running": "blue", "finished": "green", "failed": "red", "crashed": "red", "interrupted": "yellow"}
LOG_LINES = 10
CONTENT_HASH = re.compile(r"[0-9a-f]{64}")


@click.group("runs")
def runs_group() -> None:
    """List, inspect and take up again the runs of stages, finished or not."""


@runs_group.command("list")
@limit_option
@json_option
def list_command(limit: int | None, as_json: bool) -> None:
    """List runs, newest first, with the status that is true now."""
    from align.registry.store import Registry

    registry = Registry.open(create=False)
    if as_json:
        print_json_rows(record.summary() for record in registry.each_run(limit))
        return
    records = registry.all_runs(limit or TABLE_ROWS + 1)
    if not records:
        click.echo(f"No runs in {registry.home}. `align run RECIPE` starts some.")
        return
    rows = [
        (r.id, f"{r.recipe}/{r.stage}", r.kind, _status(r), moment(r.started), _took(r))
        for r in records[: limit or TABLE_ROWS]
    ]
    print_rich(table(("id", "stage", "kind", "status", "started", "took"), rows, right=("took",)))
    if note := more_note(len(records), limit, "runs"):
        click.echo(note)


@runs_group.command("resume")
@click.argument("run")
@force_memory_option
@click.option("--report", type=click.Path(path_type=Path), help="Where the report page goes at the end.")
@json_option
def resume_command(run: str, force_memory: bool, report: Path | None, as_json: bool) -> None:
    """Go on with a run that was stopped, from its last complete state. RUN is the beginning of its id.

    The recipe that the run recorded is used. A run whose data, parent or versions have changed since is refused.
    """
    from align.cli.run import run_stages
    from align.registry.store import Registry
    from align.resume import stopped_run

    registry = Registry.open(create=False)
    for finished in registry.recover():
        click.echo(f"run {finished} had finished when it was killed; its result is registered now", err=True)
    workshop, stage = stopped_run(registry, run)
    run_stages(workshop, (stage,), (), report, force_memory=force_memory, as_json=as_json)


@runs_group.command("show")
@click.argument("run")
@json_option
def show_command(run: str, as_json: bool) -> None:
    """Show one run: settings, inputs, metrics and the end of its log. RUN is the beginning of its id."""
    from align.registry.store import Registry

    registry = Registry.open(create=False)
    record = registry.run(run)
    metrics = registry.metrics(record.id)
    made = registry.checkpoints_of(record.id)
    log = record.work / "log.txt"
    if as_json:
        document = {**record.as_dict(), "checkpoints": [c.id for c in made], "log": str(log)}
        print_json({**document, "metrics": [row.as_dict() for row in metrics]})
        return
    made_names = [f"{checkpoint.name}@{checkpoint.id[:8]}" for checkpoint in made]
    print_rich(_facts(record, made_names), "", *_metrics(metrics), *_log(log))


def _facts(record: RunRecord, made: list[str]) -> RenderableType:
    return facts([
        ("id", record.id),
        ("stage", f"{record.recipe}/{record.stage} ({record.kind})"),
        ("status", _status(record)),
        ("message", record.message),
        ("started", moment(record.started)),
        ("took", _took(record)),
        ("seed", str(record.seed)),
        ("made", " ".join(made)),
        ("folder", str(record.work)),
        ("inputs", _indented(record.inputs)),
        ("settings", _indented(record.settings)),
    ])  # fmt: skip


def _indented(values: dict[str, object]) -> str:
    """Nested settings as 'path: value' lines, hashes shortened: everything that was set, nothing that is empty."""
    lines = []
    for name, value in values.items():
        if isinstance(value, dict):
            lines += [f"{name}.{line}" for line in _indented(value).splitlines()]
        elif value not in (None, [], ""):
            lines.append(f"{name}: {value[:12] if isinstance(value, str) and CONTENT_HASH.fullmatch(value) else value}")
    return "\n".join(lines)


def _metrics(metrics: Sequence[MetricRow]) -> list[RenderableType]:
    """One line a metric. A step without a finite number counts as a point and shows as the last, never as an extreme."""
    series: dict[str, list[MetricRow]] = {}
    for row in metrics:
        series.setdefault(row.name, []).append(row)
    rows = [(name, *_extent(points)) for name, points in sorted(series.items())]
    columns = ("metric", "points", "first", "last", "lowest", "highest", "step")
    return [table(columns, rows, right=columns[1:]), ""] if rows else []


def _extent(points: Sequence[MetricRow]) -> list[str]:
    """Number of points; first, last, lowest and highest value; last step."""
    finite = [point.value for point in points if math.isfinite(point.value)] or [math.nan]
    values = (points[0].value, points[-1].value, min(finite), max(finite))
    return [str(len(points)), *(number(value) for value in values), str(points[-1].step)]


def _log(path: Path) -> list[RenderableType]:
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    left_out = [plain(f"… {len(lines) - LOG_LINES} earlier lines in {path}", "dim")] if len(lines) > LOG_LINES else []
    return [plain("log", "bold"), *left_out, *(plain(line) for line in lines[-LOG_LINES:])]


def _status(record: RunRecord) -> Text:
    return plain(record.status, STYLES[record.status])


def _took(record: RunRecord) -> str:
    """Hours, minutes and seconds from start to end, or until now; unknown for a run that crashed."""
    if record.status == "crashed":
        return "?"
    end = datetime.fromisoformat(record.ended) if record.ended else datetime.now(UTC)
    seconds = max(0, round((end - datetime.fromisoformat(record.started)).total_seconds()))
    hours, rest = divmod(seconds, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"
