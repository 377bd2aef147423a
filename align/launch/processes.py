"""Several processes of one run on this machine: started together, told of every signal, ended together.

torchrun would do for the start, but it ends with 1 whatever happened, shows a traceback of its own, and kills after half a
minute, in which a long step may not be saved.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

from align.errors import AlignError, Interrupted, StageFailed
from align.machine import this_machine
from align.parallel.crew import MEETING
from align.recipe.settings import Recipe
from align.stopping import stopping_signals

LIFELINE = "ALIGN_LIFELINE"  # descriptor of a pipe that ends when the process that started us does
GRACE_SECONDS = 20  # for the others, when one has ended
LAST_LINES = 15
SIGNALLED = 128  # an exit code above it is this and the signal's number


@dataclass(frozen=True)
class Request:
    """What the processes are to do: stages of a recipe as the user wrote it. home: of the registry."""

    written: Recipe
    folder: Path
    home: Path
    stages: Sequence[str]
    force: Sequence[str]


@dataclass(frozen=True)
class Told:
    """How a process ended, as it says. done: what the first one made. lost: it only ended since another one had."""

    done: Any = None
    message: str = ""
    hint: str = ""
    exit_code: int = 0
    lost: bool = False


@dataclass
class _Process:
    popen: subprocess.Popen[bytes]
    told: Path
    said: Path

    @property
    def outcome(self) -> Told | None:
        """What it told us; None: it ended without a word."""
        return pickle.loads(self.told.read_bytes()) if self.told.is_file() else None  # noqa: S301  # our own file


def run_apart(request: Request, processes: int) -> Any:
    """What the first of `processes` processes made of the request. Raises AlignError, with its exit code, when it failed."""
    with tempfile.TemporaryDirectory(prefix="align-launch-") as name, _lifeline() as pipe:
        folder = Path(name)
        (folder / "request").write_bytes(pickle.dumps(request))
        running: list[_Process] = []
        with _passing_on(running) as signals:
            running += [_start(folder, rank, processes, pipe) for rank in range(processes)]
            _wait([process.popen for process in running])
        return _result(running, signals)


def _start(folder: Path, rank: int, processes: int, pipe: int) -> _Process:
    """The first one speaks to the terminal; what the others say is kept, in case they fail."""
    said = folder / f"said-{rank}"
    output: IO[bytes] | None = said.open("wb") if rank else None
    popen = subprocess.Popen(
        [sys.executable, "-m", "align.launch.worker", str(folder)],
        env=_environment(folder, rank, processes, pipe),
        stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=[pipe],
        start_new_session=True,  # a terminal's Ctrl-C reaches us alone, and we pass it on once
    )  # fmt: skip
    if output:
        output.close()
    return _Process(popen, folder / f"told-{rank}", said)


def _environment(folder: Path, rank: int, processes: int, pipe: int) -> dict[str, str]:
    threads = max(1, int(this_machine().usable_cores / processes))
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, LIFELINE: pipe}
    by_default = {"OMP_NUM_THREADS": str(threads), **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {})}
    return {
        **by_default, **os.environ, **{name: str(value) for name, value in places.items()},
        MEETING: f"file://{folder}/meeting",
    }  # fmt: skip


def _wait(running: Sequence[subprocess.Popen[bytes]]) -> None:
    """Until all have ended: when one has, the others get some time, then they are ended."""
    while all(process.poll() is None for process in running):
        time.sleep(0.05)
    for end in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):  # a first SIGTERM may only ask
        _until_ended(running, GRACE_SECONDS)
        for process in running:
            if process.poll() is None:
                process.send_signal(end)
    _until_ended(running, GRACE_SECONDS)


def _until_ended(running: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and any(process.poll() is None for process in running):
        time.sleep(0.05)


def _result(ended: Sequence[_Process], signals: Sequence[int]) -> Any:
    """What the first process made, or the error of one that failed by itself. signals: that the processes were sent."""
    outcomes = [process.outcome for process in ended]
    if outcomes[0] is not None and not outcomes[0].exit_code:
        return outcomes[0].done
    failed = [told for told in outcomes if told is not None and told.exit_code]
    for told in failed:
        if not told.lost:
            raise _error(told)
    for rank, (process, outcome) in enumerate(zip(ended, outcomes, strict=True)):
        if outcome is None and signals:  # before it could say so itself
            raise Interrupted(
                signals[0], f"stopped by {signal.Signals(signals[0]).name}", "The same command starts again."
            )
        if outcome is None:
            code = process.popen.returncode
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            last = process.said.read_text(errors="replace").splitlines()[-LAST_LINES:] if process.said.is_file() else []
            hint = (
                "\n  ".join(["Its last words:", *last]) if last else "Where it was killed, memory may have been short."
            )
            raise StageFailed(f"process {rank} of {len(ended)} {how}", hint)
    raise _error(failed[0])


def _error(told: Told) -> AlignError | Interrupted:
    if told.exit_code > SIGNALLED:
        return Interrupted(told.exit_code - SIGNALLED, told.message, told.hint)
    error = AlignError(told.message, told.hint)
    error.exit_code = told.exit_code
    return error


def refuse_too_many(processes: int) -> None:
    """Raises AlignError for more processes than there are GPUs, where there are any."""
    import torch

    gpus = torch.cuda.device_count()
    if gpus and processes > gpus:
        raise AlignError(f"{processes} processes asked for, and there are {gpus} GPUs", "One process a GPU at most.")


@contextmanager
def _lifeline() -> Iterator[int]:
    """The end of a pipe that the processes hold; when this process is gone, it says so."""
    theirs, ours = os.pipe()
    try:
        yield theirs
    finally:
        os.close(theirs)
        os.close(ours)


@contextmanager
def _passing_on(running: Sequence[_Process]) -> Iterator[list[int]]:
    """In this block the stopping signals are the processes' concern: each gets each of them once. Yields those that came."""
    came: list[int] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        for process in running:
            if process.popen.poll() is None:
                process.popen.send_signal(number)

    before = {number: signal.signal(number, handle) for number in stopping_signals()}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
