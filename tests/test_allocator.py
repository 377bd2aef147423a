"""Freed memory that stays with the process and is used again."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys

import pytest

from align import allocator
from align.allocator import OWN, SWITCH, TUNED, begin_tuned, left_alone

BEGINS = """
import os, sys
print(os.getpid(), sys.argv[1:], os.environ.get("GLIBC_TUNABLES"), flush=True)
from align.allocator import begin_tuned
begin_tuned()
print(sys.stdin.read(), flush=True)
"""
READ_ONCE = """
print("begins", flush=True)
from align.allocator import begin_tuned
begin_tuned()
print("goes on", flush=True)
"""
STOPPED_EARLY = """
import os, signal
from align.allocator import TUNED, begin_tuned
if again := os.environ.get("GLIBC_TUNABLES") == TUNED:
    os.kill(os.getpid(), signal.SIGINT)
    print("began again", flush=True)
try:
    begin_tuned()
    print("goes on", signal.getsignal(signal.SIGINT).name, flush=True)
except KeyboardInterrupt:
    print("stopped", flush=True)
"""
FAULTS = """
import resource
from align.allocator import begin_tuned
begin_tuned()
import numpy as np
for _ in range(40): np.ones(8_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""
# the layers of a model with adapters: what autograd keeps lies between tensors that come and go
RESIDENT = """
import resource
from align.allocator import begin_tuned
begin_tuned()
import torch
from torch.nn import functional as F
def most(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
base, a, b = torch.ones(256, 256), torch.zeros(256, 8, requires_grad=True), torch.zeros(8, 256, requires_grad=True)
before = most()
for rows in (3900, 4000, 3800, 4096):
    x = torch.ones(rows, 256)
    for _ in range(16):
        for _ in range(3):
            y = x @ base + (x @ a) @ b * 0.5
            x = F.silu(y) + 0.0 * x
    x.sum().backward()
print(most() - before)
"""
linux = pytest.mark.skipif(bool(left_alone()), reason="only glibc can be told so")


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*OWN, SWITCH):
        monkeypatch.delenv(name, raising=False)


def said(program: str, *arguments: str, text: str = "", **environment: str) -> str:
    """What a program of its own prints."""
    started = [sys.executable, "-c", program, *arguments]
    return subprocess.run(
        started, env={**os.environ, **environment}, input=text, check=True, capture_output=True, text=True
    ).stdout  # fmt: skip


@linux
def test_a_program_begins_again_once_as_the_same_process_with_its_arguments_and_its_input() -> None:
    first, second, text = said(BEGINS, "run", "a b.yaml", text="yes").splitlines()
    assert first.endswith("['run', 'a b.yaml'] None")
    assert second == first.replace("None", TUNED)
    assert text == "yes"


@linux
@pytest.mark.parametrize("arguments", [[], ["-"], ["-", "run"], ["/dev/stdin", "run"]])
def test_a_program_that_was_read_from_a_pipe_goes_on_as_it_is(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, *arguments], input=READ_ONCE, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["begins", "goes on"]


@linux
def test_ctrl_c_while_python_starts_again_waits_until_it_is_expected_and_stays_ignored_where_it_was() -> None:
    assert said(STOPPED_EARLY).splitlines() == ["began again", "stopped"]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a script's `&` starts a program
    try:
        assert said(STOPPED_EARLY).splitlines() == ["began again", "goes on SIG_IGN"]
    finally:
        signal.signal(signal.SIGINT, before)


@linux
@pytest.mark.parametrize("executable", ["", "/nowhere/python", "a\0b"])
def test_where_it_cannot_begin_again_it_goes_on_as_it_is(executable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    monkeypatch.setattr(sys, "orig_argv", ["python", "align", *sys.argv[1:]])
    begin_tuned()
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@linux
def test_streams_that_are_closed_are_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    began: list[object] = []
    monkeypatch.setattr(sys, "orig_argv", ["python", "align", *sys.argv[1:]])
    monkeypatch.setattr(os, "execve", lambda *arguments: began.append(arguments))
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", closed)
    begin_tuned()
    assert len(began) == 1


@linux
def test_large_arrays_take_pages_that_are_there_already() -> None:
    assert int(said(FAULTS)) < 0.8 * int(said(FAULTS, **{SWITCH: "system"}))


@linux
def test_a_tensor_takes_the_place_of_one_of_its_size_that_went() -> None:
    kept_apart = TUNED.replace("tcache_count=0", "tcache_count=7").replace("mxfast=0", "mxfast=128")
    assert float(said(RESIDENT)) < 0.8 * float(said(RESIDENT, GLIBC_TUNABLES=kept_apart))


def test_the_program_of_somebody_else_is_not_begun_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "left_alone", lambda: "")
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("began again"))
    monkeypatch.setattr(sys, "argv", ["align", "run", "another.yaml"])
    begin_tuned()


def test_the_switch_leaves_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "system")
    assert left_alone() == "ALIGN_ALLOCATOR=system"
    if sys.platform == "linux":
        assert "None" in said(BEGINS).splitlines()[0]
        assert len(said(BEGINS, text="yes").splitlines()) == 2


@pytest.mark.parametrize("name", OWN)
def test_who_set_malloc_by_hand_keeps_that(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    assert name in left_alone() or sys.platform != "linux"
    assert len(said(BEGINS, text="yes").splitlines()) == 2


def test_another_system_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "darwin" in left_alone()
