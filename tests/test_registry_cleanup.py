"""Collection keeps everything that something kept was made from, and says why the rest goes."""

from __future__ import annotations

import os
import time

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
        "runs/beginning",
        "runs/locking",
    ):
        (registry.home / place).mkdir()
    (registry.home / "runs" / "0123456789ab" / "lock").write_text("4711\n")  # and nobody holds it
    (registry.home / "runs" / "locking" / "lock").touch()  # opened, and not yet locked
    fresh, forgotten = registry.new_folder("data"), registry.new_folder("data")
    os.utime(forgotten, (time.time() - 2 * 86400,) * 2)
    gone = registry.gc()
    assert {removal.what for removal in gone} == {"leftover"}
    assert {removal.path.name for removal in gone} == {
        "0123456789abcdef", ".removed-x-1-2", "0123456789ab", forgotten.name,
    }  # fmt: skip
    assert fresh.is_dir()
    for name in ("beginning", "locking"):
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
