"""`align doctor`: what this machine can do for training, and what to fix. Looks only; changes nothing, needs no network."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from align.allocator import left_alone
from align.errors import AlignError
from align.machine import this_machine

# The versions that the tests run with; constraints.txt installs exactly these.
TESTED = {
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "peft": "0.21.2",
    "trl": "1.16.0",
    "datasets": "5.2.0",
    "accelerate": "1.15.0",
    "bitsandbytes": "0.50.2",
    "safetensors": "0.8.0",
}
OPTIONAL = {
    "tensorboard": "log_to: [tensorboard]",
    "wandb": "log_to: [wandb]",
    "mlflow": "log_to: [mlflow]",
    "trackio": "log_to: [trackio]",
    "psycopg": "a registry in PostgreSQL",
    "lm_eval": "align eval --harness",
}
EXTRAS = {"psycopg": "postgres", "lm_eval": "harness"}  # where an extra is not called like its package

LEAST_FREE_BYTES = 5 * 2**30
GIB = 2**30

Status = Literal["ok", "note", "fix"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. status: fine, worth knowing, or to be fixed by doing `advice`."""

    name: str
    value: str
    status: Status = "ok"
    advice: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def examine() -> list[Finding]:
    """Everything, in the order in which it is shown. Imports torch, so it takes seconds."""
    return [
        Finding("align", importlib.metadata.version("align")),
        Finding("python", f"{platform.python_version()} on {platform.platform(terse=True)}"),
        *_hardware(),
        *_accelerators(),
        *_libraries(),
        *_optional(),
        *_storage(),
    ]


def _hardware() -> Iterator[Finding]:
    machine = this_machine()
    details = asdict(machine)
    features = ", ".join(machine.features) or "no vector arithmetic known"
    yield Finding("processor", f"{machine.processor} ({features})", details={"features": machine.features})
    cores = f"{machine.usable_cores:g} of {machine.cores} usable"
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdecimal() and int(threads) < machine.usable_cores:
        advice = f"OMP_NUM_THREADS={threads} keeps training from using the others; unset it."
        yield Finding("cores", cores, "note", advice, details)
    else:
        yield Finding("cores", cores, details=details)
    limit = f", limited to {machine.memory_limit_bytes / GIB:.1f} GiB" if machine.memory_limit_bytes else ""
    yield Finding("memory", f"{machine.memory_bytes / GIB:.1f} GiB{limit}", details=details)
    why = left_alone()
    yield Finding("allocator", f"as the system has it ({why})" if why else "keeps freed memory for the next tensor")


def _accelerators() -> Iterator[Finding]:
    try:
        import torch

        from align.models.hardware import compute_dtype
    except (ImportError, OSError) as error:
        yield Finding("arithmetic", f"torch cannot be imported: {error}", "fix", "Install it again: make setup")
        return
    dtype = str(compute_dtype("auto")).removeprefix("torch.")
    yield Finding("arithmetic", f"{dtype} (precision: auto)", details={"dtype": dtype})
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        text = (
            f"{properties.name}, {properties.total_memory / GIB:.1f} GiB, compute {properties.major}.{properties.minor}"
        )
        yield Finding(f"gpu {index}", text, details={"memory_bytes": properties.total_memory})
    if torch.cuda.device_count():
        yield Finding("cuda", str(torch.version.cuda))
    elif torch.backends.mps.is_available():
        yield Finding("gpu", "Apple (mps)")
    elif shutil.which("nvidia-smi"):
        advice = "Install a torch built for CUDA: https://pytorch.org/get-started/locally/"
        yield Finding("gpu", "there is an NVIDIA driver, but torch does not see a GPU", "fix", advice)
    else:
        yield Finding("gpu", "none: training runs on the processor", "note", "Fine for small models; see `align plan`.")


def _libraries() -> Iterator[Finding]:
    least = _least_versions()
    for name, tested in TESTED.items():
        version = _version(name)
        details = {"tested": tested, "least": least.get(name)}
        if version is None:
            yield Finding(name, "not installed", "fix", "pip install -e . -c constraints.txt", details)
        elif _numbers(version) < _numbers(least.get(name, "0")):
            advice = f"pip install -U '{name}>={least[name]}'"
            yield Finding(name, f"{version} is older than {least[name]}, which is needed", "fix", advice, details)
        elif _numbers(version) != _numbers(tested):
            yield Finding(name, f"{version}, tested with {tested}", "note", details=details)
        else:
            yield Finding(name, version, details=details)


def _optional() -> Iterator[Finding]:
    for name, use in OPTIONAL.items():
        version = _version(name)
        advice = "" if version else f"for {use}: pip install 'align[{EXTRAS.get(name, name)}]'"
        yield Finding(name, version or "not installed (optional)", "ok" if version else "note", advice)


def _storage() -> Iterator[Finding]:
    home = Path(os.environ.get("ALIGN_HOME") or ".align").absolute()
    there = next(folder for folder in [home, *home.parents] if folder.is_dir())
    free = shutil.disk_usage(there).free
    text = f"{free / GIB:.1f} GiB free at {home}"
    if not os.access(there, os.W_OK):
        yield Finding("disk", f"{there} cannot be written", "fix", "Set ALIGN_HOME to a folder of your own.")
    elif free < LEAST_FREE_BYTES:
        yield Finding("disk", text, "fix", "Free some space (`align checkpoints gc`), or set ALIGN_HOME elsewhere.")
    else:
        yield Finding("disk", text, details={"free_bytes": free, "home": str(home)})
    yield _registry()


def _registry() -> Finding:
    from align.registry.store import Registry

    place = "PostgreSQL" if os.environ.get("ALIGN_REGISTRY_URL") else "SQLite"
    try:
        count = Registry.open(create=False).checkpoint_count()
    except AlignError as error:
        return Finding("registry", error.message, "fix", error.hint)
    return Finding("registry", f"{place}, {count} checkpoints", details={"checkpoints": count})


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _least_versions() -> dict[str, str]:
    """Lowest version of each dependency, as align's own metadata state it."""
    found = (re.match(r"([\w.-]+)(?:\[.*?\])?>=([\d.]+)", text) for text in importlib.metadata.requires("align") or ())
    return {match[1]: match[2] for match in found if match}


def _numbers(version: str) -> tuple[int, ...]:
    """Release part of a version as numbers: '2.13.0+cpu' is (2, 13)."""
    release = re.match(r"\d+(?:\.\d+)*", version)
    parts = [int(part) for part in release[0].split(".")] if release else []
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)
