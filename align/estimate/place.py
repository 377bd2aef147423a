"""Where a stage runs: what is one process's own, and how much memory there is for it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from align.machine import this_machine

# Resident without any model: all that a stage imports, kernels paged in by its first step, and ends of huge pages (measured
# on Linux with torch 2.13 for CPUs, as the next).
LIBRARIES_BYTES = 640 * 2**20
WRITERS_BYTES = 450 * 2**20  # where nothing trains (measured as the least that a critique stage took)
# Heap that lies idle between the blocks in use once micro-batches of several sizes have gone through it: freed memory is
# kept (allocator.py), and the blocks of one do not all fit into the gaps of another. A share of what is in use, fitted to what
# docs/memory.md shows.
IDLE_HEAP = 0.2
DRIVERS = {"cuda": Path("/dev/nvidiactl"), "hip": Path("/dev/kfd")}  # there where a GPU that torch was built for is


@dataclass(frozen=True)
class Place:
    """gpu: whether weights and activations lie on one. memory_bytes: what a process may use there, None: not known.

    processes: that share a training, each with its own memory (strategy: fsdp divides what trains among them).
    """

    gpu: bool
    has_bfloat16: bool
    memory_bytes: int | None
    processes: int = 1
    strategy: Literal["ddp", "fsdp"] = "ddp"

    @property
    def libraries_bytes(self) -> int:
        """What a process takes before it holds a model; on a GPU that lies in the machine's memory."""
        return 0 if self.gpu else LIBRARIES_BYTES

    @property
    def parts(self) -> int:
        """Parts that what trains lies in, one in each process."""
        return self.processes if self.strategy == "fsdp" else 1

    def spread(self, used: float) -> float:
        """Memory that the `used` bytes of micro-batches take, whose blocks come and go in several sizes."""
        return used if self.gpu else (1 + IDLE_HEAP) * used


def this_place(processes: int = 1, strategy: Literal["ddp", "fsdp"] = "ddp", here: int | None = None) -> Place:
    """A process of several, of which `here` (None: all) are on this machine. On the processors those share its memory; each
    has a GPU of its own."""
    gpus = _visible_gpus()
    if gpus is not None:
        return Place(True, True, min(gpus, default=None), processes, strategy)
    machine = this_machine()
    most = min(machine.memory_bytes, machine.memory_limit_bytes or machine.memory_bytes)
    has_bfloat16 = any(feature in machine.features for feature in ("AMX bf16", "AVX-512 bf16"))
    return Place(False, has_bfloat16, most // (here or processes), processes, strategy)


def _visible_gpus() -> Sequence[int] | None:
    """Bytes of each GPU that torch will see; empty: they are not known. None: it will see none."""
    built, visible = _built_for(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if built is None or visible in ("", "-1"):
        return None
    found = gpu_memory() if built == "cuda" else ()
    if not found:
        return () if DRIVERS[built].exists() else None
    names = visible.split(",") if visible else []
    if not all(name.strip().isdecimal() for name in names):
        return ()  # the name of a GPU, or of a part of one
    numbers = [int(name) for name in names] or range(len(found))
    return [found[number] for number in numbers if number < len(found)] or None


def _built_for() -> str | None:
    """The kind of GPUs that the torch that is installed was built for, by what its files say; None: for none."""
    torch = find_spec("torch")
    file = Path(torch.origin).with_name("version.py") if torch and torch.origin else None
    said = file.read_text(encoding="utf-8") if file and file.is_file() else ""
    return next((kind for kind in DRIVERS if re.search(rf"^{kind}\b[^=]*= *['\"]", said, re.MULTILINE)), None)


@cache
def gpu_memory() -> tuple[int, ...]:
    """Bytes of each NVIDIA GPU as its driver says, without torch; empty where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    asked = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(asked, check=True, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(int(line) * 2**20 for line in said.split() if line.isdecimal())
