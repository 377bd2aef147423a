"""A signal ends a run as a signal, wherever it comes: nothing takes it for a failure, and what goes on later is the same."""

from __future__ import annotations

import os
import pkgutil
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from align.cli.main import main
from align.errors import Interrupted
from align.plan import plan
from align.progress import Progress
from align.registry import Registry
from align.stopping import signals_handled, stop_requested, stopping_signals, stops_at_boundary
from tests.test_launch import steps_in
from tests.test_run import Bench, bench_in

SFT = ("--stage", "sft", "--set", "stages.sft.epochs=2", "--force-memory")


@pytest.fixture
def _hangups_count() -> Iterator[None]:
    """As in a terminal, whatever this process was started by."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="module")
def unbroken(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Id of what the stage makes when nothing stops it."""
    return bench_in(tmp_path_factory.mktemp("unbroken"), tiny_llama).run(SFT[3], stages=["sft"])["sft"][1]


def align(monkeypatch: pytest.MonkeyPatch, bench: Bench, *arguments: str) -> int:
    """Exit code of `align run`, in this process."""
    monkeypatch.setattr(sys, "argv", ["align", "run", str(bench.recipe), *arguments])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def signalled_at(call: int, function: Callable[..., Any], number: int) -> Callable[..., Any]:
    """The function, in whose n-th call the signal comes."""
    calls = 0

    def broken_into(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), number)
        return function(*arguments, **named)

    return broken_into


@pytest.mark.parametrize(
    ("owner", "name", "call", "number"),
    [
        ("align.models.logps", "check_head", 1, signal.SIGINT),  # else the model would seem to need padded rows
        ("transformers.PreTrainedTokenizerBase", "apply_chat_template", 12, signal.SIGINT),  # else a bad template
        ("transformers.PreTrainedTokenizerBase", "apply_chat_template", 40, signal.SIGTERM),
        ("align.chat.rendering.Renderer", "prompt", 1, signal.SIGINT),  # else a template without a system turn
        ("align.chat.encoder.Encoder", "conversation", 3, signal.SIGTERM),  # else a fault of that row
        ("align.registry.reader.Reader", "checkpoint", 1, signal.SIGINT),  # else a stage that was never made
        ("align.costs", "prepare", 1, signal.SIGINT),  # else data that cannot be read
    ],
)
def test_a_signal_where_failures_are_expected_is_not_one_of_them(
    unbroken: str,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    owner: str,
    name: str,
    call: int,
    number: signal.Signals,
) -> None:
    bench = bench_in(tmp_path, tiny_llama)
    with pytest.MonkeyPatch.context() as patch:
        place = pkgutil.resolve_name(owner)
        patch.setattr(place, name, signalled_at(call, getattr(place, name), number))
        assert align(monkeypatch, bench, *SFT) == 128 + number
    said = capsys.readouterr().err
    assert f"error: stopped by {number.name}\n" in said
    registry = Registry.open()
    assert {run.status for run in registry.all_runs()} <= {"interrupted"}
    assert align(monkeypatch, bench, *SFT) == 0
    assert registry.checkpoint("harbour/sft").id == unbroken


def test_no_search_for_failures_finds_a_signal() -> None:
    def as_many_libraries_do() -> None:
        with suppress(Exception):
            os.kill(os.getpid(), signal.SIGINT)

    with signals_handled(), pytest.raises(Interrupted):
        as_many_libraries_do()


# A terminal that closes -----------------------------------------------------------------------------------------------


class HangsUp(Progress):
    """A terminal that closes at the second step of the training, which is told twice."""

    @contextmanager
    def bar(self, title: str, total: float) -> Iterator[object]:
        steps = 0

        class Bar:
            def advance(self, amount: float = 1, **told: Any) -> None:
                nonlocal steps
                steps += int(amount) if title == "training" else 0
                if steps == 2 and amount:
                    signal.raise_signal(signal.SIGHUP)
                    signal.raise_signal(signal.SIGHUP)

        yield Bar()


@pytest.mark.usefixtures("_hangups_count")
def test_a_terminal_that_closes_leaves_a_state_from_which_the_run_ends_in_the_same_bytes(
    unbroken: str, tiny_llama: Path, tmp_path: Path
) -> None:
    bench = bench_in(tmp_path, tiny_llama)
    with signals_handled(), pytest.raises(Interrupted, match=r"SIGHUP after step 2 of .*; its state is saved") as stop:
        bench.run(SFT[3], stages=["sft"], progress=HangsUp())
    assert stop.value.exit_code == 129
    assert [run.status for run in bench.workshop().registry.all_runs()] == ["interrupted"]
    assert [stage.action for stage in plan(bench.workshop(SFT[3]), stages=["sft"])] == ["resume"]
    assert bench.run(SFT[3], stages=["sft"])["sft"][1] == unbroken


@pytest.mark.usefixtures("_hangups_count")
def test_ctrl_c_after_a_hangup_stops_at_once() -> None:
    with signals_handled(), stops_at_boundary():
        signal.raise_signal(signal.SIGHUP)
        assert stop_requested() == signal.SIGHUP
        with pytest.raises(Interrupted, match="SIGINT"):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("_hangups_count")
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_is_ignored_where_a_run_begins_stays_so(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        assert set(stopping_signals()) == {signal.SIGHUP, signal.SIGINT, signal.SIGTERM} - {number}
        with signals_handled(), stops_at_boundary():
            signal.raise_signal(number)
            assert not stop_requested()
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


# Real processes -------------------------------------------------------------------------------------------------------


def started(bench: Bench, home: Path, *options: str, terminal: int | None = None) -> subprocess.Popen[bytes]:
    """`align run`, some steps into a long training; in a process group of its own, or as what a terminal was opened for."""
    code = "from align.cli.main import main; main()"
    long = ["--stage", "sft", "--set", "stages.sft.epochs=3000", "--set", "stages.sft.log_steps=1", *options]
    if terminal is None:
        said: int | None = subprocess.PIPE
        program = [sys.executable, "-c", code]
    else:
        said = terminal
        program = [sys.executable, "-c", f"import fcntl, termios; fcntl.ioctl(1, termios.TIOCSCTTY, 0); {code}"]
    command = subprocess.Popen(
        [*program, "run", str(bench.recipe), *long], stdin=subprocess.DEVNULL, stdout=said, stderr=said,
        start_new_session=True,
    )  # fmt: skip
    until = time.monotonic() + 120
    while steps_in(home) < 3 and command.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    return command


@pytest.mark.slow
def test_two_signals_to_a_whole_process_group_stop_it_now(tiny_llama: Path, tmp_path: Path, align_home: Path) -> None:
    command = started(bench_in(tmp_path, tiny_llama), align_home)
    os.killpg(command.pid, signal.SIGINT)
    os.killpg(command.pid, signal.SIGTERM)
    said = command.communicate(timeout=60)[1].decode()
    assert command.returncode in (130, 143), said
    assert "error: stopped by SIG" in said
    assert "Traceback" not in said
    assert [run.status for run in Registry.open().all_runs()] == ["interrupted"]


@pytest.mark.slow
@pytest.mark.usefixtures("_hangups_count")
@pytest.mark.parametrize("options", [(), ("--processes", "2")])
def test_a_real_terminal_that_closes_stops_the_run_with_its_state_saved(
    tiny_llama: Path, tmp_path: Path, align_home: Path, options: tuple[str, ...]
) -> None:
    ours, theirs = pty.openpty()
    command = started(bench_in(tmp_path, tiny_llama), align_home, *options, terminal=theirs)
    os.close(theirs)
    os.close(ours)
    assert command.wait(60) == 129
    (run,) = Registry.open().all_runs()
    assert run.status == "interrupted"
    assert run.message.startswith("stopped by SIGHUP after step")
    assert list(align_home.glob("runs/*/state/checkpoint-*/complete.json"))
