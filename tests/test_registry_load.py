"""Eight processes at one registry, of which two are killed: no error, no lost record. On SQLite and on PostgreSQL."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from align.registry import Registry
from tests.postgres_kit import emptied, postgres_server

ROOT = Path(__file__).parents[1]
PROCESSES, DOOMED = 8, 2

WORKER = """
import random, sys, time
from align.registry import DataUse, Registry
from tests.registry_fill import add_checkpoint, add_data, begin, fail, finish

me, seconds = sys.argv[1], float(sys.argv[2])
registry, chance, end, number = Registry.open(), random.Random(me), time.monotonic() + float(sys.argv[2]), 0

def checkpoint(name):
    record = add_checkpoint(registry, f"harbour/{me}", name)
    print("checkpoint", record.run, flush=True)

def same_content(_name):
    print("checkpoint", add_checkpoint(registry, f"harbour/{me}", "what all of them make").run, flush=True)

def data(name):
    add_data(registry, f"harbour/data-{me}", name)
    print("data", f"key of {name}", flush=True)

def failed(name):
    print("failed", fail(registry, me, lambda run: run.log_metrics(1, {"loss": 1.0})).id, flush=True)

def metrics(name):
    with begin(registry, me) as run:
        for step in range(5):
            run.log_metrics(step, {"loss": 1.0 / (step + 1)})
        finish(run, f"harbour/{me}", name)
        assert len(registry.metrics(run.id)) == 5
    print("checkpoint", run.id, flush=True)

def tag(name):
    if registry.knows(f"harbour/{me}"):
        registry.tag(f"harbour/{me}", f"best-{me}")

def read(_name):
    registry.all_runs(20), registry.all_checkpoints(20), registry.all_data(), registry.recover()

def sweep(_name):
    registry.gc(dry_run=chance.random() < 0.5)

while time.monotonic() < end:
    number += 1
    chance.choice([checkpoint, same_content, data, failed, metrics, tag, read, sweep])(f"{me} {number}")
print("done", number, flush=True)
"""


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest) -> Iterator[str | None]:
    if request.param == "sqlite":
        yield None
        return
    with postgres_server() as server:
        yield server


@pytest.mark.parametrize("seconds", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_eight_processes_lose_no_record_though_two_are_killed(
    seconds: int, url: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if url:
        monkeypatch.setenv("ALIGN_REGISTRY_URL", emptied(url))
    Registry.open()
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(number), str(seconds)], cwd=ROOT, env=os.environ, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for number in range(PROCESSES)
    ]  # fmt: skip
    chance = random.Random(seconds)
    time.sleep(chance.uniform(seconds / 2, seconds))
    for worker in workers[:DOOMED]:
        worker.send_signal(signal.SIGKILL)
    said, errors = zip(*[worker.communicate() for worker in workers], strict=True)
    assert [worker.returncode for worker in workers[DOOMED:]] == [0] * (PROCESSES - DOOMED), "\n".join(errors)
    assert all(lines.splitlines()[-1].startswith("done") for lines in said[DOOMED:])
    promised = [line.split(" ", 1) for lines in said for line in lines.splitlines()]
    assert_kept(Registry.open(), {what: {which for kind, which in promised if kind == what} for what, _ in promised})


def assert_kept(registry: Registry, promised: dict[str, set[str]]) -> None:
    """Every run that a process was told of is there, whole, and numbered once; the killed ones are shown as dead."""
    runs = {run.id: run for run in registry.all_runs()}
    assert {runs[run].status for run in promised.get("checkpoint", ())} <= {"finished"}
    assert {runs[run].status for run in promised.get("failed", ())} <= {"failed"}
    assert {run.status for run in runs.values()} <= {"finished", "failed", "crashed"}
    assert len({run.number for run in runs.values()}) == len(runs)
    registry.recover()
    records = registry.all_checkpoints()
    assert len({record.number for record in records}) == len(records)
    for record in (*records, *registry.all_data()):
        registry.check_unchanged(record)
    registry.gc()
    assert registry.gc(dry_run=True) == []
