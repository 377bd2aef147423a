"""`align doctor` finds what is there, says what to fix, and changes nothing."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from align import doctor
from align.cli.recipes import doctor_command
from align.machine import available_bytes, this_machine

GIB = 2**30


def lay_out(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


CPUINFO = (
    "processor\t: 0\nmodel name\t: Fast CPU\nflags\t\t: fpu avx2 amx_bf16\n\nprocessor\t: 1\nmodel name\t: Other\n"
)
PROC = {"proc/cpuinfo": CPUINFO, "proc/meminfo": f"MemTotal:  {8 * 2**20} kB\nMemFree: 1 kB\n"}


def test_the_processor_and_its_memory_are_read(tmp_path):
    machine = this_machine(lay_out(tmp_path, PROC))
    assert machine.processor == "Fast CPU"
    assert machine.features == ("AMX bf16", "AVX2")
    assert (machine.memory_bytes, machine.memory_limit_bytes) == (8 * GIB, None)
    assert machine.usable_cores == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    "files",
    [
        {  # version 2: the tightest limit stands above the process's own group
            "proc/self/cgroup": "0::/team/job\n",
            "sys/fs/cgroup/team/memory.max": f"{2 * GIB}\n",
            "sys/fs/cgroup/team/job/memory.max": "max\n",
            "sys/fs/cgroup/team/job/cpu.max": "50000 100000\n",
            "sys/fs/cgroup/team/cpu.max": "max 100000\n",
        },
        {  # version 1: one tree for each controller; -1 and a number near 2^63 mean no limit
            "proc/self/cgroup": "5:cpu,cpuacct:/box\n4:memory:/box\n0::/\n",
            "sys/fs/cgroup/memory/box/memory.limit_in_bytes": f"{2 * GIB}\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        {  # in a container the named group is not mounted; its limits stand at the root
            "proc/self/cgroup": "0::/docker/abc\n",
            "sys/fs/cgroup/memory.max": f"{2 * GIB}\n",
            "sys/fs/cgroup/cpu.max": "50000 100000\n",
        },
    ],
    ids=["version 2", "version 1", "container"],
)
def test_limits_of_containers_count(tmp_path, files):
    machine = this_machine(lay_out(tmp_path, {**PROC, **files}))
    assert machine.memory_limit_bytes == 2 * GIB
    assert machine.usable_cores == 0.5


def test_the_limit_of_the_address_space_counts(tmp_path):
    """As `ulimit -v` sets it: of the memory there is, and of what is left when that is not enough."""
    limits = (
        "Limit  Soft Limit  Hard Limit  Units\nMax address space         {soft}           unlimited            bytes\n"
    )
    files = {
        **PROC, "proc/meminfo": f"MemTotal: {8 * 2**20} kB\nMemAvailable: {4 * 2**20} kB\n",
        "proc/self/limits": limits.format(soft=2 * GIB), "proc/self/status": f"VmSize:\t {2**20} kB\n",
    }  # fmt: skip
    assert this_machine(lay_out(tmp_path, files)).memory_limit_bytes == 2 * GIB
    assert available_bytes(tmp_path) == GIB
    lay_out(tmp_path, {"proc/self/limits": limits.format(soft="unlimited")})
    assert this_machine(tmp_path).memory_limit_bytes is None
    assert available_bytes(tmp_path) == 4 * GIB


def test_a_machine_that_tells_nothing_is_still_described(tmp_path):
    machine = this_machine(tmp_path)
    assert machine.memory_bytes > 0
    assert machine.memory_limit_bytes is None


def findings() -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in doctor.examine()}


def test_the_tested_versions_are_those_of_the_constraints_file():
    text = (Path(__file__).parents[1] / "constraints.txt").read_text()
    pinned = dict(re.findall(r"^([\w.-]+)==([\w.]+)", text, re.MULTILINE))
    assert {name: pinned.get(name) for name in doctor.TESTED} == doctor.TESTED


@pytest.mark.parametrize(
    ("version", "status", "words"),
    [
        (None, "fix", "not installed"),
        ("1.0", "fix", "older than 5.20, which is needed"),
        ("5.99", "note", "tested with 5.23.0"),
        ("5.23.0+local", "ok", "5.23.0"),
        ("5.23", "ok", "5.23"),
    ],
)
def test_versions_are_judged(monkeypatch, version, status, words):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: version if name == "transformers" else real(name))
    found = next(finding for finding in doctor._libraries() if finding.name == "transformers")
    assert (found.status, words in found.value) == (status, True)
    assert bool(found.advice) == (status == "fix")


def test_everything_is_looked_at_and_nothing_changed(align_home):
    found = findings()
    assert {"python", "processor", "cores", "memory", "arithmetic", "torch", "wandb", "disk", "registry"} <= set(found)
    assert found["registry"].value == "SQLite, 0 checkpoints"
    assert not align_home.exists()


def test_a_registry_that_cannot_be_opened_is_something_to_fix(monkeypatch):
    monkeypatch.setenv("ALIGN_REGISTRY_URL", "mysql://secret@host/x")
    found = doctor._registry()
    assert found.status == "fix"
    assert "secret" not in found.value


def test_a_full_disk_and_a_locked_folder_are_something_to_fix(monkeypatch):
    monkeypatch.setattr(doctor, "LEAST_FREE_BYTES", 2**80)
    assert next(doctor._storage()).status == "fix"
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "cannot be written" in next(doctor._storage()).value


def test_threads_that_are_held_back_are_noticed(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "0")
    assert {finding.name: finding.status for finding in doctor._hardware()}["cores"] == "note"


def test_the_command_ends_well_and_speaks_json():
    text = CliRunner().invoke(doctor_command, [])
    assert text.exit_code == 0
    document = json.loads(CliRunner().invoke(doctor_command, ["--json"]).output)
    assert document["to_fix"] == sum(finding["status"] == "fix" for finding in document["findings"])


def accelerators() -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in doctor._accelerators()}


def test_a_gpu_is_described(monkeypatch):
    import torch

    properties = SimpleNamespace(name="Card", total_memory=80 * GIB, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert accelerators()["gpu 0"].value == "Card, 80.0 GiB, compute 9.0"


def test_a_driver_without_a_torch_for_it_is_something_to_fix(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    assert accelerators()["gpu"].status == "fix"
