"""Cores, memory and processor of this machine as this process may use them: affinity, cgroup limits and `ulimit -v`
counted. No torch.

`root` stands for `/` everywhere, so that a test can lay out a machine of its own.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

UNLIMITED_BYTES = 2**60  # cgroup v1 writes a number near 2^63 for "no limit"


@dataclass(frozen=True, slots=True)
class Machine:
    """usable_cores: whole and part cores that this process may keep busy; memory in bytes, limit None when there is none."""

    processor: str
    cores: int
    usable_cores: float
    features: tuple[str, ...]
    memory_bytes: int
    memory_limit_bytes: int | None


# /proc/cpuinfo's words for arithmetic that training gains from
FEATURES = {"amx_bf16": "AMX bf16", "avx512_bf16": "AVX-512 bf16", "bf16": "bf16", "avx512f": "AVX-512", "avx2": "AVX2"}


def this_machine(root: Path = Path("/")) -> Machine:
    """What `root` says about the machine; where it says nothing (no Linux), what Python knows."""
    cpuinfo = _cpuinfo(root)
    flags = (cpuinfo.get("flags") or cpuinfo.get("Features") or "").split()
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cpu_quota(root)
    return Machine(
        processor=cpuinfo.get("model name") or platform.processor() or platform.machine(),
        cores=os.cpu_count() or 1,
        usable_cores=min(allowed, quota) if quota else allowed,
        features=tuple(word for flag, word in FEATURES.items() if flag in flags),
        memory_bytes=_memory_bytes(root),
        memory_limit_bytes=_memory_limit(root),
    )


def _cpuinfo(root: Path) -> dict[str, str]:
    """Keys of the first processor in /proc/cpuinfo."""
    first = _read(root / "proc/cpuinfo").partition("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def available_bytes(root: Path = Path("/")) -> int | None:
    """Memory that this process can still take: what the machine has left, and its own address space. None: not known."""
    room = _kilobytes(root / "proc/meminfo", "MemAvailable")
    limit, taken = _address_space(root), _kilobytes(root / "proc/self/status", "VmSize")
    left = max(0, limit - taken) if limit is not None and taken is not None else None
    return min((amount for amount in (room, left) if amount is not None), default=None)


def _memory_bytes(root: Path) -> int:
    total = _kilobytes(root / "proc/meminfo", "MemTotal")
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if total is None else total


def _memory_limit(root: Path) -> int | None:
    """The tightest limit: of the cgroups above this process, version 2 or 1, or of its own address space."""
    texts = [_read(folder / "memory.max") for folder in _cgroup_folders(root, "")]
    texts += [_read(folder / "memory.limit_in_bytes") for folder in _cgroup_folders(root, "memory")]
    limits = [int(text) for text in texts if text.strip().isdecimal() and int(text) < UNLIMITED_BYTES]
    own = _address_space(root)
    return min(limits if own is None else [*limits, own], default=None)


def _address_space(root: Path) -> int | None:
    """Bytes that this process may map (`ulimit -v`), None when there is no limit."""
    lines = _read(root / "proc/self/limits").splitlines()
    soft = next((line.split()[3] for line in lines if line.startswith("Max address space")), "unlimited")
    return int(soft) if soft.isdecimal() else None


def _kilobytes(file: Path, name: str) -> int | None:
    """Bytes of a line `NAME: N kB`."""
    lines = _read(file).splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def _cpu_quota(root: Path) -> float | None:
    """Cores' worth of time that the cgroups above this process allow, or None."""
    pairs = [_read(folder / "cpu.max").split() for folder in _cgroup_folders(root, "")]
    pairs += [
        [_read(folder / f"cpu.cfs_{part}_us").strip() for part in ("quota", "period")]
        for folder in _cgroup_folders(root, "cpu")
    ]
    quotas = [int(pair[0]) / int(pair[1]) for pair in pairs if len(pair) == 2 and all(map(str.isdecimal, pair))]
    return min(quotas, default=None)


def _cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """The folder of this process's cgroup and those above it; controller '' is version 2's one tree."""
    mount = root / "sys/fs/cgroup" / controller
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            own = mount / path.strip("/")
            yield own
            yield from (folder for folder in own.parents if folder.is_relative_to(mount))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
