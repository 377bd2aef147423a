"""A run's status is true at every moment, its metrics are kept, and its end is recorded."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align.errors import AlignError, Interrupted
from align.registry import NewData, Registry, Run, recovery, registration
from tests.registry_fill import add_checkpoint, begin, fail, finish


@pytest.fixture
def registry() -> Registry:
    return Registry.open()


def status(registry: Registry) -> str:
    return registry.all_runs()[0].status


def test_a_run_is_running_then_finished(registry: Registry) -> None:
    with begin(registry) as run:
        assert status(registry) == "running"
        assert list(run.artifact.iterdir()) == []
        record = finish(run, "harbour/sft", "w")
        assert status(registry) == "finished"
    assert record.run == registry.all_runs()[0].id == run.id
    assert registry.all_runs()[0].ended is not None


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (ValueError("loss is nan"), "failed", "ValueError: loss is nan"),
        (AlignError("no such file", "look"), "failed", "no such file"),
        (Interrupted(15, "stopped by SIGTERM"), "interrupted", "stopped by SIGTERM"),
        (KeyboardInterrupt(), "interrupted", "KeyboardInterrupt: "),
    ],
)
def test_an_error_is_recorded_and_passed_on(
    registry: Registry, error: BaseException, expected: str, message: str
) -> None:
    run = begin(registry)
    run.log("step 1")
    with pytest.raises(type(error)), run:
        raise error
    record = registry.all_runs()[0]
    assert (record.status, record.message) == (expected, message)
    assert (run.work / "log.txt").read_text() == f"step 1\n{expected}: {message}\n"


def test_a_run_that_ends_without_a_result_has_failed(registry: Registry) -> None:
    with begin(registry):
        pass
    assert registry.all_runs()[0].message == "the run ended without a result"


KILLED = """
import os, signal, sys
from align.registry import Registry
from tests.registry_fill import begin
run = begin(Registry.open())
run.log_metrics(1, {"loss": 2.5})
child = os.fork() if "fork" in sys.argv else 1
if child == 0:
    signal.pause()   # a worker that outlives its parent
print(run.id, child, flush=True)
signal.pause()
"""


@pytest.mark.parametrize("how", ["alone", "fork"])
def test_a_killed_run_shows_crashed_at_once_and_can_be_resumed(registry: Registry, how: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, how], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    )
    assert process.stdout is not None
    run_id, child = process.stdout.readline().split()
    assert status(registry) == "running"
    with pytest.raises(AlignError, match="running in another process"):
        registry.resume_run(run_id)
    process.kill()
    process.wait()
    assert status(registry) == "crashed"
    assert registry.resumable("key of sft").id == run_id
    if how == "fork":
        os.kill(int(child), signal.SIGKILL)
    with registry.resume_run(run_id) as run:
        assert status(registry) == "running"
        finish(run, "harbour/sft", "w")
    assert status(registry) == "finished"
    assert registry.metrics(run_id)[0].value == 2.5


def test_only_the_last_unfinished_run_of_a_key_can_be_resumed(registry: Registry) -> None:
    assert registry.resumable("key of sft") is None
    first = fail(registry)
    assert registry.resumable("key of sft").id == first.id
    seen = []
    second = fail(registry, "sft", lambda _run: seen.append(registry.resumable("key of sft").id))
    assert seen == [first.id]
    assert registry.resumable("key of sft").id == second.id
    add_checkpoint(registry)
    assert registry.resumable("key of sft") is None
    assert registry.resumable("another key") is None


def test_a_finished_run_cannot_be_resumed(registry: Registry) -> None:
    record = add_checkpoint(registry)
    with pytest.raises(AlignError, match="is finished"):
        registry.resume_run(record.run)


def test_state_is_kept_on_failure_and_dropped_on_success(registry: Registry) -> None:
    def work(run: Run) -> None:
        (run.work / "state" / "optimizer").write_text("moments")
        (run.artifact / "half").write_text("written")

    run = fail(registry, "sft", work)
    with registry.resume_run(run.id) as again:
        assert (again.work / "state" / "optimizer").read_text() == "moments"
        assert list(again.artifact.iterdir()) == []
        again.log("done")
        finish(again, "harbour/sft", "w")
    assert sorted(path.name for path in run.work.iterdir()) == ["lock", "log.txt"]


def test_metrics_come_back_in_order_and_a_resume_leaves_none_twice(registry: Registry) -> None:
    with begin(registry) as run:
        for step in (1, 2, 3):
            run.log_metrics(step, {"loss": 4.0 / step, "gradient_norm": float(step)})
        run.truncate_metrics(2)
        assert [row.step for row in registry.metrics(run.id)] == [1, 1, 2, 2]
        run.log_metrics(3, {"loss": 1.0})
        run.log_metrics(3, {"loss": 1.5})
        run.log_metrics(4, {})
        finish(run, "harbour/sft", "w")
    rows = [(row.step, row.name, row.value) for row in registry.metrics(run.id)]
    assert rows == [
        (1, "gradient_norm", 1.0), (1, "loss", 4.0), (2, "gradient_norm", 2.0), (2, "loss", 2.0), (3, "loss", 1.5),
    ]  # fmt: skip


def test_a_metric_that_is_no_number_is_kept_as_such_and_is_null_in_json(registry: Registry) -> None:
    with begin(registry) as run:
        run.log_metrics(1, {"loss": math.nan, "scale": math.inf})
        finish(run, "harbour/sft", "w", metrics={"after.loss": {"value": math.nan, "n": 0}})
    loss, scale = registry.metrics(run.id)
    assert math.isnan(loss.value)
    assert math.isinf(scale.value)
    assert [row.as_dict()["value"] for row in (loss, scale)] == [None, None]
    assert registry.checkpoint("harbour/sft").metrics == {"after.loss": {"value": None, "n": 0}}


def test_a_run_may_end_with_data_sets(registry: Registry) -> None:
    with begin(registry, "revised") as run:
        made = []
        for name in ("sft", "preferences"):
            folder = run.artifact / name
            folder.mkdir()
            (folder / "train.jsonl").write_text(f'{{"text": "{name}"}}\n')
            made.append(NewData(f"harbour/revised.{name}", f"key of {name}", folder, {"train_rows": 1}))
        records = run.finish_data(made)
    assert [record.name for record in records] == ["harbour/revised.sft", "harbour/revised.preferences"]
    assert {record.run for record in registry.all_data()} == {run.id}
    assert status(registry) == "finished"
    assert records[0].path.joinpath("train.jsonl").read_text() == '{"text": "sft"}\n'


def test_a_run_is_found_by_the_beginning_of_its_id(registry: Registry) -> None:
    record = add_checkpoint(registry)
    assert registry.run(record.run[:6]).id == record.run
    with pytest.raises(AlignError, match="no run 'zzz'"):
        registry.run("zzz")
    with pytest.raises(AlignError, match="no run '_'"):
        registry.run("_")


def test_settings_and_inputs_come_back(registry: Registry) -> None:
    with begin(registry, inputs={"parent": "org/base"}) as run:
        finish(run, "harbour/sft", "w")
    record = registry.run(run.id)
    assert record.settings == {"epochs": 2}
    assert record.as_dict()["inputs"] == {"parent": "org/base"}
    assert "settings" not in record.summary()


def signalled_after(work: Callable[..., list[int]]) -> Callable[..., list[int]]:
    """The same work, and a signal right after its commit."""

    def done_and_stopped(*values: Any) -> list[int]:
        work(*values)
        raise Interrupted(signal.SIGTERM, "stopped by SIGTERM")

    return done_and_stopped


def test_a_signal_right_after_the_commit_leaves_a_finished_run_and_one_checkpoint(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin(registry)
    run.log("step 1")
    with monkeypatch.context() as patched:
        patched.setattr(registration, "publish_all", signalled_after(registration.publish_all))
        with pytest.raises(Interrupted), run:
            finish(run, "harbour/sft", "w")
    record = registry.run(run.id)
    assert (record.status, record.message) == ("finished", "")
    assert sorted(path.name for path in run.work.iterdir()) == ["lock", "log.txt"]
    assert (run.work / "log.txt").read_text() == "step 1\n"
    assert registry.recover() == []
    assert len(registry.all_checkpoints()) == 1


def test_a_result_is_recorded_once_though_two_saw_it_unrecorded_and_the_first_left_its_papers(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object) -> list[int]:
        raise OSError("power cut")

    with monkeypatch.context() as patched:
        patched.setattr(registration, "publish_all", lost)
        with pytest.raises(OSError, match="power cut"), begin(registry) as run:
            finish(run, "harbour/sft", "w")
    seen = registry.run(run.id)
    monkeypatch.setattr(recovery, "clear_work", lambda _work: None)
    assert registry.recover() == [run.id]
    assert (run.work / "finish.json").exists()
    assert not recovery._finish(registry._database, registry.home, seen)
    assert len(registry.all_checkpoints()) == 1
