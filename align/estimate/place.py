"""Where a stage runs: what is one process's own, and how much memory there is for it."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Literal

from align.machine import this_machine

# Resident without any model: 649 MiB with all that a stage imports, and 26 of kernels paged in by its first step (measured
# on Linux with torch 2.13 for CPUs).
LIBRARIES_BYTES = 675 * 2**20
WRITERS_BYTES = 600 * 2**20  # where nothing trains (measured as the least that a critique stage took)
# Heap that lies idle between the blocks in use once micro-batches of several sizes have gone through it: freed memory is
# kept (allocator.py), and the blocks of one do not fit into the gaps of another. A share of what is in use, and, where
# logits are computed again, so many times what a chunk of them takes: more beside the small blocks of adapters. Fitted to
# what docs/memory.md shows.
IDLE_HEAP = 0.65
IDLE_CHUNKS, IDLE_CHUNKS_ADAPTED = 1.0, 2.75


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

    def spread(self, used: float, chunk: float = 0.0, *, adapted: bool = False) -> float:
        """Memory that the `used` bytes of micro-batches take, whose blocks come and go in several sizes. chunk: of logits that are computed
        again."""
        if self.gpu:
            return used
        return (1 + IDLE_HEAP) * used + (IDLE_CHUNKS_ADAPTED if adapted else IDLE_CHUNKS) * chunk


def this_place(processes: int = 1, strategy: Literal["ddp", "fsdp"] = "ddp") -> Place:
    """A process of several on this machine. On the processors they share its memory; each has a GPU of its own."""
    gpus = gpu_memory() if _torch_sees_gpus() else ()
    if gpus:
        return Place(True, True, min(gpus), processes, strategy)
    machine = this_machine()
    most = min(machine.memory_bytes, machine.memory_limit_bytes or machine.memory_bytes)
    has_bfloat16 = any(feature in machine.features for feature in ("AMX bf16", "AVX-512 bf16"))
    return Place(False, has_bfloat16, most // processes, processes, strategy)


def _torch_sees_gpus() -> bool:
    """Whether the torch that is installed was built for GPUs, and they are not hidden from it."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not hidden and not version("torch").endswith("+cpu")


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
