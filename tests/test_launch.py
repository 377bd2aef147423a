"""Several processes: what they make is what one makes, they stop together, and a state loads on any number of them."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import align.origins
from align.cli.run import run_command
from align.errors import AlignError, Interrupted, StageFailed
from align.launch import processes
from align.launch.processes import Request, Told, run_apart
from align.origins import Workshop
from align.parallel.crew import crew
from align.plan import plan
from align.progress import Progress
from align.registry import Registry
from align.registry.records import CheckpointRecord
from align.run import run_recipe
from align.state import complete_states
from tests.crew_kit import on_two
from tests.test_run import Bench, SignalAt, bench_in

CHAIN = (
    "stages.sft.batch_size=3", "stages.sft.epochs=2", "stages.sft.batch_tokens=40", "stages.sft.log_steps=1",
    "stages.adapter.quantize=null", "stages.adapter.batch_size=5", "stages.adapter.log_steps=1",
    "stages.reward.batch_size=4", "stages.reward.log_steps=1", "stages.reward.epochs=1.9",
    "stages.aligned.batch_size=4", "stages.aligned.log_steps=1", "stages.aligned.epochs=2",
)  # fmt: skip
STAGES = ("reward", "aligned")
CLOSE = 1e-4


def run_one_of_two(
    rank: int, bench: Bench, overrides: tuple[str, ...], stages: tuple[str, ...], stop: tuple[int, int] | None = None
) -> Any:
    """What `torchrun align run` does in each process. stop: the rank that gets SIGTERM, and after which step."""
    import align.console
    import align.launch.job
    from align.launch.worker import follow, lead

    listener = SignalAt(stop[1]) if stop and stop[0] == rank else None
    align.launch.job.Progress = lambda: listener or align.progress.Progress()  # type: ignore[assignment,misc]
    align.console.ConsoleProgress = align.launch.job.Progress  # type: ignore[misc]
    member = crew()
    assert member is not None
    if not member.leads:
        return follow(member)
    return [
        (entry.planned.action, entry.checkpoint.id) for entry in lead(bench.workshop(*overrides), member, stages, ())
    ]


def curves(bench: Bench, name: str) -> dict[tuple[int, str], float]:
    registry = bench.workshop().registry
    rows = registry.metrics(registry.checkpoint(f"harbour/{name}").run)
    chance = {"train.tokens_per_second", "train.accuracy"}  # dpo begins with margins of 0, give or take a rounding
    return {(row.step, row.name): row.value for row in rows if row.name not in chance}


def weights(record: CheckpointRecord) -> torch.Tensor:
    tensors = load_file(next(record.path.glob("*.safetensors")))
    return torch.cat([tensors[name].float().flatten() for name in sorted(tensors)])


def assert_same(one: Bench, other: Bench, name: str) -> None:
    """The same curves and weights, within rounding, under the same key."""
    first, second = curves(one, name), curves(other, name)
    assert first.keys() == second.keys()
    assert {name for _, name in first} >= {"train.loss", "train.grad_norm", "eval.loss"}
    assert second == {key: pytest.approx(value, rel=CLOSE, abs=CLOSE) for key, value in first.items()}
    records = [bench.workshop().registry.checkpoint(f"harbour/{name}") for bench in (one, other)]
    assert (weights(records[0]) - weights(records[1])).abs().max() < CLOSE


@pytest.fixture(scope="module")
def alone(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The chain on one process."""
    bench = bench_in(tmp_path_factory.mktemp("alone"), tiny_llama)
    bench.run(*CHAIN, stages=STAGES)
    return bench


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_make_what_one_makes(alone: Bench, tiny_llama: Path, tmp_path: Path, strategy: str) -> None:
    bench = bench_in(tmp_path, tiny_llama)
    shared = (*CHAIN, f"launch.strategy={strategy}")
    led, followed = on_two(tmp_path / "crew", run_one_of_two, bench, shared, STAGES)
    assert [action for action, _ in led] == ["run"] * 4
    assert followed is None
    for name in ("sft", "adapter", "reward", "aligned"):
        assert_same(alone, bench, name)
    registry = bench.workshop().registry
    assert len(registry.all_checkpoints()) == 4
    runs = {run.stage: run for run in registry.all_runs()}
    assert runs["sft"].settings["launch"] == {"processes": 2, "strategy": strategy}
    theirs = {run.stage: run for run in alone.workshop().registry.all_runs()}
    assert runs["sft"].key == theirs["sft"].key
    assert [stage.action for stage in plan(bench.workshop(*CHAIN), STAGES)] == ["reuse"] * 4


@pytest.mark.parametrize(("strategy", "rank"), [("ddp", 1), ("fsdp", 0)])
def test_a_signal_to_one_stops_both_and_one_process_goes_on(
    alone: Bench, tiny_llama: Path, tmp_path: Path, strategy: str, rank: int
) -> None:
    bench = bench_in(tmp_path, tiny_llama)
    shared = (*CHAIN, f"launch.strategy={strategy}")
    ended = on_two(tmp_path / "crew", run_one_of_two, bench, shared, ("sft",), (rank, 3))
    assert [(end.kind, end.exit_code) for end in ended] == [("Interrupted", 143)] * 2
    (run,) = bench.workshop().registry.all_runs()
    assert run.status == "interrupted"
    (state,) = complete_states(run.work / "state")
    assert state.name == "checkpoint-3"
    assert bench.run(*CHAIN, stages=["sft"])["sft"][0] == "resume"
    assert_same(alone, bench, "sft")


def test_a_state_of_one_process_loads_on_two(alone: Bench, tiny_llama: Path, tmp_path: Path) -> None:
    from align.stopping import signals_handled

    bench = bench_in(tmp_path, tiny_llama)
    with signals_handled(), pytest.raises(Interrupted):
        bench.run(*CHAIN, stages=["sft"], progress=SignalAt(3))
    led, _ = on_two(tmp_path / "crew", run_one_of_two, bench, (*CHAIN, "launch.strategy=fsdp"), ("sft",))
    assert [action for action, _ in led] == ["resume"]
    assert_same(alone, bench, "sft")


def test_a_loss_that_is_not_finite_stops_both(tiny_llama: Path, tmp_path: Path) -> None:
    bench = bench_in(tmp_path, tiny_llama)
    broken = (*CHAIN, "stages.sft.learning_rate=1.0e+30", "stages.sft.warmup=0.0")
    ended = on_two(tmp_path / "crew", run_one_of_two, bench, broken, ("sft",))
    assert [end.kind for end in ended] == ["StageFailed", "StageFailed"]
    assert "at step 2, on training rows" in ended[0].message == ended[1].message


# The launcher ---------------------------------------------------------------------------------------------------------


def test_a_bad_recipe_is_refused_before_anything_is_launched(
    tiny_llama: Path, tmp_path: Path, align_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = bench_in(tmp_path, tiny_llama)
    monkeypatch.setattr("align.launch.processes.run_apart", lambda *_: pytest.fail("processes were started"))
    for overrides, message in (
        (["stages.sft.max_length=100000"], "max_length is 100000"),
        (["launch.strategy=fsdp"], "stage 'adapter': quantize: nf4 cannot be shared out"),
        (["launch.strategy=dpp"], "launch.strategy"),
    ):
        arguments = [str(bench.recipe), "--processes", "2", *(part for text in overrides for part in ("--set", text))]
        error = CliRunner().invoke(run_command, arguments).exception
        assert isinstance(error, AlignError)
        assert error.exit_code == 2
        assert message in error.message
        assert not align_home.exists()


def test_the_data_is_prepared_once_before_the_processes_start(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, prepared = bench_in(tmp_path, tiny_llama), []
    prepare = align.origins.prepare
    monkeypatch.setattr("align.origins.prepare", lambda name, *a, **k: prepared.append(name) or prepare(name, *a, **k))

    def as_the_first_process(request: Request, processes: int) -> Any:
        assert (prepared, processes) == (["talk"], 2)
        workshop = Workshop(request.written, request.folder, Registry.open(request.home))
        assert workshop.registry.data("harbour/talk").key == workshop.data_key("talk")
        return run_recipe(workshop, Progress(), request.stages, request.force)

    monkeypatch.setattr("align.launch.processes.run_apart", as_the_first_process)
    options = ["--processes", "2", "--stage", "sft", "--json", "--set", "stages.sft.max_steps=1"]
    result = CliRunner().invoke(run_command, [str(bench.recipe), *options])
    assert result.exception is None, result.exception
    assert [entry["action"] for entry in json.loads(result.stdout)] == ["run"]
    assert prepared == ["talk"]


def test_more_processes_than_gpus_are_refused_without_a_trace(
    tiny_llama: Path, tmp_path: Path, align_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = bench_in(tmp_path, tiny_llama)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("align.launch.processes.run_apart", lambda *_: pytest.fail("processes were started"))
    error = CliRunner().invoke(run_command, [str(bench.recipe), "--processes", "2", "--stage", "sft"]).exception
    assert isinstance(error, AlignError)
    assert "2 processes asked for, and there are 1 GPUs" in error.message
    assert not align_home.exists()


def test_nothing_is_launched_where_nothing_trains(alone: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.launch.processes.run_apart", lambda *_: pytest.fail("processes were started"))
    monkeypatch.setenv("ALIGN_HOME", str(alone.folder / "home"))
    sets = [part for text in CHAIN for part in ("--set", text)]
    arguments = [str(alone.recipe), "--processes", "2", "--stage", "reward", "--json", *sets]
    result = CliRunner().invoke(run_command, arguments)
    assert result.exception is None, result.exception
    assert {entry["action"] for entry in json.loads(result.stdout)} == {"reuse"}


def test_the_error_is_that_of_the_process_that_failed_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process is a stand-in that only leaves what the real ones leave."""
    lost = Told(message="another process of this run is gone", exit_code=1, lost=True)
    short = Told(message="out of memory", hint="Lower batch_tokens.", exit_code=1)
    stand_in = (
        "import os, pathlib, shutil, sys; rank = os.environ['RANK']; folder = pathlib.Path(sys.argv[1]);"
        "told = folder / f'prepared-{rank}'; print('what it said last');"
        "told.exists() and shutil.copy(told, folder / f'told-{rank}'); sys.exit(0 if told.exists() else 3)"
    )
    request = Request(None, tmp_path, tmp_path, (), ())  # type: ignore[arg-type]

    def ended_with(*outcomes: Told | None) -> Any:
        start = processes._start

        def prepared(folder: Path, rank: int, count: int, pipe: int) -> Any:
            import pickle

            if (told := outcomes[rank]) is not None:
                (folder / f"prepared-{rank}").write_bytes(pickle.dumps(told))
            return start(folder, rank, count, pipe)

        monkeypatch.setattr(processes, "_start", prepared)
        try:
            return run_apart(request, len(outcomes))
        finally:
            monkeypatch.setattr(processes, "_start", start)

    real = subprocess.Popen
    replaced = lambda command, **named: real([sys.executable, "-c", stand_in, command[-1]], **named)  # noqa: E731
    monkeypatch.setattr("align.launch.processes.subprocess.Popen", replaced)
    assert ended_with(Told(done=["made"]), Told()) == ["made"]
    with pytest.raises(AlignError, match="out of memory"):
        ended_with(lost, short)
    with pytest.raises(StageFailed, match="process 1 of 2 ended with exit code 3") as failure:
        ended_with(lost, None)
    assert "what it said last" in failure.value.hint
    stopped = Told(message="stopped by SIGINT", exit_code=130)
    with pytest.raises(Interrupted) as interrupted:
        ended_with(stopped, stopped)
    assert interrupted.value.exit_code == 130


def test_a_process_that_is_gone_is_said_in_words(tiny_llama: Path, tmp_path: Path) -> None:
    bench = bench_in(tmp_path, tiny_llama)
    led, followed = on_two(tmp_path / "crew", die_in_step_two, bench)
    assert led.kind == "CrewLost"
    assert followed is None
    (run,) = bench.workshop().registry.all_runs()
    assert (run.status, run.message[:37]) == ("failed", "another process of this run is gone (")


def die_in_step_two(rank: int, bench: Bench) -> Any:
    if rank == 1:
        import align.trainer

        step = align.trainer._StepTrainer.training_step

        def dying(trainer: Any, *arguments: Any) -> Any:
            if trainer.state.global_step == 1:
                os._exit(9)
            return step(trainer, *arguments)

        align.trainer._StepTrainer.training_step = dying  # type: ignore[method-assign]
    return run_one_of_two(rank, bench, CHAIN, ("sft",))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_command_ends_it_with_the_state_saved(
    tiny_llama: Path, tmp_path: Path, align_home: Path, number: signal.Signals
) -> None:
    bench = bench_in(tmp_path, tiny_llama)
    options = [
        "--stage",
        "sft",
        "--processes",
        "2",
        "--set",
        "stages.sft.epochs=3000",
        "--set",
        "stages.sft.log_steps=1",
    ]
    code = "from align.cli.main import main; main()"
    command = subprocess.Popen([sys.executable, "-c", code, "run", str(bench.recipe), *options], stderr=subprocess.PIPE)
    until = time.monotonic() + 240
    while steps_in(align_home) < 3 and command.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    command.send_signal(number)
    said = command.communicate(timeout=120)[1].decode()
    assert command.returncode == 128 + number, said
    assert f"stopped by {number.name}" in said
    assert "its state is saved" in said
    assert "Traceback" not in said
    assert list(align_home.glob("runs/*/state/checkpoint-*/complete.json"))


def steps_in(home: Path) -> int:
    try:
        with sqlite3.connect(f"file:{home}/registry.db?mode=ro", uri=True) as connection:
            return int(connection.execute("SELECT coalesce(max(step), 0) FROM metrics").fetchone()[0])
    except sqlite3.OperationalError:
        return 0
