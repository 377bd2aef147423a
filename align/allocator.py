"""Freed memory kept by the process instead of given back to the system with every large tensor (glibc's malloc).

By itself glibc maps each large block anew, and the system hands out its pages one fault at a time: filling a tensor of
100 MB took 0.7 ms per MB that way, and 0.18 ms with its pages kept. The price is that memory once used stays with the
process until it ends.
"""

from __future__ import annotations

import ctypes
import os
import sys

SWITCH = "ALIGN_ALLOCATOR"  # `system` leaves the allocator as it is
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3  # names of mallopt's parameters, as malloc.h numbers them
SETTINGS = {MMAP_THRESHOLD: 2**30, TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 2**26}  # bytes
OWN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")  # who set one of these knows why


def keep_freed_memory() -> bool:
    """Sets the allocator so; False where it is left as it is: another system or library, or the user's wish."""
    if left_alone():
        return False
    try:
        library = ctypes.CDLL(None)
        if not hasattr(library, "gnu_get_libc_version"):
            return False
        return all(library.mallopt(name, value) == 1 for name, value in SETTINGS.items())
    except (OSError, AttributeError):
        return False


def left_alone() -> str:
    """Why the allocator is left as it is, in words; '' where nothing speaks against it."""
    if os.environ.get(SWITCH) == "system":
        return f"{SWITCH}=system"
    if sys.platform != "linux":
        return f"only known on Linux, this is {sys.platform}"
    return next((f"{name} is set" for name in OWN if name in os.environ), "")
