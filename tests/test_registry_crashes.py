"""Killed between any two system calls of a registration, the registry is whole and can go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from align.errors import AlignError
from align.registry import Registry
from tests.faults import killed
from tests.registry_fill import add_checkpoint, begin, finish

CALLS = frozenset({"fsync", "chmod", "rename", "replace", "unlink", "rmdir", "commit"})


def every_crash(
    folder: Path, work: Callable[[Registry], None], before: Callable[[Registry], None]
) -> Iterator[Registry]:
    """A registry of its own for each moment at which `work` can be killed, after `before` was done in peace."""
    for countdown in range(400):
        home = folder / str(countdown)
        before(Registry.open(home))
        if not killed(home, work, countdown, only=CALLS):
            assert countdown > 10, "the calls are watched"
            return
        yield Registry.open(home)
    raise AssertionError("never came to an end")


def register(registry: Registry) -> None:
    with begin(registry, key="k") as run:
        finish(run, "harbour/sft", "weights")


def nothing(registry: Registry) -> None:
    """No preparation."""


def assert_whole(registry: Registry) -> None:
    """What is offered is complete; what is not offered leaves no trace once swept."""
    for record in registry.all_checkpoints():
        assert registry.verify(record.id) == []
        registry.check_unchanged(record)
    registry.gc()
    folders = {path.name for path in (registry.home / "checkpoints").iterdir()}
    assert folders == {record.id[:16] for record in registry.all_checkpoints()}
    assert registry.gc(dry_run=True) == []


def test_a_registration_killed_anywhere_is_absent_or_complete_and_can_be_repeated(tmp_path: Path) -> None:
    offered, recovered = set(), 0
    for registry in every_crash(tmp_path, register, nothing):
        assert all(run.status in ("crashed", "finished") for run in registry.all_runs())
        offered.add(len(registry.all_checkpoints()))
        assert all(registry.verify(record.id) == [] for record in registry.all_checkpoints())
        recovered += len(registry.recover())
        if registry.all_checkpoints():
            assert registry.all_runs()[0].status == "finished"
        elif stopped := registry.resumable("k"):
            with registry.resume_run(stopped.id) as run:
                finish(run, "harbour/sft", "weights")
        else:
            register(registry)
        assert len(registry.all_checkpoints()) == 1
        assert_whole(registry)
    assert offered == {0, 1}
    assert recovered > 3, "crashes between hashing and the row end in a registration"


@pytest.mark.slow
def test_after_a_crash_gc_alone_leaves_the_registry_whole(tmp_path: Path) -> None:
    for registry in every_crash(tmp_path, register, lambda registry: add_checkpoint(registry, "harbour/before")):
        registry.gc()
        assert_whole(registry)
        assert registry.verify("harbour/before") == []


def supersede(registry: Registry) -> None:
    registry.gc()


def two_of_a_name(registry: Registry) -> None:
    add_checkpoint(registry, content="old")
    add_checkpoint(registry, content="new")


@pytest.mark.slow
def test_a_collection_killed_anywhere_offers_nothing_half(tmp_path: Path) -> None:
    for registry in every_crash(tmp_path, supersede, two_of_a_name):
        for record in registry.all_checkpoints():
            if registry.verify(record.id):
                raise AssertionError(f"{record} is offered and not whole")
        assert_whole(registry)
        assert len(registry.all_checkpoints()) == 1


@pytest.mark.slow
def test_an_artifact_that_was_damaged_before_it_got_its_row_is_not_adopted(tmp_path: Path) -> None:
    checked = 0
    for registry in every_crash(tmp_path, register, nothing):
        pending = list(registry.home.glob("runs/*/finish.json"))
        published = list(registry.home.glob("checkpoints/*/model.safetensors"))
        if not (pending and published) or registry.all_checkpoints():
            continue
        published[0].chmod(0o644)
        published[0].write_text("damaged")
        assert registry.recover() == []
        with pytest.raises(AlignError):
            registry.checkpoint("harbour/sft")
        checked += 1
    assert checked
