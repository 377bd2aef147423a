"""A reader that goes away, a terminal that closes and a full disk behind a redirection: the work ends as itself."""

from __future__ import annotations

import errno
import io
import json
import os
import pty
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO

import pytest

from align.registry import Registry
from align.standard_streams import Outlet
from tests.test_run import bench_in

ALIGN = [sys.executable, "-c", "from align.cli.main import main; main()"]
FULL = Path("/dev/full")


def unread() -> IO[bytes]:
    """What to write into a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "wb")


def ended(*arguments: str, out: IO[bytes] | int, err: IO[bytes] | int) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*ALIGN, *arguments], stdout=out, stderr=err, check=False, timeout=120)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(("runs", "list", "--json"), 0), (("runs", "list"), 0), (("--help",), 0), (("runs", "show", "none"), 2)],
)
def test_a_listing_that_nobody_reads_ends_with_its_own_exit_code_and_without_a_word(
    arguments: tuple[str, ...], code: int
) -> None:
    with unread() as nobody:
        done = ended(*arguments, out=nobody, err=subprocess.PIPE)
    assert done.returncode == code
    assert (b"Traceback" in done.stderr, b"roken pipe" in done.stderr) == (False, False)
    with unread() as nobody:
        assert ended(*arguments, out=nobody, err=nobody).returncode == code


@pytest.mark.slow
def test_a_run_that_nobody_listens_to_makes_all_its_stages(tiny_llama: Path, tmp_path: Path) -> None:
    bench = bench_in(tmp_path, tiny_llama)
    with unread() as nobody:
        done = ended("run", str(bench.recipe), "--stage", "adapter", out=nobody, err=nobody)
    assert done.returncode == 0
    assert {record.name for record in Registry.open().all_checkpoints()} == {"harbour/sft", "harbour/adapter"}
    assert {run.status for run in Registry.open().all_runs()} == {"finished"}


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full on this system")
def test_a_full_disk_is_said_of_standard_output_and_not_of_standard_error() -> None:
    with FULL.open("wb") as full:
        done = ended("runs", "list", out=full, err=subprocess.PIPE)
        assert done.returncode == 1
        assert done.stderr.splitlines()[0] == b"error: standard output: no space left on device"
        assert ended("runs", "show", "none", out=full, err=full).returncode == 2
        told = ended("runs", "list", "--json", out=subprocess.PIPE, err=full)
    assert (told.returncode, json.loads(told.stdout)) == (0, [])


def test_a_terminal_that_closes_is_no_error() -> None:
    ours, theirs = pty.openpty()
    outlet = Outlet(theirs, "standard output")
    os.close(ours)
    assert [outlet.write(b"lost"), outlet.write(b"too")] == [4, 3]
    os.close(theirs)


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full on this system")
def test_an_error_is_said_once() -> None:
    with FULL.open("wb") as full:
        outlet = Outlet(full.fileno(), "standard output")
        with pytest.raises(OSError, match="standard output") as error:
            outlet.write(b"lost")
        assert error.value.errno == errno.ENOSPC
        assert outlet.write(b"too") == 3


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_command_works_with_its_streams_closed(closed: str, tmp_path: Path) -> None:
    def code(*arguments: str) -> int:
        begun = ["sh", "-c", f'exec "$@" {closed}', "sh", *arguments]
        return subprocess.run(begun, cwd=tmp_path, capture_output=True, check=False, timeout=120).returncode

    assert code(*ALIGN, "run", "nowhere.yaml") == 2
    assert code(*ALIGN, "runs", "list") == 0
    opens = (
        "from align.standard_streams import *; outlive_readers(); print(1); sys.exit(os.open('new', os.O_CREAT) < 3)"
    )
    assert code(sys.executable, "-c", opens) == 0


def test_what_is_only_open_for_reading_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "read").write_text("as it was")
    with (tmp_path / "read").open("rb") as unwritable:
        done = ended("runs", "list", out=unwritable, err=subprocess.PIPE)
        assert (done.returncode, done.stderr) == (0, b"")
        assert ended("runs", "show", "none", out=unwritable, err=unwritable).returncode == 2
    assert (tmp_path / "read").read_text() == "as it was"


def full_pipe() -> tuple[int, int, int]:
    """Both ends of a pipe that does not block and takes nothing more, and how much it holds."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    held = 0
    with suppress(BlockingIOError):
        while True:
            held += os.write(writer, b"x" * 512)
    return reader, writer, held


@pytest.mark.parametrize("title", ["standard output", None])
def test_a_full_pipe_that_does_not_block_is_waited_for(title: str | None) -> None:
    reader, writer, held = full_pipe()
    read = bytearray()

    def slowly() -> None:
        while piece := os.read(reader, 10_000):
            read.extend(piece)

    later = threading.Timer(0.1, slowly)
    later.start()
    with io.BufferedWriter(Outlet(writer, title)) as out:
        out.write(b"y" * 200_000)
    os.close(writer)
    later.join()
    os.close(reader)
    assert read == b"x" * held + b"y" * 200_000


def test_whoever_waits_for_a_full_pipe_goes_on_when_its_reader_goes() -> None:
    reader, writer, _ = full_pipe()
    threading.Timer(0.1, os.close, [reader]).start()
    assert Outlet(writer, "standard output").write(b"lost") == 4
    os.close(writer)
