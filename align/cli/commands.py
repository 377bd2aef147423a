"""All commands as one: parse, one call, echo. Nothing heavy is imported before a command needs it.

An AlignError, or a signal, ends with its own exit code and no traceback; anything else is a bug of ours and shows one.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NoReturn

import click

from align import __version__
from align.allocator import begin_tuned
from align.cli.checkpoints import checkpoints_group
from align.cli.critique import critique_command
from align.cli.data import data_group
from align.cli.merge import merge_command
from align.cli.recipes import doctor_command, init_command, recipe_group
from align.cli.report import report_command
from align.cli.run import check_command, plan_command, run_command, stage_commands
from align.cli.runs import runs_group
from align.cli.use import chat_command, eval_command, generate_command, score_command
from align.errors import AlignError, Interrupted, of_the_file_system, of_the_memory
from align.quiet import quiet_libraries
from align.standard_streams import outlive_readers
from align.torchless import OWN_PROCESS

COMMANDS = [
    run_command,
    *stage_commands,
    critique_command,
    plan_command,
    check_command,
    init_command,
    report_command,
    data_group,
    checkpoints_group,
    runs_group,
    generate_command,
    chat_command,
    score_command,
    eval_command,
    merge_command,
    recipe_group,
    doctor_command,
]
COMPUTING = {
    command.name for command in (
        run_command, *stage_commands, critique_command, generate_command, chat_command, score_command, eval_command,
        merge_command,
    )
}  # fmt: skip


class _InOrder(click.Group):
    """Lists the commands in the order of a user's work, not of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_InOrder, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="align")
def cli() -> None:
    """From a base language model to an aligned one by one recipe, with every weight's origin on record."""


for command in COMMANDS:
    cli.add_command(command)


def carry_out() -> None:
    """What the command line says, in a process that belongs to it. Ends with an exit code of its own where that fails."""
    quiet_libraries()
    try:
        computes = len(sys.argv) > 1 and sys.argv[1] in COMPUTING
        if computes:
            begin_tuned()
        outlive_readers()
        if computes:
            _refuse_a_lost_folder()
        cli.main(standalone_mode=False, obj=OWN_PROCESS)
    except (AlignError, Interrupted) as error:
        _end_with(error)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        sys.exit(130)
    except Exception as error:
        if short := of_the_memory(error):  # too little of it may be left to import anything more
            click.echo(f"error: {short}", err=True)
            sys.exit(short.exit_code)
        known = _in_words(error) if isinstance(error, OSError) else None
        if known is None:
            raise
        _end_with(known)


def _in_words(error: OSError) -> AlignError | None:
    if isinstance(error, FileNotFoundError):
        try:
            _refuse_a_lost_folder()
        except AlignError as lost:
            return lost
    return of_the_file_system(error)


def _refuse_a_lost_folder() -> None:
    """Raises AlignError where the current folder is gone: no relative path leads anywhere then, and torch cannot be loaded."""
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise AlignError(
            "the current folder has been deleted", "Change to one that is there (cd), then try again."
        ) from error


def _end_with(error: AlignError | Interrupted) -> NoReturn:
    from align.registry.references import printable

    click.secho(f"error: {printable(error.message)}", fg="red", err=True)
    if error.hint:
        click.echo(f"  {printable(error.hint)}", err=True)
    sys.exit(error.exit_code)
