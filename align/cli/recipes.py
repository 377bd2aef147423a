"""`align recipe`, `align init` and `align doctor`: recipes to look at and to start from, and the machine they run on."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import click


@click.group("recipe")
def recipe_group() -> None:
    """Show a recipe with every default filled in, or what may stand in one."""


@recipe_group.command("show")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of YAML.")
def show_command(recipe: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Print RECIPE with every setting that will be used, defaults included."""
    from align.recipe.file import load_recipe, resolved

    settings = resolved(load_recipe(recipe, overrides))
    if as_json:
        click.echo(json.dumps(settings, indent=2, ensure_ascii=False))
        return
    import yaml

    click.echo(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=120), nl=False)


@recipe_group.command("schema")
def schema_command() -> None:
    """Print the JSON schema of recipes, for completion and checks in an editor."""
    from align.recipe.reference import recipe_schema

    click.echo(json.dumps(recipe_schema(), indent=2))


@recipe_group.command("settings")
def settings_command() -> None:
    """Print every setting with its default and a sentence, as Markdown (docs/settings.md)."""
    from align.recipe.reference import settings_page

    click.echo(settings_page(), nl=False)


@click.command("init")
@click.option("--model", required=True, help="Hub id, local folder, or a checkpoint of the registry.")
@click.option("--data", "files", required=True, multiple=True, metavar="FILE...", help="Data files, one or more.")
@click.argument("more", nargs=-1, metavar="")
@click.option("--out", type=click.Path(path_type=Path), help="Recipe to write. Default: recipes/NAME.yaml.")
@click.option("--name", help="Name of the recipe. Default: from the model.")
@click.option("--force", is_flag=True, help="Overwrite a recipe that is there already.")
def init_command(
    model: str, files: tuple[str, ...], more: tuple[str, ...], out: Path | None, name: str | None, force: bool
) -> None:  # more: what follows the first file of --data, which takes one value
    """Write a short commented recipe for your model and data."""
    from align.recipe.starter import write_starter

    written = write_starter(model, (*files, *more), out=out, name=name, force=force)
    click.echo(f"wrote {written.path}")
    for line in written.notes:
        click.echo(f"  {line}")
    click.echo(f"next: align check {shlex.quote(str(written.path))}")


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def doctor_command(as_json: bool) -> None:
    """Say what this machine can do and what to fix: devices, arithmetic, memory, libraries, disk, registry."""
    from align.doctor import examine

    findings = examine()
    to_fix = [finding for finding in findings if finding.status == "fix"]
    if as_json:
        document = {"to_fix": len(to_fix), "findings": [finding.as_dict() for finding in findings]}
        click.echo(json.dumps(document, indent=2))
        return
    width = max(len(finding.name) for finding in findings)
    marks = {"ok": click.style("ok  ", fg="green"), "note": "-   ", "fix": click.style("fix ", fg="red")}
    for finding in findings:
        click.echo(f"{marks[finding.status]} {finding.name:<{width}}  {finding.value}")
        if finding.advice:
            click.echo(f"{'':{width + 7}}{finding.advice}")
    click.echo(f"{len(to_fix)} to fix." if to_fix else "Nothing to fix.")
