"""Freed memory that stays with the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from align.allocator import OWN, SWITCH, keep_freed_memory, left_alone

FAULTS = """
import resource, sys
from align.allocator import keep_freed_memory
if sys.argv[1] == "kept": assert keep_freed_memory()
import numpy as np
for _ in range(40): np.ones(8_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""
linux = pytest.mark.skipif(sys.platform != "linux", reason="only glibc on Linux has mallopt")


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*OWN, SWITCH):
        monkeypatch.delenv(name, raising=False)


@linux
def test_large_arrays_take_pages_that_are_there_already() -> None:
    plain, kept = (
        int(subprocess.run([sys.executable, "-c", FAULTS, how], check=True, capture_output=True).stdout)
        for how in ("plain", "kept")
    )
    assert kept < 0.8 * plain  # large pages make the plain count small on some machines


def test_the_switch_leaves_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "system")
    assert left_alone() == "ALIGN_ALLOCATOR=system"
    assert not keep_freed_memory()


@pytest.mark.parametrize("name", OWN)
def test_who_set_malloc_by_hand_keeps_that(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    assert not keep_freed_memory()
    assert name in left_alone()


def test_another_system_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "darwin" in left_alone()
    assert not keep_freed_memory()
