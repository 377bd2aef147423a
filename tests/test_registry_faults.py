"""Every write, sync, rename and commit of the store fails once, or from then on: said in words, nothing half, nothing lost."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from align.errors import AlignError
from align.registry import NewData, Registry
from align.registry.artifacts import NEW, disk_errors_explained
from tests.faults import MOST, Faults, broken, for_good, full, killed, once
from tests.registry_fill import add_checkpoint, begin, fail, finish

FAULTS: dict[str, Callable[[int], Faults]] = {"full once": once(full), "broken": once(broken), "full": for_good}


@dataclass(frozen=True)
class Operation:
    """What the store is asked to do after `before` was done in peace, and what holds once it has been done."""

    work: Callable[[Registry], object]
    holds: Callable[[Registry], bool]
    before: Callable[[Registry], object] = lambda _registry: None


def checkpoint(registry: Registry) -> None:
    """As `align run`: what is there is reused, a stopped run goes on."""
    registry.recover()
    if registry.checkpoint_by_key("k"):
        return
    stopped = registry.resumable("k")
    with registry.resume_run(stopped.id) if stopped else begin(registry, key="k") as run:
        run.log_metrics(1, {"loss": 1.0})
        run.log("step 1")
        with disk_errors_explained(run.work):  # as for the work of a stage
            (run.artifact / "model.safetensors").write_text("weights")
        run.finish_checkpoint(name="harbour/sft", kind="model", parents=[], data=[], metrics={}, versions={})


def read_data(registry: Registry) -> None:
    folder = registry.new_folder("data")
    with disk_errors_explained(folder):
        (folder / "train.jsonl").write_text('{"text": "a"}\n')
    registry.add_data("harbour/instructions", "k", folder, {"train_rows": 1})


def made_data(registry: Registry) -> None:
    registry.recover()
    if len(registry.all_data()) == 2:
        return
    with begin(registry, "revised", key="k") as run:
        made = []
        for name in ("sft", "preferences"):
            folder = run.artifact / name
            with disk_errors_explained(run.work):
                folder.mkdir()
                (folder / "train.jsonl").write_text(f'{{"text": "{name}"}}\n')
            made.append(NewData(f"harbour/revised.{name}", f"key of {name}", folder, {"train_rows": 1}))
        run.finish_data(made)


def unrecorded(registry: Registry) -> None:
    """A result that is complete, and whose run ended before its row was written."""

    def lost(*_: object) -> list[int]:
        raise OSError("power cut")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("align.registry.registration.publish_all", lost)
        with pytest.raises(OSError, match="power cut"), begin(registry, key="k") as run:
            finish(run, "harbour/sft", "weights")


def two_of_a_name(registry: Registry) -> None:
    add_checkpoint(registry, content="old")
    fail(registry, "sft", lambda run: (run.work / "state" / "moments").write_text("1"))
    add_checkpoint(registry, content="new")


def sweep(registry: Registry) -> None:
    registry.gc()


def remove(registry: Registry) -> None:
    if registry.knows("harbour/old"):
        registry.remove("harbour/old")


def one_checkpoint(registry: Registry) -> bool:
    (record,) = registry.all_checkpoints()
    return (record.path / "model.safetensors").read_text() == "weights"


OPERATIONS = {
    "checkpoint": Operation(checkpoint, one_checkpoint),
    "resume": Operation(checkpoint, one_checkpoint, lambda registry: fail(registry, key="k")),
    "recover": Operation(Registry.recover, one_checkpoint, unrecorded),
    "data": Operation(read_data, lambda registry: registry.data("harbour/instructions").info["train_rows"] == 1),
    "data of a run": Operation(made_data, lambda registry: len(registry.all_data()) == 2),
    "gc": Operation(
        sweep, lambda registry: len(registry.all_checkpoints()) == 1 and not registry.gc(dry_run=True), two_of_a_name
    ),
    "remove": Operation(
        remove, lambda registry: not registry.knows("harbour/old"), lambda registry: add_checkpoint(registry, "harbour/old")
    ),
    "tag": Operation(
        lambda registry: registry.tag("harbour/sft", "best"), lambda registry: registry.knows("best"), add_checkpoint
    ),
}  # fmt: skip
QUICK = {("checkpoint", "broken"), ("checkpoint", "full"), ("recover", "full once")}


@pytest.fixture(autouse=True)
def swift(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that was not given back shows at once, no edit is waited for, and no sync."""
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)
    monkeypatch.setattr("align.registry.locks.PATIENCE_SECONDS", 1)
    monkeypatch.setattr("align.registry.artifacts.CLOCK_TICK_SECONDS", 0)


def refusal(work: Callable[[], object]) -> AlignError | None:
    """The error with which work was refused, in words and with what to do; any other error passes."""
    try:
        work()
    except AlignError as error:
        return error if error.hint else pytest.fail(f"no hint: {error}")
    return None


def assert_nothing_half(home: Path) -> Registry:
    """The registry opens and lists; what it offers is whole, and no run that has ended is shown as running."""
    registry = Registry.open(home)
    assert all(run.status != "running" for run in registry.all_runs())
    for record in (*registry.all_checkpoints(), *registry.all_data()):
        registry.check_unchanged(record)
    assert all(registry.verify(record.id) == [] for record in registry.all_checkpoints())
    return registry


def assert_healed(registry: Registry, operation: Operation) -> None:
    """The same operation succeeds now, and a sweep leaves nothing that no row knows of."""
    operation.work(registry)
    assert operation.holds(registry)
    registry.gc()
    assert operation.holds(registry)
    for place, records in (("checkpoints", registry.all_checkpoints()), ("data", registry.all_data())):
        # a folder that somebody may still be filling is swept only when it is old
        found = {path.name for path in (registry.home / place).iterdir() if not path.name.startswith(NEW)}
        assert found == {record.id[:16] for record in records}
    finished = [run.work for run in registry.all_runs() if run.status == "finished"]
    assert {path.name for work in finished for path in work.iterdir()} <= {"lock", "log.txt"}
    assert registry.gc(dry_run=True) == []


@pytest.mark.parametrize(
    ("operation", "fault"),
    [
        pytest.param(name, fault, marks=[] if (name, fault) in QUICK else pytest.mark.slow, id=f"{name}-{fault}")
        for name in OPERATIONS for fault in FAULTS
    ],
)  # fmt: skip
def test_a_call_that_fails_is_said_in_words_and_the_operation_can_be_repeated(
    operation: str, fault: str, tmp_path: Path
) -> None:
    asked, refused = OPERATIONS[operation], 0
    for countdown in range(MOST):
        home = tmp_path / str(countdown)
        registry = Registry.open(home)
        asked.before(registry)
        faults = FAULTS[fault](countdown)
        with faults.armed():
            error = refusal(lambda: asked.work(registry))  # noqa: B023 (called at once)
            refused += error is not None
        if not faults.fired:
            assert refused > countdown / 2, "most calls matter"
            return
        assert_healed(assert_nothing_half(home), asked)
    raise AssertionError("never came to an end")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in OPERATIONS])
def test_an_operation_killed_at_any_call_can_be_repeated(name: str, tmp_path: Path) -> None:
    asked = OPERATIONS[name]
    for countdown in range(MOST):
        home = tmp_path / str(countdown)
        asked.before(Registry.open(home))
        if not killed(home, asked.work, countdown):
            return
        assert_healed(assert_nothing_half(home), asked)
    raise AssertionError("never came to an end")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_registry_that_could_not_be_made_is_made_the_next_time(fault: str, tmp_path: Path) -> None:
    for countdown in range(MOST):
        home = tmp_path / str(countdown)
        faults = FAULTS[fault](countdown)
        with faults.armed():
            refusal(lambda: Registry.open(home))  # noqa: B023 (called at once)
        if not faults.fired:
            return
        add_checkpoint(Registry.open(home))
    raise AssertionError("never came to an end")
