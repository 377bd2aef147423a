"""What each process of a run does: the first one leads it, the others follow.

`python -m align.launch.worker FOLDER` is how `align run --processes` starts one; torchrun starts `align run` itself.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import AlignError, Interrupted
from align.launch.processes import LIFELINE, Request, Told
from align.parallel.crew import Crew, CrewLost, crew, jobs
from align.quiet import quiet_libraries
from align.standard_streams import outlive_readers
from align.stopping import signals_handled, stops_at_boundary

if TYPE_CHECKING:
    from align.origins import Workshop
    from align.run import Done


def lead(workshop: Workshop, leader: Crew, stages: Sequence[str], force: Sequence[str]) -> list[Done]:
    """Runs the stages as one process would; the others are called where they can help."""
    from align.console import ConsoleProgress
    from align.run import run_recipe

    with signals_handled():
        leader.meet(workshop.recipe.launch.strategy)
        done = run_recipe(workshop, ConsoleProgress(), stages, force)
        leader.dismiss()
    return done


def follow(member: Crew) -> None:
    """Joins the first process where it calls us, until it sends us home. A signal stops us where all stop together."""
    from align.launch.job import join

    with signals_handled(), stops_at_boundary():
        member.meet(member.strategy)
        for job in jobs(member):
            join(job)


def main(folder: Path) -> int:
    """Does what the request in `folder` asks for and leaves there how it went. Returns the exit code."""
    quiet_libraries()
    outlive_readers()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # our starter's word, even where it was told to ignore that of others
    _end_with_our_starter(int(os.environ.pop(LIFELINE)))
    member = crew()
    assert member is not None, "whoever starts this says which process it is"
    request: Request = pickle.loads((folder / "request").read_bytes())  # noqa: S301  # our own file
    try:
        with signals_handled():  # also while libraries are imported
            told = Told(_done(request, member))
    except (AlignError, Interrupted) as error:
        told = Told(None, error.message, error.hint, error.exit_code, isinstance(error, CrewLost))
    aside = folder / f"aside-{member.rank}"
    aside.write_bytes(pickle.dumps(told))
    aside.rename(folder / f"told-{member.rank}")
    return told.exit_code


def _done(request: Request, member: Crew) -> Any:
    from align.origins import Workshop
    from align.registry.store import Registry

    if not member.leads:
        return follow(member)
    workshop = Workshop(request.written, request.folder, Registry.open(request.home))
    return lead(workshop, member, request.stages, request.force)


def _end_with_our_starter(pipe: int) -> None:
    """SIGTERM to ourselves when the process that started us is gone: the state is saved, and nothing goes on unseen."""

    def watch() -> None:
        os.read(pipe, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
