"""The memory that a plan predicts: held against a real run, and against the memory that there is before anything loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from align import costs
from align.costs import Estimate
from align.errors import AlignError
from align.estimate.place import Place, gpu_memory, this_place
from align.fitting import begun_with, fitting_batch_tokens, largest_budget

MIB = 2**20


@pytest.fixture
def recipe(tiny_llama: Path, tmp_path: Path) -> Path:
    """One stage that learns from 60 chats, in micro-batches of 1,024 tokens."""
    turns = [{"role": "user", "content": "Who has the key? " * 4}, {"role": "assistant", "content": "The master. " * 6}]
    rows = [{"messages": [turns[0], {**turns[1], "content": f"{turns[1]['content']} {n}"}]} for n in range(60)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = {"kind": "sft", "data": "chats", "batch_size": 32, "batch_tokens": 1024, "max_steps": 2}
    written = {
        "name": "plan", "model": str(tiny_llama), "data": {"chats": "chats.jsonl"}, "stages": {"sft": stage},
        "evaluation": {"rows": 4, "max_new_tokens": 8},
    }  # fmt: skip
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(written))
    return file


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch):
    """Makes a machine of so many bytes."""

    def make(count: int) -> None:
        monkeypatch.setattr(costs, "this_place", lambda *_: Place(False, True, count))

    return make


def align(*arguments: str):
    from align.cli.main import cli

    return CliRunner().invoke(cli, list(arguments))


def workshop(recipe: Path, *overrides: str):
    from align.cli.run import open_workshop

    return open_workshop(recipe, overrides)


def needed(recipe: Path, *overrides: str) -> int:
    found = costs.estimate(workshop(recipe, *overrides), "sft").peak_memory_bytes
    assert found is not None
    return found


@pytest.mark.slow
def test_a_stage_takes_the_memory_that_was_predicted(recipe: Path, align_home: Path) -> None:
    """Within 15%, by the kernel's count of what the process had resident at most."""
    predicted = needed(recipe)
    program = [sys.executable, "-c", "from align.cli.main import main; main()", "run", str(recipe)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ALIGN_HOME": str(align_home)}
    quiet = subprocess.DEVNULL
    # through a small process: what a child has resident begins with what its parent had
    measure = "import os, subprocess, sys; p = subprocess.Popen(sys.argv[1:], stdout=2); print(os.wait4(p.pid, 0)[2].ru_maxrss)"
    said = subprocess.run(
        [sys.executable, "-c", measure, *program], env=environment, check=True, stdout=subprocess.PIPE, stderr=quiet
    )
    assert predicted == pytest.approx(int(said.stdout) * 1024, rel=0.15)


def test_a_stage_that_does_not_fit_is_refused_before_anything_is_loaded(recipe: Path, room, align_home: Path) -> None:
    room(100 * MIB)
    refused = align("run", str(recipe)).exception
    assert isinstance(refused, AlignError)
    assert refused.exit_code == 2
    assert "stage 'sft' is predicted to need" in refused.message
    assert "100 MiB are available" in refused.message
    assert "--force-memory" in refused.hint
    assert not (align_home / "runs").exists() or not list((align_home / "runs").iterdir())


def test_the_refusal_names_the_settings_that_are_enough(recipe: Path, room) -> None:
    full, small = needed(recipe), needed(recipe, "stages.sft.batch_tokens=128")
    room((full + small) // 2)
    hint = align("run", str(recipe)).exception.hint
    tokens = int(hint.split("batch_tokens: ")[1].split()[0])
    assert 64 <= tokens < 1024
    assert needed(recipe, f"stages.sft.batch_tokens={tokens}") <= (full + small) // 2


def test_the_user_can_run_it_all_the_same(recipe: Path, room, monkeypatch: pytest.MonkeyPatch) -> None:
    from align.cli import run

    room(100 * MIB)
    monkeypatch.setattr(run, "_done", lambda *_: [])
    monkeypatch.setattr(run, "_write_report", lambda *_: "page.html")
    result = align("run", str(recipe), "--force-memory", "--json")
    assert result.exit_code == 0, result.exception


def test_a_stage_that_may_adapt_is_let_through_where_a_smaller_budget_fits(recipe: Path, room) -> None:
    from align.fitting import check_memory
    from align.plan import plan

    full, small = needed(recipe), needed(recipe, "stages.sft.batch_tokens=128")
    adapting = workshop(recipe, "stages.sft.fit=auto")
    room((full + small) // 2)
    check_memory(adapting, plan(adapting))
    room(100 * MIB)
    with pytest.raises(AlignError):
        check_memory(adapting, plan(adapting))


def test_a_plan_warns_of_what_does_not_fit_and_ends_well(recipe: Path, room) -> None:
    room(100 * MIB)
    result = align("plan", str(recipe))
    assert result.exit_code == 0
    assert "stage 'sft' is predicted to need" in result.stderr
    (stage,) = json.loads(align("plan", str(recipe), "--json").stdout)
    assert stage["available_memory_bytes"] == 100 * MIB < stage["peak_memory_bytes"]
    assert stage["processes"] == 1


def test_the_largest_budget_that_fits_is_found_and_never_above_the_recipes(recipe: Path, room) -> None:
    room(2**40)
    assert fitting_batch_tokens(workshop(recipe), "sft") == 1024
    assert largest_budget(lambda tokens: Estimate(tokens, None, 700), 1024) == 688  # 43/64 of it
    assert largest_budget(lambda tokens: Estimate(tokens, None, 10), 1024) is None


def test_a_sample_before_the_run_predicts_what_the_registered_rows_do(recipe: Path) -> None:
    fresh = workshop(recipe)
    before = costs.estimate(fresh, "sft").peak_memory_bytes
    fresh.registry.make()
    fresh.data("chats")
    assert costs.estimate(fresh, "sft").peak_memory_bytes == pytest.approx(before, rel=0.01)


def test_processes_share_the_memory_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    alone, four = this_place(), this_place(4, "ddp")
    assert alone.memory_bytes is not None
    assert four.memory_bytes == alone.memory_bytes // 4


def test_the_memory_of_gpus_is_asked_of_their_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 81559\necho 40960\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    gpu_memory.cache_clear()
    try:
        assert gpu_memory() == (81559 * MIB, 40960 * MIB)
    finally:
        gpu_memory.cache_clear()


def test_a_stage_that_may_adapt_begins_with_the_budget_that_fits_and_says_so(recipe: Path, room) -> None:
    full, small = needed(recipe), needed(recipe, "stages.sft.batch_tokens=128")
    adapting, said = workshop(recipe, "stages.sft.fit=auto"), []
    room((full + small) // 2)
    begun = begun_with(adapting, "sft", said.append)
    assert 64 <= begun.batch_tokens < 1024
    assert begun.batch_size == 32
    assert said == [f"{begun.batch_tokens} instead of 1024 tokens at once are predicted to fit into memory (fit: auto)"]
    assert begun_with(workshop(recipe), "sft", said.append).batch_tokens == 1024  # fit: stop is not asked to
    room(2**40)
    assert begun_with(adapting, "sft", said.append).batch_tokens == 1024
    assert len(said) == 1


def test_a_run_trains_with_the_budget_that_fits(recipe: Path, room, monkeypatch: pytest.MonkeyPatch) -> None:
    from align.stages import sft

    seen: list[int] = []
    train = sft.train
    monkeypatch.setattr(sft, "train", lambda task, *rest: seen.append(task.settings.batch_tokens) or train(task, *rest))
    full, small = needed(recipe), needed(recipe, "stages.sft.batch_tokens=128")
    room((full + small) // 2)
    result = align("run", str(recipe), "--set", "stages.sft.fit=auto", "--json")
    assert result.exit_code == 0, result.exception
    assert 64 <= seen[0] < 1024
