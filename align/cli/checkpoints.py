"""`align checkpoints`: what there is, where it came from, whether it is intact, and what may go."""

from __future__ import annotations

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
    print_json,
    print_json_lines,
    print_rich,
    size,
    table,
)  # fmt: skip
from align.errors import CheckFailed

if TYPE_CHECKING:
    from rich.console import RenderableType

    from align.registry.records import CheckpointRecord
    from align.registry.store import Registry

REFERENCE = "CHECKPOINT is recipe/stage (the newest), recipe/stage@ID, a tag, or the beginning of an id."


@click.group("checkpoints")
def checkpoints_group() -> None:
    """List, inspect, tag, check and remove what the registry holds."""


@checkpoints_group.command("list")
@limit_option
@json_option
def list_command(limit: int | None, as_json: bool) -> None:
    """List checkpoints, newest first."""
    registry = _registry()
    if as_json:
        print_json_lines(registry.checkpoint_lines(limit))
        return
    records = registry.all_checkpoints(limit or TABLE_ROWS + 1)
    if not records:
        click.echo(f"No checkpoints in {registry.home}. `align run RECIPE` makes some.")
        return
    rows = [
        (record.name, record.id[:12], record.kind, moment(record.created), size(record.size), " ".join(record.tags))
        for record in records[: limit or TABLE_ROWS]
    ]
    print_rich(table(("name", "id", "kind", "made", "size", "tags"), rows, right=("size",)))
    if note := more_note(len(records), limit, "checkpoints"):
        click.echo(note)


@checkpoints_group.command("show", epilog=REFERENCE)
@click.argument("checkpoint")
@json_option
def show_command(checkpoint: str, as_json: bool) -> None:
    """Show one checkpoint: what it is, its numbers, its files, and what was made from it."""
    registry = _registry()
    record = registry.checkpoint(checkpoint)
    files = registry.files(record).files
    children = registry.children(record)
    parents = registry.parents(record)
    if as_json:
        listed = [{"path": path, "sha256": entry.sha256, "bytes": entry.size} for path, entry in files.items()]
        print_json({**record.as_dict(), "files": listed, "children": [child.id for child in children]})
        return
    rows = [(path, size(entry.size), entry.sha256[:12]) for path, entry in files.items()]
    print_rich(
        _facts(record, parents, children),
        "",
        *_metrics(record),
        table(("file", "size", "sha256"), rows, right=("size",)),
    )


@checkpoints_group.command("lineage", epilog=REFERENCE)
@click.argument("checkpoint")
@json_option
def lineage_command(checkpoint: str, as_json: bool) -> None:
    """Draw what a checkpoint was made from: models and data sets, all the way up."""
    lineage = _registry().lineage(checkpoint)
    if as_json:
        print_json(lineage.as_dict())
        return
    from align.cli.lineage_tree import draw

    print_rich(*draw(lineage))


@checkpoints_group.command("verify", epilog=REFERENCE)
@click.argument("checkpoints", metavar="[CHECKPOINT]...", nargs=-1)
@json_option
def verify_command(checkpoints: tuple[str, ...], as_json: bool) -> None:
    """Read every byte again and compare it with what was registered. Without a CHECKPOINT, of all of them.

    Ends with exit code 3 when something is not as it was.
    """
    registry = _registry()
    records = [registry.checkpoint(reference) for reference in checkpoints] or registry.all_checkpoints()
    found = {record.id: registry.verify(record.id) for record in records}
    if as_json:
        print_json([{"id": r.id, "name": r.name, "path": str(r.path), "problems": found[r.id]} for r in records])
    else:
        for record in records:
            click.echo(f"{_short(record)}  {'; '.join(found[record.id]) or f'intact, {size(record.size)}'}")
    damaged = [_short(record) for record in records if found[record.id]]
    if damaged:
        raise CheckFailed(f"not as registered: {', '.join(damaged)}", "Put the original files back, or make it again.")


@checkpoints_group.command("tag", epilog=REFERENCE)
@click.argument("checkpoint")
@click.argument("tag")
def tag_command(checkpoint: str, tag: str) -> None:
    """Give a checkpoint a name of your own. A tag that exists moves; a tagged checkpoint is never collected."""
    record = _registry().tag(checkpoint, tag)
    click.echo(f"{tag} is {_short(record)}")


@checkpoints_group.command("untag")
@click.argument("tag")
def untag_command(tag: str) -> None:
    """Remove a tag; its checkpoint stays."""
    _registry().untag(tag)
    click.echo(f"removed the tag {tag}")


@checkpoints_group.command("remove", epilog=REFERENCE)
@click.argument("checkpoint")
def remove_command(checkpoint: str) -> None:
    """Remove a checkpoint and its files. Refused while a tag points to it or something was made from it."""
    record = _registry().remove(checkpoint)
    click.echo(f"removed {_short(record)}")


@checkpoints_group.command("gc")
@click.option("--dry-run", is_flag=True, help="Only say what would go, and why.")
@json_option
def gc_command(dry_run: bool, as_json: bool) -> None:
    """Remove what nothing needs: superseded checkpoints and data sets, old caches, and what crashes left behind.

    Kept are the newest of every name, everything tagged, what unfinished runs need, and whatever these were made from.
    """
    removals = _registry(create=not dry_run).gc(dry_run)
    if as_json:
        print_json([removal.as_dict() for removal in removals])
        return
    if removals:
        shown = removals[:TABLE_ROWS]
        rows = [(r.what, r.name or r.id, r.id[:12] if r.name else "", size(r.size), r.why) for r in shown]
        print_rich(table(("what", "name", "id", "size", "why"), rows, right=("size",)))
    if len(removals) > TABLE_ROWS:
        click.echo(f"... and {len(removals) - TABLE_ROWS} more; --json lists all.")
    verb = "would go" if dry_run else "removed"
    click.echo(f"{len(removals)} {verb}, {size(sum(removal.size for removal in removals))}")


def _short(record: CheckpointRecord) -> str:
    return f"{record.name}@{record.id[:8]}"


def _registry(*, create: bool = False) -> Registry:
    from align.registry.store import Registry

    return Registry.open(create=create)


def _facts(
    record: CheckpointRecord, parents: list[CheckpointRecord], children: list[CheckpointRecord]
) -> RenderableType:
    known = {parent.id: _short(parent) for parent in parents}
    return facts([
        ("name", record.name),
        ("id", record.id),
        ("kind", record.kind),
        ("made", moment(record.created)),
        ("run", record.run),
        ("path", str(record.path)),
        ("size", size(record.size)),
        ("tags", " ".join(record.tags)),
        ("parents", "\n".join(known.get(parent, parent) for parent in record.parents)),
        ("data", "\n".join(f"{use.name} {use.id[:12]} ({use.rows:,} rows)" for use in record.data)),
        ("made from it", "\n".join(_short(child) for child in children)),
        ("template", (record.template_sha256 or "")[:12]),
        ("versions", ", ".join(f"{name} {version}" for name, version in record.versions.items())),
    ])  # fmt: skip


def _metrics(record: CheckpointRecord) -> list[RenderableType]:
    """Held-out numbers as one table: before and after where there are both."""
    names = dict.fromkeys(name.removeprefix("before.").removeprefix("after.") for name in record.metrics)
    rows = [
        (name, number(record.metrics.get(f"before.{name}")), number(record.metrics.get(f"after.{name}", record.metrics.get(name))))
        for name in names
    ]  # fmt: skip
    return [table(("metric", "before", "after"), rows, right=("before", "after")), ""] if rows else []
