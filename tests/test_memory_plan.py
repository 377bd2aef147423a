"""The memory that a plan predicts: held against a real run, and against the memory that there is before anything loads."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from align import costs
from align.costs import Estimate
from align.errors import AlignError
from align.estimate import place
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
    from align.cli.commands import cli

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
    assert "100.0 MiB are available" in refused.message
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


def test_registered_rows_that_were_changed_are_refused_with_a_reason(recipe: Path) -> None:
    changed = workshop(recipe)
    changed.registry.make()
    file = changed.data("chats")[0].path / "train.jsonl"
    file.chmod(0o644)
    file.write_text(file.read_text()[:-20])
    with pytest.raises(AlignError, match="changed behind the registry's back"):
        costs.estimate(workshop(recipe), "sft")


def test_rows_are_looked_at_once_for_all_predictions_and_anew_when_they_are_registered(
    recipe: Path, room, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    real = costs.rows_like
    monkeypatch.setattr(costs, "rows_like", lambda *given, **more: looks.append(1) or real(*given, **more))
    room(100 * MIB)
    asking = workshop(recipe)
    assert fitting_batch_tokens(asking, "sft") is None
    costs.estimate(asking, "sft")
    assert len(looks) == 1
    asking.registry.make()
    asking.data("chats")
    costs.estimate(asking, "sft")
    costs.estimate(asking, "sft")
    assert len(looks) == 2


def test_the_lines_of_a_file_are_counted_piece_by_piece(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, though no more than a piece is read at once."""
    monkeypatch.setattr(costs, "SAMPLE_ROWS", 8)
    whole = workshop(recipe)
    expected = costs._first_of(whole, "chats")
    monkeypatch.setattr(costs, "PIECE_BYTES", 7)
    monkeypatch.delattr(Path, "read_bytes")
    found = costs._first_of(whole, "chats")
    assert found is not None
    assert (found.count + found.held_out, len(found.rows), found) == (60, 8, expected)


def test_a_packed_file_has_at_least_the_rows_that_were_read(recipe: Path) -> None:
    folder = recipe.parent
    with gzip.open(folder / "chats.jsonl.gz", "wb") as packed:
        packed.write((folder / "chats.jsonl").read_bytes())
    sample = costs._first_of(workshop(recipe, "data.chats=chats.jsonl.gz"), "chats")
    assert sample is not None
    assert sample.count + sample.held_out == 60


def test_processes_share_the_memory_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are on it: of a run over two machines, half."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    alone, four, apart = this_place(), this_place(4, "ddp"), this_place(4, "ddp", 2)
    assert alone.memory_bytes is not None
    assert four.memory_bytes == alone.memory_bytes // 4
    assert (apart.memory_bytes, apart.processes) == (alone.memory_bytes // 2, 4)


def test_what_started_the_processes_says_how_many_are_here(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from align.parallel import crew

    seen: list[tuple] = []
    monkeypatch.setattr(crew, "_crew", None)
    monkeypatch.setattr(costs, "this_place", lambda *given: seen.append(given) or Place(False, True, None))
    places = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "CUDA_VISIBLE_DEVICES": ""}
    for name, value in places.items():
        monkeypatch.setenv(name, value)
    costs.estimate(workshop(recipe), "sft")
    assert seen == [(8, "ddp", 4)]


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, (True, 10)), ("1", (True, 30)), ("2,1", (True, 20)), ("GPU-8f2", (True, None)), ("7", (False, None)),
     ("", (False, None)), ("-1", (False, None))],
)  # fmt: skip
def test_only_gpus_that_torch_will_see_count(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: tuple[bool, int | None]
) -> None:
    """A number is one of the driver's list; a name may be that of a part of a GPU, whose memory is not known."""
    monkeypatch.setattr(place, "_built_for", lambda: "cuda")
    monkeypatch.setattr(place, "gpu_memory", lambda: (10, 30, 20))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = this_place()
    assert (found.gpu, found.memory_bytes if found.gpu else None) == expected


def test_a_gpu_whose_driver_cannot_be_asked_is_one_of_unknown_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(place, "gpu_memory", lambda: ())
    monkeypatch.setattr(place, "DRIVERS", {"cuda": tmp_path / "nvidiactl", "hip": tmp_path / "kfd"})
    (tmp_path / "kfd").touch()
    for built, there in (("hip", True), ("cuda", False), (None, False)):
        monkeypatch.setattr(place, "_built_for", lambda built=built: built)
        found = this_place()
        assert found.gpu == there
        assert (found.memory_bytes is None) == there


@pytest.mark.parametrize(
    ("said", "expected"),
    [("cuda: Optional[str] = None\nhip: Optional[str] = None\n", None), ("cuda: Optional[str] = '13.0'\nhip = None\n", "cuda"),
     ("cuda = None\nhip: Optional[str] = '7.1.2'\n", "hip"), ("cuda = '12.8'\n", "cuda")],
)  # fmt: skip
def test_what_torch_was_built_for_is_read_off_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, expected: str | None
) -> None:
    """A version without "+cpu" may be one for processors alone."""
    (tmp_path / "version.py").write_text(f"__version__ = '2.13.0'\n{said}")
    monkeypatch.setattr(place, "find_spec", lambda _: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    assert place._built_for() == expected


def test_the_torch_that_is_installed_is_known_for_what_it_is() -> None:
    import torch

    assert place._built_for() == ("cuda" if torch.version.cuda else "hip" if torch.version.hip else None)


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
    room(100 * MIB)  # what is there costs nothing, so nobody is warned
    again = align("plan", str(recipe), "--set", "stages.sft.fit=auto")
    assert ("reuse" in again.stdout, again.stderr) == (True, "")


def test_a_check_finds_what_a_run_with_several_processes_would_refuse(recipe: Path) -> None:
    found = align("check", str(recipe), "--set", "stages.sft.fit=auto", "--set", "launch.processes=2")
    assert isinstance(found.exception, AlignError)
    assert "fit: auto is for one process" in found.exception.message
    assert align("check", str(recipe), "--set", "stages.sft.fit=auto").exit_code == 0
