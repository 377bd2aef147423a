"""`align critique`: the critique stages of a recipe, or only how well their critic judges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from align.cli.run import open_workshop, run_options, run_stages
from align.cli.use import print_numbers

if TYPE_CHECKING:
    from align.data.examples import Preference
    from align.origins import Workshop


@click.command("critique", short_help="Critique and revise answers by a constitution.")
@click.option("--judge-only", is_flag=True, help="Make nothing: hold the critic against pairs that people have judged.")
@click.option(
    "--data", metavar="NAME_OR_FILE", help="The pairs for --judge-only: a data set's held-out rows, or a file."
)
@click.option("--rows", type=click.IntRange(min=1), help="Only the first pairs, this many.")
@click.option("--stage", metavar="NAME", help="The stage whose critic it is, where the recipe has several.")
@run_options
def critique_command(
    recipe: Path | None,
    overrides: tuple[str, ...],
    force: tuple[str, ...],
    force_memory: bool,
    report_path: Path | None,
    as_json: bool,
    **judging: Any,
) -> None:
    """Critique and revise answers by a constitution: the stages of kind critique in RECIPE, with what they need.

    Example: align critique recipes/x.yaml --judge-only --data pairs.jsonl
    """
    from align.recipe.graph import stages_of_kind

    if not judging["judge_only"] and any(judging[name] for name in ("data", "rows")):
        raise click.UsageError("--data and --rows go with --judge-only")
    if judging["judge_only"] and (force or report_path):
        raise click.UsageError("--force and --report make no sense with --judge-only, which makes nothing")
    workshop = open_workshop(recipe, overrides)
    stages = stages_of_kind(workshop.recipe, "critique")
    if judging["stage"]:
        if judging["stage"] not in stages:
            raise click.UsageError(f"--stage {judging['stage']}: the stages of kind critique are {', '.join(stages)}")
        stages = [judging["stage"]]
    if not judging["judge_only"]:
        run_stages(workshop, stages, force, report_path, force_memory=force_memory, as_json=as_json)
        return
    if judging["data"] is None:
        raise click.UsageError("--judge-only needs --data NAME_OR_FILE")
    numbers = _judged(workshop, stages[0], _pairs(judging["data"], judging["rows"]))
    if as_json:
        click.echo(json.dumps({"stage": stages[0], "data": judging["data"], "metrics": numbers}, indent=2))
    else:
        print_numbers(numbers)


def _pairs(data: str, rows: int | None) -> list[Preference]:
    from align.data.examples import Preference
    from align.errors import AlignError
    from align.use.rows import read_file_or_data_set

    pairs = [row for row in read_file_or_data_set(data)[:rows] if isinstance(row, Preference)]
    if not pairs:
        raise AlignError(f"{data} has no preference pairs", "Its rows need prompt, chosen and rejected.")
    return pairs


def _judged(workshop: Workshop, name: str, pairs: list[Preference]) -> dict[str, Any]:
    from align.console import ConsoleProgress
    from align.critique.agreement import agreement
    from align.recipe.settings import CritiqueSettings
    from align.run import critic_of
    from align.stages.critique import open_writer, opened_critic

    stage, progress = workshop.stage(name), ConsoleProgress()
    assert isinstance(stage, CritiqueSettings)
    parts, source = critic_of(workshop, name)
    policy = open_writer(source, progress, template=workshop.template())[0] if source else None
    with opened_critic(parts, policy, progress) as (critic, _):
        return agreement(critic, parts.constitution, pairs, panel=stage.panel, seed=workshop.seed(name))
