"""Folders come under their final name whole, and a change behind the registry's back is seen."""

from __future__ import annotations

import errno
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from align.errors import AlignError, StageFailed
from align.registry import CheckpointRecord, Registry
from align.registry.artifacts import folder_size, seal, write_synced
from align.registry.hashing import Manifest, folder_manifest
from tests.registry_fill import add_checkpoint, add_data, begin, finish


@pytest.fixture
def registry() -> Registry:
    return Registry.open()


@pytest.fixture
def record(registry: Registry) -> CheckpointRecord:
    return add_checkpoint(registry)


def rewrite(path: Path, content: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(content)


def flip_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    rewrite(path, bytes(content))


def delete(path: Path) -> None:
    path.unlink()


def swap(path: Path) -> None:
    other = path.parent / "nested" / "config.json"
    mine, theirs = path.read_bytes(), other.read_bytes()
    rewrite(path, theirs)
    rewrite(other, mine)


def add_a_file(path: Path) -> None:
    (path.parent / "modeling.py").write_text("import os")


def replace_by_a_link(path: Path) -> None:
    copy = path.parents[2] / "copy"
    shutil.copy(path, copy)
    path.unlink()
    path.symlink_to(copy)


def test_an_untouched_checkpoint_verifies_and_is_trusted(registry: Registry, record: CheckpointRecord) -> None:
    assert registry.verify(record.name) == []
    registry.check_unchanged(record)


@pytest.mark.parametrize("damage", [flip_one_bit, delete, swap, add_a_file, replace_by_a_link])
def test_damage_is_named_by_verify_and_refused_to_consumers(
    registry: Registry, record: CheckpointRecord, damage
) -> None:
    other = add_checkpoint(registry, "harbour/other")
    damage(record.path / "model.safetensors")
    name = "modeling.py" if damage is add_a_file else "model.safetensors"
    assert any(name in problem for problem in registry.verify(record.name))
    with pytest.raises(AlignError, match=f"harbour/sft.*changed.*{name}"):
        registry.check_unchanged(record)
    assert registry.verify(other.name) == []
    registry.check_unchanged(other)


def test_an_edit_that_keeps_size_and_time_is_seen_without_reading_everything(
    registry: Registry, record: CheckpointRecord
) -> None:
    path = record.path / "model.safetensors"
    before = path.stat()
    flip_one_bit(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    with pytest.raises(AlignError, match=r"model\.safetensors has changed"):
        registry.check_unchanged(record)


def test_hashing_begins_a_clock_tick_after_the_last_change_of_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or an edit within the tick would leave the file with the time that was recorded."""
    begun = []

    def watched(folder: Path) -> Manifest:
        begun.append(time.time_ns())
        return folder_manifest(folder)

    monkeypatch.setattr("align.registry.artifacts.folder_manifest", watched)
    (tmp_path / "a").write_text("1")
    seal(tmp_path)
    assert begun[0] - (tmp_path / "a").stat().st_ctime_ns > 15e6


def test_an_edit_right_after_registration_is_seen(registry: Registry) -> None:
    for attempt in range(5):
        record = add_checkpoint(registry, content=f"weights {attempt}")
        flip_one_bit(record.path / "model.safetensors")
        with pytest.raises(AlignError):
            registry.check_unchanged(record)


def test_verify_reads_bytes_even_where_the_stamps_are_as_recorded(
    registry: Registry, record: CheckpointRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = registry.files(record).files
    flip_one_bit(record.path / "model.safetensors")
    marks = {record.path / name: (entry.size, entry.stamp) for name, entry in files.items()}
    monkeypatch.setattr("align.registry.artifacts.file_marks", marks.__getitem__)
    registry.check_unchanged(record)  # a disk that rots does not tell
    assert "model.safetensors" in registry.verify(record.name)[0]


def test_a_home_that_was_copied_elsewhere_is_still_valid(registry: Registry, tmp_path: Path) -> None:
    record = add_checkpoint(registry)
    shutil.copytree(registry.home, tmp_path / "moved")
    moved = Registry.open(tmp_path / "moved").checkpoint(record.name)
    assert moved.path.is_relative_to(tmp_path / "moved")
    Registry.open(tmp_path / "moved").check_unchanged(moved)


def test_a_data_set_that_was_edited_is_refused(registry: Registry) -> None:
    record = add_data(registry)
    registry.check_unchanged(record)
    rewrite(record.path / "train.jsonl", b'{"text": "b"}\n')
    with pytest.raises(AlignError, match=r"data set harbour/instructions .*train\.jsonl has changed"):
        registry.check_unchanged(record)


def test_registered_files_cannot_be_written_by_accident(record: CheckpointRecord) -> None:
    assert {path.stat().st_mode & 0o777 for path in record.path.rglob("*") if path.is_file()} == {0o444}


def test_links_and_empty_folders_are_not_registered(registry: Registry) -> None:
    with begin(registry) as run:
        (run.artifact / "secret").symlink_to("/etc/passwd")
        with pytest.raises(AlignError, match="secret is a link"):
            finish(run, "harbour/sft", "w")
    with pytest.raises(StageFailed, match="nothing in"), begin(registry) as run:
        run.finish_checkpoint(name="harbour/sft", kind="model", parents=[], data=[], metrics={}, versions={})
    assert registry.all_checkpoints() == []


def test_files_are_synced_before_folders_before_the_rename_before_its_parent_before_the_row(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    with begin(registry) as run:
        events = watch(monkeypatch, run.work / "artifact")
        record = finish(run, "harbour/sft", "w")
    wanted = [
        "sync artifact/model.safetensors", "sync artifact/nested/config.json", "sync artifact/nested", "sync artifact",
        "rename artifact", "sync checkpoints", "commit",
    ]  # fmt: skip
    places = [events.index(event) for event in wanted]
    assert places[:2] < places[2:4]
    assert max(places[:4]) < places[4] < places[5] < places[6]
    assert record.path.is_dir()


def test_a_small_file_is_synced_before_it_takes_its_name_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = watch(monkeypatch, tmp_path)
    write_synced(tmp_path / "mark", "text")
    aside, folder = f"{tmp_path.name}/.mark-{os.getpid()}", tmp_path.name
    assert events == [f"sync {aside}", f"replace {aside}", f"sync {folder}"]
    assert (tmp_path / "mark").read_text() == "text"


def watch(monkeypatch: pytest.MonkeyPatch, artifact: Path) -> list[str]:
    """What is synced, renamed and committed from now on, in order."""
    from sqlalchemy import Connection

    events: list[str] = []
    fsync, rename, replace, commit = os.fsync, os.rename, os.replace, Connection.commit

    def label(path: Path) -> str:
        return path.relative_to(artifact.parent).as_posix() if path.is_relative_to(artifact) else path.name

    def watched_fsync(descriptor: int) -> None:
        events.append(f"sync {label(Path(f'/proc/self/fd/{descriptor}').readlink())}")
        fsync(descriptor)

    def watched_rename(source: Path, target: Path) -> None:
        events.append(f"rename {label(source)}")
        rename(source, target)

    def watched_replace(source: Path, target: Path) -> None:
        events.append(f"replace {label(source)}")
        replace(source, target)

    def watched_commit(connection: Connection) -> None:
        events.append("commit")
        commit(connection)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", watched_rename)
    monkeypatch.setattr(os, "replace", watched_replace)
    monkeypatch.setattr(Connection, "commit", watched_commit)
    return events


def test_a_full_disk_is_said_and_nothing_is_registered(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    before = add_checkpoint(registry, "harbour/before")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with begin(registry) as run, monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StageFailed, match="No space left"):
            finish(run, "harbour/sft", "w")
    assert [record.id for record in registry.all_checkpoints()] == [before.id]
    assert registry.verify(before.name) == []
    assert registry.all_runs()[0].status == "failed"
    assert (run.artifact / "model.safetensors").exists()


def test_seal_hashes_what_was_written_last(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    first = seal(tmp_path).id
    (tmp_path / "a").chmod(0o644)
    (tmp_path / "a").write_text("2")
    assert seal(tmp_path).id != first


def test_a_folder_that_is_swept_while_it_is_measured_has_the_size_of_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"12345")
    assert folder_size(tmp_path) == 10
    scandir = os.scandir

    def scan(path: Any) -> Any:
        if Path(path) == tmp_path / "b":
            raise FileNotFoundError(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    assert folder_size(tmp_path) == 5


def test_links_are_measured_as_links_and_not_followed(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    outside.mkdir()
    folder.mkdir()
    (outside / "file").write_bytes(b"1" * 5000)
    (folder / "file").write_bytes(b"12345")
    (folder / "to-folder").symlink_to(outside)
    (folder / "to-file").symlink_to(outside / "file")
    (folder / "to-nothing").symlink_to("nowhere")
    links = sum((folder / name).lstat().st_size for name in ("to-folder", "to-file", "to-nothing"))
    assert folder_size(folder) == 5 + links
    assert folder_size(folder / "to-folder") == 0


def test_a_folder_is_measured_in_time_that_grows_with_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No name is looked for among the others."""
    compared = 0

    class Name(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return str.__eq__(self, other)

    names = [Name(number) for number in range(100)]
    monkeypatch.setattr(os, "walk", lambda folder: iter([(folder, [], names)]))
    folder_size(tmp_path)
    assert compared <= len(names)
