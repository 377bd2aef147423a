"""`align run`, the commands of single stages, `align plan` and `align check`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from align.torchless import OWN_PROCESS, keep_torch_out

if TYPE_CHECKING:
    from align.origins import Workshop
    from align.run import Done

DEFAULT_RECIPE = "recipes/quickstart.yaml"
KINDS = {
    "pretrain": "Train every token of plain text",
    "sft": "Supervised fine-tuning",
    "adapter": "Supervised fine-tuning of an adapter",
    "reward": "Train a reward model from preference pairs",
    "dpo": "Optimise a policy on preference pairs",
    "ppo": "Optimise a policy against rewards (PPO, RLOO, GRPO, REINFORCE++)",
    "constitution": "Critique and train in rounds",
}

recipe_argument = click.argument("recipe", required=False, type=click.Path(path_type=Path))
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting, as in stages.sft.epochs=3."
)
stage_option = click.option(
    "--stage", "stages", multiple=True, metavar="NAME", help="Only this stage and what it needs; repeatable."
)
force_option = click.option(
    "--force", multiple=True, metavar="STAGE", help="Run this stage again though nothing changed."
)
force_memory_option = click.option(
    "--force-memory", is_flag=True, help="Run stages that are predicted to need more memory than there is."
)
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")


processes_option = click.option(
    "--processes", type=click.IntRange(min=1), help="Processes that train, as in --set launch.processes=N."
)


def run_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that every command which runs stages has. Under torchrun, all processes but the first only follow it."""

    @wraps(command)
    def led(**values: Any) -> None:
        from align.parallel.crew import crew

        member = crew()
        if member is None or member.leads:
            command(**values)
            return
        from align.launch.worker import follow

        follow(member)

    report = click.option(
        "--report", "report_path", type=click.Path(path_type=Path), help="Where the report page goes at the end."
    )
    return recipe_argument(set_option(force_option(force_memory_option(report(json_option(led))))))


@click.command("run")
@stage_option
@processes_option
@run_options
def run_command(
    recipe: Path | None,
    stages: tuple[str, ...],
    overrides: tuple[str, ...],
    force: tuple[str, ...],
    force_memory: bool,
    processes: int | None,
    report_path: Path | None,
    as_json: bool,
) -> None:
    """Run the chain of RECIPE.

    What is unchanged is reused, what was stopped goes on.
    """
    workshop = open_workshop(recipe, with_processes(overrides, processes))
    run_stages(workshop, stages, force, report_path, force_memory=force_memory, as_json=as_json)


def stage_command(kind: str, summary: str) -> click.Command:
    """The command that runs the stages of one kind, with what they need."""

    @click.command(
        kind, short_help=summary + ".", help=f"{summary}: the stages of that kind in RECIPE, with what they need."
    )
    @processes_option
    @run_options
    def command(
        recipe: Path | None,
        overrides: tuple[str, ...],
        force: tuple[str, ...],
        force_memory: bool,
        processes: int | None,
        report_path: Path | None,
        as_json: bool,
    ) -> None:
        from align.recipe.graph import stages_of_kind

        workshop = open_workshop(recipe, with_processes(overrides, processes))
        stages = stages_of_kind(workshop.recipe, kind)
        run_stages(workshop, stages, force, report_path, force_memory=force_memory, as_json=as_json)

    return command


stage_commands = [stage_command(kind, summary) for kind, summary in KINDS.items()]


@click.command("plan")
@stage_option
@force_option
@recipe_argument
@set_option
@json_option
def plan_command(
    recipe: Path | None, overrides: tuple[str, ...], stages: tuple[str, ...], force: tuple[str, ...], as_json: bool
) -> None:
    """Say what would run and what is reused, with memory and time.

    Changes nothing. A hub model is downloaded if it is not there yet, because its content decides what is reused.
    """
    from align.plan import plan

    planned = plan(open_workshop(recipe, overrides), stages, force)
    if as_json:
        click.echo(json.dumps([stage.as_dict() for stage in planned], indent=2))
        return
    from align.console import plan_table, print_table
    from align.fitting import misfit

    print_table(plan_table(planned))
    if any(entry.estimate.processes > 1 for entry in planned):
        click.echo("Memory is that of each process.")
    for entry in planned:
        if entry.action in ("run", "resume") and not entry.estimate.fits:
            click.secho(f"warning: {misfit(entry)}", fg="yellow", err=True)


@click.command("check")
@recipe_argument
@set_option
@json_option
def check_command(recipe: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Find errors without training, and report on the data."""
    from align.checks import check_recipe, runs_foreign_code
    from align.model_checks import model_warnings
    from align.recipe.graph import recipe_warnings

    workshop = open_workshop(recipe, overrides)
    if click.get_current_context().obj is OWN_PROCESS and not runs_foreign_code(workshop.recipe):
        keep_torch_out()
    found = check_recipe(workshop)
    for warning in (*recipe_warnings(workshop.recipe), *model_warnings(workshop)):
        click.secho(f"warning: {warning}", fg="yellow", err=True)
    if as_json:
        click.echo(json.dumps([data.as_dict() for data in found], indent=2))
        return
    from align.console import data_table, print_table

    print_table(data_table(found))
    click.echo("The recipe can run.")


def open_workshop(recipe: Path | None, overrides: tuple[str, ...]) -> Workshop:
    """The recipe (default: $ALIGN_RECIPE, else recipes/quickstart.yaml) with the registry it works in, which is made when
    something runs."""
    from align.origins import Workshop
    from align.recipe.file import load_recipe
    from align.registry import Registry

    path = recipe or Path(os.environ.get("ALIGN_RECIPE") or DEFAULT_RECIPE)
    return Workshop(load_recipe(path, overrides), path.parent.absolute(), Registry.open(create=False))


def with_processes(overrides: tuple[str, ...], processes: int | None) -> tuple[str, ...]:
    """The overrides with what `--processes` stands for."""
    return overrides if processes is None else (*overrides, f"launch.processes={processes}")


def run_stages(
    workshop: Workshop,
    stages: tuple[str, ...] | list[str],
    force: tuple[str, ...],
    report: Path | None,
    *,
    force_memory: bool,
    as_json: bool,
) -> None:
    """Run, then say what came out: a table of held-out numbers, and the report page.

    force_memory: also what is predicted to need more memory than there is.
    """
    if report is not None:
        _check_place(report)
    if not force_memory:
        _refuse_misfits(workshop, stages, force)
    done = _done(workshop, stages, force)
    page = _write_report(workshop, report)
    if as_json:
        click.echo(json.dumps([_summary(entry) for entry in done], indent=2))
        return
    from align.console import print_table, stage_table

    print_table(stage_table([entry.made for entry in done if entry.made is not None]))
    click.echo(f"Report: {page}")


def _check_place(page: Path) -> None:
    """Raises AlignError where the report could not be written at the end."""
    from align.errors import AlignError

    folder = next(place for place in page.absolute().parents if place.exists())
    if page.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise AlignError(f"--report: {page} cannot be written", "Name a file, in a folder that you may write.")


def _refuse_misfits(workshop: Workshop, stages: Sequence[str], force: Sequence[str]) -> None:
    from align.fitting import check_memory
    from align.plan import plan

    check_memory(workshop, plan(workshop, stages, force))


def _done(workshop: Workshop, stages: Sequence[str], force: Sequence[str]) -> list[Done]:
    """Runs the stages here, or on as many processes as the recipe asks for, where there is something for them to do."""
    from align.console import ConsoleProgress
    from align.launch.job import SEVERAL
    from align.launch.processes import Request, refuse_too_many, run_apart
    from align.parallel.crew import crew
    from align.run import checked_plan, register_data, run_recipe
    from align.stopping import signals_handled

    if leader := crew():
        from align.launch.worker import lead

        return lead(workshop, leader, stages, force)
    progress, processes = ConsoleProgress(), workshop.recipe.launch.processes
    with signals_handled():
        if processes > 1:
            planned = checked_plan(workshop, stages, force)
            going = [entry.kind for entry in planned if entry.action in ("run", "resume")]
            processes = processes if any(kind in SEVERAL for kind in going) else 1
        if processes == 1:
            return run_recipe(workshop, progress, stages, force)
        refuse_too_many(processes)
        register_data(workshop, [entry.name for entry in planned])  # so that the first process need not do it again
    request = Request(workshop.written, workshop.folder, workshop.registry.home, tuple(stages), tuple(force))
    done: list[Done] = run_apart(request, processes)
    return done


def _write_report(workshop: Workshop, out: Path | None) -> Path:
    from align.errors import StageFailed
    from align.report.page import write_report

    page = out or workshop.registry.home / "reports" / f"{workshop.recipe.name}.html"
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_report(workshop.registry, workshop.recipe.name, page)
    except OSError as error:
        said = f"the stages are done, but the report {page} cannot be written: {error.strerror}"
        raise StageFailed(
            said, "`align report RECIPE --out FILE` writes it elsewhere; nothing is trained again."
        ) from error
    return page


def _summary(done: Done) -> dict[str, Any]:
    from align.registry.records import StageData

    made = done.made.as_dict() if done.made else None
    what = "data" if isinstance(done.made, StageData) else "checkpoint"
    planned = done.planned
    return {"stage": planned.name, "kind": planned.kind, "action": planned.action, "why": planned.why, what: made}
