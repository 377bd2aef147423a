"""How glibc's malloc keeps and reuses memory, set for tensors of many megabytes before the process has allocated any.

By itself glibc maps each large block anew, and the system hands out its pages one fault at a time: filling a tensor of
100 MB took 0.7 ms per MB that way, and 0.18 ms with its pages kept. The price is that memory once used stays with the
process until it ends, so what is freed must be used again. torch asks for aligned blocks: glibc takes a larger one and frees
what is left over at its ends, and where those small ends are kept for small objects, the block, freed, is too small for
the next tensor of the very same size. So small blocks are not kept apart (tcache_count, mxfast): LoRA of a 15m model then
takes 1.15 GiB instead of 1.6, at the same speed. Some of these can only be set when a process starts, so it begins anew.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress

SWITCH = "ALIGN_ALLOCATOR"  # `system` leaves the allocator as it is
TUNABLES = "GLIBC_TUNABLES"
SETTINGS = {
    "mmap_threshold": 2**30, "trim_threshold": 2**31 - 1, "top_pad": 2**26,  # bytes
    "tcache_count": 0, "mxfast": 0, "hugetlb": 1,  # huge pages where the system lets a process ask for them
}  # fmt: skip
TUNED = ":".join(f"glibc.malloc.{name}={value}" for name, value in SETTINGS.items())
OWN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", TUNABLES)  # who set one of these knows why


def begin_tuned() -> None:
    """Starts this program anew, in the same process, with the allocator set so; only once, and before it has done anything.

    Nothing happens where the allocator is left alone, where the program was not started with these arguments (then it is
    somebody else's), or where it cannot be started a second time. A Ctrl-C while Python starts again waits for this call.
    """
    if os.environ.get(TUNABLES) == TUNED:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        return
    if left_alone() or not _can_begin_again():
        return
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed before Python began
        with suppress(OSError, ValueError):
            stream.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    with suppress(OSError, ValueError):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, TUNABLES: TUNED})
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def _can_begin_again() -> bool:
    """Whether Python was started with these arguments, from a place that is known, for a program that can be read again."""
    arguments = sys.argv[1:]
    before = len(sys.orig_argv) - len(arguments)
    if not sys.executable or before < 2 or sys.orig_argv[before:] != arguments:
        return False
    program = sys.orig_argv[before - 1]
    piped = program == "-" or program.startswith(("/dev/stdin", "/dev/fd/", "/proc/"))  # and read by now
    return not piped


def left_alone() -> str:
    """Why the allocator is left as it is, in words; '' where nothing speaks against it."""
    if os.environ.get(SWITCH) == "system":
        return f"{SWITCH}=system"
    if not _is_glibc():
        return f"only known for glibc on Linux, this is {sys.platform}"
    return next((f"{name} is set" for name in OWN if os.environ.get(name, TUNED) != TUNED), "")


def _is_glibc() -> bool:
    try:
        return sys.platform == "linux" and (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (ValueError, OSError):
        return False
