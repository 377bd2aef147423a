"""Thousands of tiny runs in one registry: memory, open files and time of a run stay what they were.

How many: ALIGN_SOAK (2,000 by default).
"""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest

from align.registry import Registry
from tests.registry_fill import add_data, begin, fail, finish
from tests.resume_cases import CASES, made, model_of, port_of

RUNS = int(os.environ.get("ALIGN_SOAK", "2000"))
EVERY = max(20, RUNS // 20)
BYTES_PER_RUN = 4096
PAGE = resource.getpagesize()


@dataclass(frozen=True)
class Sample:
    """What the process uses after some runs. seconds: processor time of one run, as a median."""

    runs: int
    memory: int
    files: int
    seconds: float


def used() -> tuple[int, int]:
    """Resident bytes and open files of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE, len(list(Path("/proc/self/fd").iterdir()))


def one(registry: Registry, number: int) -> None:
    """A run with metrics and a result; one in ten fails and is resumed, one in twenty makes data, one in fifty sweeps."""
    key = f"key {number}"
    if number % 10 == 0:
        fail(registry, key=key)
    stopped = registry.resumable(key)
    with registry.resume_run(stopped.id) if stopped else begin(registry, key=key) as run:
        run.log(f"run {number}")
        for step in range(3):
            run.log_metrics(step, {"loss": 1.0 / (step + 1), "accuracy": step / 3})
        finish(run, f"harbour/stage-{number % 7}", f"weights {number}")
    if number % 20 == 0:
        add_data(registry, f"harbour/data-{number % 3}", f'{{"text": "{number}"}}\n')
    if number % 50 == 0:
        registry.tag(f"harbour/stage-{number % 7}", "best")
        registry.gc()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_files_and_time_of_a_run_do_not_grow_with_their_number(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)
    registry, samples, took = Registry.open(), [], []
    for number in range(RUNS):
        began = time.process_time()
        one(registry, number)
        took.append(time.process_time() - began)
        if (number + 1) % EVERY == 0:
            samples.append(Sample(number + 1, *used(), median(took[-EVERY:])))
    assert len(registry.all_runs()) == RUNS
    assert {run.status for run in registry.all_runs()} == {"finished"}
    assert {record.path.is_dir() for record in registry.all_checkpoints()} == {True}
    settled = samples[len(samples) // 4 :]
    grown = (settled[-1].memory - settled[0].memory) / (settled[-1].runs - settled[0].runs)
    with capsys.disabled():
        print(f"\n{RUNS} runs: {grown:.0f} bytes a run, {told(samples[0])}, then {told(samples[-1])}")  # noqa: T201
    assert grown < BYTES_PER_RUN
    assert max(after.files - before.files for before, after in pairwise(settled)) <= 2
    assert settled[-1].files <= settled[0].files + 2


def told(sample: Sample) -> str:
    """A sample in words."""
    return f"{sample.memory / 2**20:.1f} MiB, {sample.files} open files and {1000 * sample.seconds:.1f} ms"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_real_trainings_one_after_another_in_one_process_keep_no_memory(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    case = CASES["reward"]
    port = port_of(case, tmp_path / "port", model_of(case, request))
    memory = []
    for seed in range(8):
        assert port.run(f"stages.x.seed={seed}") == {"x": "run"}
        memory.append(used()[0])
    assert len(made(port)) == 8
    assert (memory[-1] - memory[3]) / 4 < 2**20, [size // 2**20 for size in memory]
