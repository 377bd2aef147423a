"""Two at once, and clocks that jump: what another process did a moment ago, and what the time says, breaks nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from align.errors import AlignError
from align.registry import Registry, cleanup, queries
from align.registry.locks import FileLock, is_held
from tests.registry_fill import add_checkpoint, begin, fail, finish
from tests.resume_cases import CASES, made, model_of, port_of, started
from tests.test_registry_faults import unrecorded


@pytest.fixture
def registry() -> Registry:
    return Registry.open()


def test_a_run_that_another_process_finished_meanwhile_is_not_taken_up_again(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = fail(registry, key="k")
    acquire = FileLock.acquire

    def after_another(self: FileLock, **named: float) -> bool:
        monkeypatch.setattr(FileLock, "acquire", acquire)
        with Registry.open().resume_run(stopped.id) as run:
            finish(run, "harbour/sft", "w")
        return acquire(self, **named)

    monkeypatch.setattr(FileLock, "acquire", after_another)
    with pytest.raises(AlignError, match="finished by another process just now"):
        registry.resume_run(stopped.id)
    assert registry.all_runs()[0].status == "finished"
    assert not is_held(stopped.work / "lock")
    registry.gc()
    assert registry.gc(dry_run=True) == []


def test_a_result_that_another_process_recovered_meanwhile_is_recorded_once(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    unrecorded(registry)
    acquire = FileLock.acquire

    def after_another(self: FileLock, **named: float) -> bool:
        monkeypatch.setattr(FileLock, "acquire", acquire)
        assert len(Registry.open().recover()) == 1
        return acquire(self, **named)

    monkeypatch.setattr(FileLock, "acquire", after_another)
    assert registry.recover() == []
    assert len(registry.all_checkpoints()) == 1


def test_a_result_that_could_not_be_recorded_is_recorded_by_the_next_command(registry: Registry) -> None:
    unrecorded(registry)
    assert registry.all_runs()[0].status == "failed"
    assert registry.recover() == [registry.all_runs()[0].id]
    assert registry.all_runs()[0].status == "finished"
    assert registry.verify("harbour/sft") == []


def test_what_ended_a_run_is_told_where_the_registry_cannot_record_it(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object, **__: object) -> None:
        raise AlignError("the registry cannot be written", "Free some space.")

    with pytest.raises(ArithmeticError, match="loss is nan"), begin(registry):  # noqa: PT012
        monkeypatch.setattr(registry._database, "write", no_room)
        raise ArithmeticError("loss is nan")
    assert Registry.open().all_runs()[0].status == "crashed"


def test_a_sweep_leaves_a_run_alone_that_began_while_it_looked(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_checkpoint(registry)
    begun = []
    pinning = cleanup.pinning_runs

    def and_then_one_begins(*values: Any) -> Any:
        pinned = pinning(*values)
        begun.append(begin(registry, "dpo"))
        return pinned

    monkeypatch.setattr(cleanup, "pinning_runs", and_then_one_begins)
    registry.gc()
    with begun[0] as run:
        assert run.artifact.is_dir()
        finish(run, "harbour/dpo", "d")
    assert registry.verify("harbour/dpo") == []


def test_a_lock_on_a_full_disk_is_held_and_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", no_room)
    lock = FileLock(tmp_path / "lock")
    assert lock.acquire()
    assert is_held(tmp_path / "lock")
    lock.release()
    assert not is_held(tmp_path / "lock")


# Clocks --------------------------------------------------------------------------------------------------------------


def test_a_clock_that_jumps_back_does_not_change_what_is_newest(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    years: Iterator[int] = iter(range(2040, 1980, -1))
    for module in ("registration", "run", "store"):
        monkeypatch.setattr(f"align.registry.{module}.now", lambda: f"{next(years)}-01-01T00:00:00.000+00:00")
    monkeypatch.setattr(time, "time", lambda: 0.0)
    old, new = (add_checkpoint(registry, content=content) for content in ("old", "new"))
    assert new.created < old.created
    assert registry.checkpoint("harbour/sft").id == new.id
    assert [record.id for record in registry.all_checkpoints()] == [new.id, old.id]
    stopped = fail(registry, "dpo")
    assert registry.resumable("key of dpo").id == stopped.id
    with registry.resume_run(stopped.id) as run:
        finish(run, "harbour/dpo", "d")
    assert [removal.id for removal in registry.gc()] == [old.id]
    assert registry.verify("harbour/sft") == registry.verify("harbour/dpo") == []


def test_an_edit_is_seen_though_the_clock_was_set_back_to_when_the_file_was_made(registry: Registry) -> None:
    record = add_checkpoint(registry)
    file = record.path / "model.safetensors"
    before = file.stat()
    file.chmod(0o644)
    file.write_bytes(bytes(reversed(file.read_bytes())))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(AlignError, match=r"model\.safetensors has changed"):
        registry.check_unchanged(record)


# Processes -----------------------------------------------------------------------------------------------------------


def test_two_runs_of_one_recipe_at_once_end_in_the_same_bytes(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    case = CASES["pretrain"]
    port = port_of(case, tmp_path / "port", model_of(case, request))
    pair = [started(port.folder) for _ in range(2)]
    for process in pair:
        process.join()
    assert [process.exitcode for process in pair] == [0, 0]
    registry = port.workshop().registry
    assert {run.status for run in registry.all_runs()} == {"finished"}
    assert len(made(port)) == 1
    assert len(queries.artifact_paths(registry._database)) == 2, "the data set and the checkpoint"
