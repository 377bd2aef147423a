"""Refusals that need more than a bad file: what a plan says of a stopped run, names among thousands, pipes and bombs."""

from __future__ import annotations

import errno
import gzip
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest
import zstandard

from align.constitution import Constitution
from align.data import packed, text_files
from align.data.sources import find_source, read_rows
from align.errors import (
    FEW_NAMED,
    AlignError,
    Interrupted,
    StageFailed,
    did_you_mean,
    of_the_file_system,
    of_the_memory,
)
from align.judge import Judge
from align.plan import plan
from align.progress import Progress
from align.recipe.file import load_recipe
from align.registry import Registry
from align.run import run_recipe
from align.small_files import MOST_BYTES, read_small
from tests.registry_fill import add_data
from tests.test_run import bench_in

GOOD = b'{"prompt": "a", "completion": "b"}\n'


# A run that was stopped --------------------------------------------------------------------------------------------------


class EndsAtOnce(Progress):
    """As a signal or a failure would when the stage begins to work."""

    def __init__(self, end: BaseException) -> None:
        self.end = end

    def bar(self, title: str, total: float) -> NoReturn:
        raise self.end


@pytest.mark.parametrize(
    ("end", "said"), [(Interrupted(15, "stopped"), "was stopped"), (StageFailed("the loss is nan"), "failed")]
)
def test_a_plan_says_what_has_changed_since_a_run_ended_too_early(
    end: BaseException, said: str, tiny_llama: Path, tmp_path: Path
) -> None:
    bench = bench_in(tmp_path, tiny_llama)
    few = ("stages.sft.log_steps=1", "stages.sft.epochs=1")

    def planned(*overrides: str) -> tuple[str, str]:
        (stage,) = plan(bench.workshop(*few, *overrides), stages=["sft"])
        return stage.action, stage.why

    assert planned() == ("run", "not made yet")
    with pytest.raises(type(end)):
        run_recipe(bench.workshop(*few), EndsAtOnce(end), stages=["sft"])
    (run,) = bench.workshop().registry.all_runs()
    assert planned() == ("resume", f"{said}; goes on from its last saved state")
    why = f"run {run.id} {said}, and since then changed: settings.warmup 0.03 -> 0.5"
    assert planned("stages.sft.warmup=0.5") == ("run", why)


# Names -----------------------------------------------------------------------------------------------------------------


def test_of_many_known_names_only_the_nearest_are_listed() -> None:
    few, many = [f"rows-{n}" for n in range(9)], [f"checkpoint-{n}" for n in range(1000)] + ["quark"]
    assert did_you_mean("zzz", few) == f"Known: {', '.join(few)}."
    said = did_you_mean("quiver", many)
    assert said.startswith("Known: quark, ")
    assert said.endswith(f" and {len(many) - FEW_NAMED} more.")
    assert said.count(",") == FEW_NAMED - 1


# Places ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("home", "said"),
    [
        ("file", r"file is a file, not a folder"),
        ("file/home", r"file/home cannot be made: Not a directory"),
        ("of-folders", r"of-folders/registry\.db is a folder, not a file"),
    ],
)
def test_a_home_that_cannot_be_one_is_refused_with_its_place(home: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "of-folders" / "registry.db").mkdir(parents=True)
    with pytest.raises(AlignError, match=said) as refusal:
        Registry.open(tmp_path / home)
    assert refusal.value.hint


def test_a_registry_of_which_only_the_empty_file_was_made_is_empty_and_can_be_filled(tmp_path: Path) -> None:
    (tmp_path / "registry.db").write_text("")
    assert Registry.open(tmp_path, create=False).all_runs() == []
    add_data(Registry.open(tmp_path))


@pytest.mark.parametrize(
    ("number", "code", "hint"),
    [
        (errno.EACCES, 2, "permissions"),
        (errno.ELOOP, 2, "link"),
        (errno.ENOSPC, 1, "space"),
        (errno.EMFILE, 1, "ulimit"),
    ],
)
def test_what_the_file_system_refuses_is_said_in_words_and_what_is_ours_is_not_hidden(
    number: int, code: int, hint: str
) -> None:
    known = of_the_file_system(OSError(number, os.strerror(number), "rows.jsonl"))
    assert known is not None
    assert (known.exit_code, hint in known.hint, "rows.jsonl" in known.message) == (code, True, True)
    assert of_the_file_system(OSError(errno.ENOENT, "No such file or directory", "rows.jsonl")) is None
    assert of_the_file_system(OSError(errno.EACCES, "Permission denied")) is None


def test_libraries_that_find_no_memory_are_said_in_words_and_other_imports_that_fail_are_not_hidden() -> None:
    mapped = ImportError("libtorch_cpu.so: failed to map segment from shared object")
    wrapped = RuntimeError("Failed to import transformers.trainer")
    wrapped.__cause__ = mapped
    for error in (mapped, wrapped, MemoryError()):
        known = of_the_memory(error)
        assert known is not None
        assert ("memory" in known.message, known.exit_code, "ulimit -v" in known.hint) == (True, 1, True)
    assert of_the_memory(ImportError("No module named 'torch'")) is None


# Files that have no end, or too much in them --------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [load_recipe, Judge.load, Constitution.load, read_small])
def test_a_pipe_is_refused_and_not_waited_for(load: Callable[[Path], object], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(AlignError, match=r"pipe\.yaml: a pipe or a device, not a file\."):
        load(tmp_path / "pipe.yaml")


def test_a_pipe_of_rows_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(AlignError, match=r"'rows\.jsonl' is a pipe or a device"):
        find_source("rows.jsonl", tmp_path)


@pytest.mark.parametrize("load", [load_recipe, Judge.load, Constitution.load])
def test_a_huge_file_is_refused_and_not_read(load: Callable[[Path], object], tmp_path: Path) -> None:
    """A terabyte, of which nothing lies on the disk."""
    with (tmp_path / "huge.yaml").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(AlignError, match=rf"huge\.yaml has more than {MOST_BYTES:,} bytes"):
        load(tmp_path / "huge.yaml")


@pytest.mark.parametrize("ending", ["jsonl.gz", "jsonl.zst", "json.gz", "json.zst", "csv.gz", "csv.zst"])
@pytest.mark.parametrize("bomb", ["many rows", "one endless line", "an array"])
def test_a_file_that_unpacks_to_far_more_than_text_does_is_refused_on_the_way(
    ending: str, bomb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "ALWAYS_READ_BYTES", 2**20)
    bytes_ = {"many rows": GOOD * 200_000, "one endless line": b"x" * 8_000_000, "an array": b"[" + b" " * 8_000_000}[
        bomb
    ]
    pack = gzip.compress if ending.endswith("gz") else zstandard.ZstdCompressor().compress
    (tmp_path / f"bomb.{ending}").write_bytes(pack(bytes_))
    assert len(bytes_) > 100 * (tmp_path / f"bomb.{ending}").stat().st_size
    with pytest.raises(
        AlignError, match=rf"bomb\.{ending}: unpacks to more than .* over 100 times its size"
    ) as refusal:
        list(read_rows(find_source(f"bomb.{ending}", tmp_path)))
    assert "name the plain file" in refusal.value.hint


def test_a_small_file_may_repeat_itself_as_much_as_it_likes(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(GOOD * 20_000))
    assert len(list(read_rows(find_source("rows.jsonl.zst", tmp_path)))) == 20_000


@pytest.mark.parametrize("ending", ["json", "json.gz"])
def test_an_array_that_memory_would_have_to_hold_has_a_limit(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = b"[" + b",".join([GOOD.strip()] * 100) + b"]"
    (tmp_path / f"rows.{ending}").write_bytes(gzip.compress(array) if ending.endswith("gz") else array)
    source = find_source(f"rows.{ending}", tmp_path)
    monkeypatch.setattr(text_files, "MAX_ARRAY_BYTES", len(array))
    assert len(list(read_rows(source))) == 100
    monkeypatch.setattr(text_files, "MAX_ARRAY_BYTES", len(array) - 1)
    with pytest.raises(AlignError, match=rf"rows\.{ending}: an array of more than"):
        list(read_rows(source))


# A report that cannot be written ------------------------------------------------------------------------------------------


def test_a_report_that_cannot_be_written_says_that_the_stages_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from align.cli.run import _write_report

    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("align.report.page.write_report", full)
    with pytest.raises(
        StageFailed, match=r"the stages are done, but the report .*page.html cannot be written: No space"
    ) as failed:
        _write_report(SimpleNamespace(registry=None, recipe=SimpleNamespace(name="x")), tmp_path / "page.html")
    assert "align report RECIPE --out FILE" in failed.value.hint
