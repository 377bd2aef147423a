"""Collection keeps everything that something kept was made from, and says why the rest goes."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from align.registry import DataUse, NewData, Registry, Run
from tests.registry_fill import add_checkpoint, add_data, begin, fail, finish


@pytest.fixture
def registry() -> Registry:
    return Registry.open()


def names(registry: Registry) -> set[str]:
    return {record.id for record in registry.all_checkpoints()}


def test_nothing_goes_from_a_registry_of_newest_checkpoints(registry: Registry) -> None:
    sft = add_checkpoint(registry)
    add_checkpoint(registry, "harbour/dpo", parents=[sft.id])
    assert registry.gc() == []


def test_a_superseded_checkpoint_goes_and_dry_run_only_says_so(registry: Registry) -> None:
    old, new = add_checkpoint(registry, content="old"), add_checkpoint(registry, content="new")
    told = registry.gc(dry_run=True)
    assert [(removal.what, removal.id, removal.size) for removal in told] == [("checkpoint", old.id, old.size)]
    assert "superseded" in told[0].why
    assert old.path.is_dir()
    assert [removal.as_dict() for removal in registry.gc()] == [removal.as_dict() for removal in told]
    assert not old.path.exists()
    assert names(registry) == {new.id}
    assert registry.gc() == []


def test_ancestors_of_what_is_kept_are_kept(registry: Registry) -> None:
    data = add_data(registry)
    base = add_checkpoint(registry, content="base", data=[DataUse("instructions", data.id, 1)])
    middle = add_checkpoint(registry, "harbour/adapter", content="middle", parents=[base.id])
    add_data(registry, text="newer\n")
    add_checkpoint(registry, content="newer")
    add_checkpoint(registry, "harbour/adapter", content="newer adapter")
    leaf = add_checkpoint(registry, "harbour/dpo", parents=[middle.id])
    assert registry.gc(dry_run=True) == []
    registry.tag("harbour/dpo", "released")
    newest = add_checkpoint(registry, "harbour/dpo", content="again")
    assert registry.gc(dry_run=True) == []
    registry.untag("released")
    gone = registry.gc()
    assert {removal.id for removal in gone} == {leaf.id, middle.id, base.id, data.id}
    assert newest.id in names(registry)
    assert all(registry.verify(record.id) == [] for record in registry.all_checkpoints())


def test_inputs_of_unfinished_runs_are_kept(registry: Registry) -> None:
    old = add_checkpoint(registry, content="old")
    add_checkpoint(registry, content="new")
    seen = []
    fail(registry, "dpo", lambda _run: seen.append(registry.gc(dry_run=True)), inputs={"parent_id": old.id})
    assert seen == [[]]
    assert registry.gc(dry_run=True) == []
    with begin(registry, "dpo", inputs={"parent": "elsewhere"}) as run:
        finish(run, "harbour/dpo", "d")
    assert old.id in {removal.id for removal in registry.gc()}


def test_state_of_a_run_that_was_overtaken_goes_and_of_one_that_can_go_on_stays(registry: Registry) -> None:
    def work(run: Run) -> None:
        (run.work / "state" / "optimizer").write_text("moments")
        run.log("what happened")

    run = fail(registry, "sft", work)
    assert registry.gc() == []
    add_checkpoint(registry)
    (removal,) = registry.gc()
    assert (removal.what, removal.id, removal.size) == ("state", run.id, 7)
    assert not (run.work / "state").exists()
    assert (run.work / "log.txt").read_text().startswith("what happened")


def test_folders_without_a_row_go_but_not_while_they_are_being_filled(registry: Registry) -> None:
    for place in (
        "checkpoints/0123456789abcdef",
        "data/.removed-x-1-2",
        "runs/0123456789ab",
        "runs/bebebebebebe",
        "runs/1010101010cc",
    ):
        (registry.home / place).mkdir()
    (registry.home / "runs" / "0123456789ab" / "lock").write_text("4711\n")  # and nobody holds it
    (registry.home / "runs" / "1010101010cc" / "lock").touch()  # opened, and not yet locked
    fresh, forgotten = registry.new_folder("data"), registry.new_folder("data")
    os.utime(forgotten, (time.time() - 2 * 86400,) * 2)
    gone = registry.gc()
    assert {removal.what for removal in gone} == {"leftover"}
    assert {removal.path.name for removal in gone} == {
        "0123456789abcdef", ".removed-x-1-2", "0123456789ab", forgotten.name,
    }  # fmt: skip
    assert fresh.is_dir()
    for name in ("bebebebebebe", "1010101010cc"):
        assert (registry.home / "runs" / name).is_dir(), "it is about to take its lock"


def test_a_checkpoint_that_shares_its_content_with_a_kept_one_stays(registry: Registry) -> None:
    add_checkpoint(registry, "harbour/sft", "same")
    add_checkpoint(registry, "harbour/again", "same")
    add_checkpoint(registry, "harbour/sft", "newer")
    assert registry.gc() == []
    assert registry.verify("harbour/again") == []


def test_data_made_by_a_run_keeps_what_that_run_started_from(registry: Registry) -> None:
    source = add_checkpoint(registry, content="source")
    with begin(registry, "revised", inputs={"parent_id": source.id}) as run:
        (run.artifact / "sft").mkdir()
        (run.artifact / "sft" / "train.jsonl").write_text("{}\n")
        (made,) = run.finish_data([NewData("harbour/revised.sft", "key", run.artifact / "sft", {})])
    add_checkpoint(registry, content="newer")
    assert registry.gc(dry_run=True) == []
    assert made.id == registry.data("harbour/revised.sft").id


def test_what_can_be_made_again_goes_when_it_was_not_used_for_a_month(registry: Registry) -> None:
    tokens, logps = registry.home / "cache/tokens/aa", registry.home / "cache/reference/bb.safetensors"
    for folder in (tokens, tokens.with_name("cc"), logps.parent):
        folder.mkdir(parents=True)
    (tokens / "ids").write_bytes(b"12345")
    logps.write_bytes(b"123")
    for path in (tokens, logps):
        os.utime(path, (time.time() - 31 * 86400,) * 2)
    gone = registry.gc()
    assert {(removal.what, removal.path, removal.size) for removal in gone} == {
        ("cache", logps, 3),
        ("cache", tokens, 5),
    }
    assert not tokens.exists()
    assert not logps.exists()
    assert tokens.with_name("cc").exists()
    assert registry.gc() == []


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder of somebody's own, with a file that nobody has used for long."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "precious").write_text("mine")
    os.utime(folder / "precious", (time.time() - 90 * 86400,) * 2)
    return folder


def test_what_people_put_there_is_left_and_said_and_does_not_stop_a_sweep(
    registry: Registry, outside: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = add_checkpoint(registry, content="old")
    add_checkpoint(registry, content="new")
    strays = []
    for place in ("checkpoints", "data", "runs"):
        folder = registry.home / place
        (folder / ".DS_Store").write_text("finder")
        (folder / "notes.txt").write_text("mine")
        (folder / "0123456789abcdef").write_text("a file")
        (folder / "my-model").mkdir()
        (folder / "link").symlink_to(outside)
        (folder / "to-nothing").symlink_to("nowhere")
        names = (".DS_Store", "notes.txt", "0123456789abcdef", "my-model", "link", "to-nothing")
        strays += [folder / name for name in names]
    told = registry.gc(dry_run=True)
    caplog.clear()
    assert [removal.id for removal in registry.gc()] == [removal.id for removal in told] == [old.id]
    assert all(path.is_symlink() or path.exists() for path in strays)
    assert (outside / "precious").read_text() == "mine"
    assert caplog.messages[0] == f"{strays[2]} is left as it is: align did not make it"
    assert caplog.messages[-1] == "... and 10 more"
    assert "DS_Store" not in caplog.text


def test_of_a_link_in_the_place_of_a_folder_only_the_link_goes(registry: Registry, outside: Path) -> None:
    """As where a checkpoint was moved to another disk."""
    old = add_checkpoint(registry, content="old")
    add_checkpoint(registry, content="new")
    old.path.rename(outside / "moved")
    old.path.symlink_to(outside / "moved")
    links = [old.path]
    for name in ("checkpoints/0123456789abcdef", "data/.removed-x-1-2", "runs/0123456789ab"):
        links.append(registry.home / name)
        links[-1].symlink_to(outside)
    assert {removal.path for removal in registry.gc()} == set(links)
    assert not any(path.is_symlink() for path in links)
    assert sorted(path.name for path in outside.iterdir()) == ["moved", "precious"]
    assert (outside / "moved" / "model.safetensors").read_text() == "old"


def test_links_among_caches_and_runs_are_not_followed(registry: Registry, outside: Path) -> None:
    (registry.home / "cache" / "documents").symlink_to(outside)
    (registry.home / "cache" / "tokens").mkdir()
    stale = registry.home / "cache" / "tokens" / "aa"
    stale.symlink_to(outside)
    os.utime(stale, (time.time() - 90 * 86400,) * 2, follow_symlinks=False)
    run = registry.run(add_checkpoint(registry).run)
    (outside / "state").mkdir()
    (run.work / "lock").unlink()
    run.work.rmdir()
    run.work.symlink_to(outside)
    assert [removal.path for removal in registry.gc()] == [stale]
    assert not stale.is_symlink()
    assert sorted(path.name for path in outside.iterdir()) == ["precious", "state"]


@pytest.mark.parametrize("torn", ["{", "{}", "[1]", '[{"table": "plans"}]', "\udcff", None])
def test_a_finish_json_that_cannot_be_read_is_said_and_stays_with_what_it_may_name(
    registry: Registry, torn: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    old = add_checkpoint(registry, content="old")
    add_checkpoint(registry, content="new")
    run = fail(registry, "dpo")
    result, file = registry.home / "checkpoints" / "0123456789abcdef", run.work / "finish.json"
    result.mkdir()
    (result / "model.safetensors").write_text("trained for a week")
    if torn is None:
        os.mkfifo(file)
    else:
        file.write_text(torn, encoding="utf-8", errors="surrogateescape")
    assert [removal.id for removal in registry.gc()] == [old.id]
    assert result.is_dir()
    assert file.exists()
    assert caplog.messages == [
        f"{file} cannot be read: the result that it may name is not recorded. Put it back, or remove it.",
        f"{result} is left as it is: {file}, which cannot be read, may name it",
    ]
    assert registry.run(run.id).status == "failed"
    file.unlink()
    assert [removal.path for removal in registry.gc()] == [result]


def test_a_result_into_which_a_link_was_put_before_it_got_its_row_is_not_adopted(registry: Registry) -> None:
    run = fail(registry, "dpo")
    entry = {"table": "checkpoints", "id": "0" * 64, "columns": {}, "folder": f"runs/{run.id}/artifact"}
    (run.work / "artifact" / "link").symlink_to("nowhere")
    (run.work / "finish.json").write_text(json.dumps([entry]))
    assert registry.recover() == []
    assert registry.gc() == []
