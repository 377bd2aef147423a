"""Checkpoints and data sets are found by name, tag and id, and go only when nothing needs them."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.errors import AlignError
from align.registry import DataUse, Registry
from tests.registry_fill import add_checkpoint, add_data, begin, finish


@pytest.fixture
def registry() -> Registry:
    return Registry.open()


def test_a_record_says_all_that_the_interface_promises(registry: Registry) -> None:
    data = add_data(registry)
    with begin(registry, key="k") as run:
        made = finish(
            run, "harbour/sft", "w", ["org/base"], [DataUse("instructions", data.id, 1)], template_sha256="ab" * 32,
            metrics={"after.loss": 1.5}, samples=[{"prompt": "p", "after": "a"}],
        )  # fmt: skip
    record = Registry.open().checkpoint("harbour/sft")
    assert record == made
    assert record.samples == ({"prompt": "p", "after": "a"},)
    shown = record.as_dict()
    assert shown["parents"] == ["org/base"]
    assert shown["data"] == [{"name": "instructions", "id": data.id, "rows": 1}]
    assert shown["recipe"] == {"epochs": 2}
    assert (shown["stage"], shown["kind"], shown["run"]) == ("sft", "model", run.id)
    assert Path(shown["path"]).is_dir()
    assert {"id", "name", "template_sha256", "metrics", "versions", "created"} <= shown.keys()


def test_a_name_means_the_newest_and_an_id_prefix_picks_one(registry: Registry) -> None:
    old, new = add_checkpoint(registry, content="old"), add_checkpoint(registry, content="new")
    assert registry.checkpoint("harbour/sft").id == new.id
    assert registry.checkpoint(f"harbour/sft@{old.id[:6]}").id == old.id
    assert registry.checkpoint(old.id[:8]).id == registry.checkpoint(old.id).id == old.id
    assert registry.checkpoint_by_key("key of sft").id == new.id
    assert registry.checkpoint_by_key("no key") is None
    assert [record.id for record in registry.all_checkpoints()] == [new.id, old.id]
    assert registry.knows("harbour/sft")
    assert not registry.knows("harbour/dpo")


def test_an_ambiguous_id_prefix_is_refused_with_the_candidates(registry: Registry) -> None:
    by_start: dict[str, list[str]] = {}
    for number in range(17):  # two of 17 ids begin with the same of 16 digits
        record = add_checkpoint(registry, content=str(number))
        by_start.setdefault(record.id[0], []).append(record.id)
    start, twins = next((start, ids) for start, ids in by_start.items() if len(ids) > 1)
    with pytest.raises(AlignError, match=f"'harbour/sft@{start}' is the beginning of {len(twins)} ids") as error:
        registry.checkpoint(f"harbour/sft@{start}")
    assert all(twin[:16] in error.value.message for twin in twins[:5])


def test_an_unknown_name_is_refused_with_the_nearest(registry: Registry) -> None:
    add_checkpoint(registry)
    with pytest.raises(AlignError) as error:
        registry.checkpoint("harbuor/sft")
    assert error.value.hint == "Did you mean 'harbour/sft'?"
    with pytest.raises(AlignError, match="no checkpoint 'harbour/sft@ffff'") as error:
        registry.checkpoint("harbour/sft@ffff")
    assert f"harbour/sft@{registry.checkpoint('harbour/sft').id[:8]}" in error.value.hint


@pytest.mark.parametrize(
    "name", ["../x", "a/../b", "/etc", "a//b", "-rf", ".hidden", "a b", "", "a\x1b[31m", "x" * 65, "ü"]
)
def test_names_that_could_leave_the_folder_or_fool_a_shell_are_refused(registry: Registry, name: str) -> None:
    with pytest.raises(AlignError, match="cannot be a name"):
        add_data(registry, name)
    with pytest.raises(AlignError):
        registry.checkpoint(name)
    with pytest.raises(AlignError, match="cannot be a name"), begin(registry) as run:
        finish(run, name, "w")
    assert registry.all_checkpoints() == []


def test_runs_of_equal_content_share_the_artifact_and_keep_their_own_rows(registry: Registry) -> None:
    first = add_checkpoint(registry, "harbour/sft", "same")
    second = add_checkpoint(registry, "harbour/again", "same")
    assert first.id == second.id
    assert first.path == second.path
    assert first.run != second.run
    assert len(list((registry.home / "checkpoints").iterdir())) == 1
    assert registry.checkpoint(first.id).name == "harbour/again"
    assert registry.verify("harbour/sft") == []
    registry.check_unchanged(registry.checkpoint("harbour/sft"))
    registry.remove("harbour/again")
    assert registry.verify("harbour/sft") == []
    registry.remove("harbour/sft")
    assert not first.path.exists()


def test_making_a_damaged_checkpoint_again_repairs_it(registry: Registry) -> None:
    record = add_checkpoint(registry)
    (record.path / "model.safetensors").unlink()
    add_checkpoint(registry)
    assert registry.verify(record.name) == []
    registry.check_unchanged(registry.checkpoint(record.name))


def test_a_tag_names_one_checkpoint_and_moves(registry: Registry) -> None:
    old, new = add_checkpoint(registry, content="old"), add_checkpoint(registry, content="new")
    registry.tag(f"harbour/sft@{old.id[:8]}", "best")
    assert registry.checkpoint("best").id == old.id
    assert registry.checkpoint("best").tags == ("best",)
    registry.tag("harbour/sft", "best")
    assert registry.checkpoint("best").id == new.id
    registry.untag("best")
    with pytest.raises(AlignError, match="no checkpoint 'best'"):
        registry.checkpoint("best")
    with pytest.raises(AlignError, match="no tag 'best'"):
        registry.untag("best")


@pytest.mark.parametrize("tag", ["a/b", "../x", "-x", "", "a@b", "a b"])
def test_a_tag_is_one_plain_word(registry: Registry, tag: str) -> None:
    add_checkpoint(registry)
    with pytest.raises(AlignError, match="cannot be a tag"):
        registry.tag("harbour/sft", tag)


def test_remove_refuses_what_is_needed(registry: Registry) -> None:
    parent = add_checkpoint(registry)
    child = add_checkpoint(registry, "harbour/dpo", parents=[parent.id])
    with pytest.raises(AlignError, match=f"is the parent of harbour/dpo@{child.id[:8]}"):
        registry.remove("harbour/sft")
    registry.tag("harbour/dpo", "best")
    with pytest.raises(AlignError, match="is tagged best"):
        registry.remove("harbour/dpo")
    registry.untag("best")
    registry.remove("harbour/dpo")
    with begin(registry, "next", inputs={"parent_id": parent.id}) as run:
        with pytest.raises(AlignError, match=f"input of run {run.id}"):
            registry.remove("harbour/sft")
        finish(run, "harbour/next", "n")
    assert registry.remove("harbour/sft").id == parent.id
    assert not parent.path.exists()
    with pytest.raises(AlignError, match="no checkpoint"):
        registry.checkpoint(parent.id)


def test_data_sets_are_found_by_name_key_and_id(registry: Registry) -> None:
    first, second = add_data(registry, text="a\n"), add_data(registry, text="b\nb\n")
    assert registry.data("harbour/instructions").id == second.id
    assert registry.data(first.id[:10]).id == registry.data(f"harbour/instructions@{first.id[:10]}").id == first.id
    assert registry.data_by_key("key of a\n").id == first.id
    assert registry.data_by_key("no key") is None
    assert second.as_dict()["info"] == {"train_rows": 2}
    with pytest.raises(AlignError, match="Did you mean 'harbour/instructions'"):
        registry.data("harbour/instruction")


def test_the_same_data_set_added_twice_is_one(registry: Registry) -> None:
    assert add_data(registry) == add_data(registry)
    assert len(registry.all_data()) == len(list((registry.home / "data").iterdir())) == 1
    add_data(registry, "other/instructions")
    assert len(registry.all_data()) == 2
    assert len(list((registry.home / "data").iterdir())) == 1
