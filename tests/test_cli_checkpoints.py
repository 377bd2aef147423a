"""`align checkpoints`: one JSON document or a readable table, and errors with the right exit code."""

from __future__ import annotations

import json
import re
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from align.cli.checkpoints import checkpoints_group
from align.cli.listing import size
from align.errors import AlignError
from align.registry import CheckpointRecord, DataUse, Registry
from tests.registry_fill import add_checkpoint, add_data, begin, finish


def call(*arguments: str) -> Result:
    return CliRunner().invoke(checkpoints_group, arguments, env={"COLUMNS": "80"})


def shown(*arguments: str) -> str:
    result = call(*arguments)
    assert result.exception is None, result.exception
    return result.stdout


def document(*arguments: str) -> Any:
    return json.loads(shown(*arguments, "--json"))


def error(*arguments: str) -> AlignError:
    result = call(*arguments)
    assert isinstance(result.exception, AlignError), result.output
    return result.exception


@pytest.fixture
def registry() -> Registry:
    return Registry.open()


@pytest.fixture
def chain(registry: Registry) -> tuple[CheckpointRecord, CheckpointRecord]:
    data = add_data(registry, text="{}\n" * 1200)
    metrics = {
        "before.loss": {"value": 3.2, "low": 3.1, "high": 3.4, "n": 9}, "after.loss": {"value": 1.23456, "low": 1.1, "high": 1.3},
        "after.accuracy": 0.875, "kept": {"rows": 3},
    }  # fmt: skip
    with begin(registry, inputs={"parent": "org/base", "parent_id": "ab" * 32}) as run:
        sft = finish(run, "harbour/sft", "s", ["ab" * 32], [DataUse("instructions", data.id, 1200)], metrics=metrics)
    return sft, add_checkpoint(registry, "harbour/dpo", parents=[sft.id])


@pytest.mark.usefixtures("chain")
def test_a_listing_fits_80_columns_and_loses_no_text(registry: Registry) -> None:
    add_checkpoint(
        registry, "a-recipe-with-a-long-name-indeed/and-a-stage-with-a-long-name-too-yes", kind="adapter-reward"
    )
    registry.tag("harbour/sft", "released")
    text = shown("list")
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"harbour/sft +\w+ +model .*released", text)
    letters = re.sub(r"\s", "", text)
    assert "adapter-reward" in letters
    assert text.splitlines()[0].split() == ["name", "id", "kind", "made", "size", "tags"]


def test_json_is_one_document_with_every_record(chain: tuple[CheckpointRecord, CheckpointRecord]) -> None:
    sft, dpo = chain
    assert [record["id"] for record in document("list")] == [dpo.id, sft.id]
    assert [record["id"] for record in document("list", "--limit", "1")] == [dpo.id]
    shown = document("show", "harbour/sft")
    assert shown["children"] == [dpo.id]
    assert {file["path"] for file in shown["files"]} == {"model.safetensors", "nested/config.json"}
    assert shown["data"][0]["rows"] == 1200
    assert shown["metrics"]["after.loss"]["value"] == 1.23456


def test_an_empty_registry_says_so_and_is_an_empty_list(align_home) -> None:
    assert "No checkpoints" in shown("list")
    assert document("list") == []
    assert not align_home.exists()


def test_only_the_newest_are_listed_and_the_rest_is_mentioned(registry: Registry) -> None:
    for number in range(32):
        add_checkpoint(registry, f"harbour/s{number}", "same")
    text = shown("list")
    assert "harbour/s31 " in text
    assert "harbour/s1 " not in text
    assert "--limit N shows more" in text
    assert len(document("list")) == 32
    assert "harbour/s1 " in shown("list", "--limit", "99")


def test_show_has_the_numbers_before_and_after(chain: tuple[CheckpointRecord, CheckpointRecord]) -> None:
    text = shown("show", "harbour/sft")
    assert re.search(r"loss +3\.2 \[3\.1, 3\.4\] +1\.235 \[1\.1, 1\.3\]", text)
    assert re.search(r"accuracy +- +0\.875", text)
    assert "instructions" in text
    assert f"harbour/dpo@{chain[1].id[:8]}" in text
    assert f"harbour/sft@{chain[0].id[:8]}" in shown("show", "harbour/dpo")


def test_lineage_is_drawn_as_a_tree(chain: tuple[CheckpointRecord, CheckpointRecord]) -> None:
    sft, dpo = chain
    first, second, third, fourth = shown("lineage", "harbour/dpo").splitlines()
    assert first.startswith(f"harbour/dpo  {dpo.id[:8]}")
    assert second.startswith(f"└── from harbour/sft  {sft.id[:8]}  model by sft")
    assert third.startswith("    ├── from org/base  abababab  not made here")
    assert fourth.startswith("    └── data harbour/instructions")
    assert "1,200 rows" in fourth
    assert "made from it: harbour/dpo@" in shown("lineage", "harbour/sft")
    assert document("lineage", "harbour/dpo")["checkpoint"] == dpo.id


def test_what_two_branches_share_is_drawn_once(registry: Registry) -> None:
    base = add_checkpoint(registry, "r/base", parents=["outside"])
    left = add_checkpoint(registry, "r/left", parents=[base.id])
    add_checkpoint(registry, "r/top", parents=[base.id, left.id])
    assert shown("lineage", "r/top").count("outside") == 1
    assert "(above)" in shown("lineage", "r/top")


@pytest.mark.usefixtures("chain")
def test_verify_says_intact_or_names_the_file_and_ends_with_3(registry: Registry) -> None:
    assert shown("verify", "harbour/sft").endswith("intact, 3 B\n")
    assert [entry["problems"] for entry in document("verify")] == [[], []]
    path = registry.checkpoint("harbour/sft").path / "model.safetensors"
    path.chmod(0o644)
    path.write_text("S")
    failed = call("verify")
    assert failed.exception.exit_code == 3
    assert "model.safetensors has changed" in failed.stdout
    assert "harbour/dpo" in failed.stdout
    machine = call("verify", "harbour/sft", "--json")
    assert machine.exception.exit_code == 3
    assert "model.safetensors" in json.loads(machine.stdout)[0]["problems"][0]
    assert "intact" in shown("verify", "harbour/dpo")


@pytest.mark.parametrize("command", ["show", "lineage", "verify", "remove"])
def test_a_misspelt_name_ends_with_2_and_the_nearest_one(registry: Registry, command: str) -> None:
    add_checkpoint(registry)
    problem = error(command, "harbour/sfd")
    assert problem.exit_code == 2
    assert problem.hint == "Did you mean 'harbour/sft'?"


def test_tags_are_set_moved_and_removed(registry: Registry) -> None:
    add_checkpoint(registry)
    assert shown("tag", "harbour/sft", "best").startswith("best is harbour/sft@")
    assert document("show", "best")["tags"] == ["best"]
    assert error("remove", "best").message == "harbour/sft is tagged best"
    assert shown("untag", "best") == "removed the tag best\n"
    assert error("untag", "best").exit_code == 2
    assert error("tag", "harbour/sft", "../x").exit_code == 2


def test_remove_refuses_a_parent_and_removes_a_leaf(registry: Registry, chain) -> None:
    sft, dpo = chain
    assert f"is the parent of harbour/dpo@{dpo.id[:8]}" in error("remove", "harbour/sft").message
    assert shown("remove", "harbour/dpo") == f"removed harbour/dpo@{dpo.id[:8]}\n"
    shown("remove", sft.id)
    assert registry.all_checkpoints() == []


def test_gc_says_what_would_go_and_why_before_anything_goes(registry: Registry) -> None:
    old = add_checkpoint(registry, content="old")
    add_checkpoint(registry, content="new")
    text = shown("gc", "--dry-run")
    assert "superseded" in text
    assert "1 would go" in text
    assert max(map(len, text.splitlines())) <= 80
    assert document("gc", "--dry-run")[0]["id"] == old.id
    assert "1 removed" in shown("gc")
    assert shown("gc") == "0 removed, 0 B\n"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (4_000_017, "4.0 MB"), (16_060_522_496, "16.1 GB"), (3 * 10**15, "3000 TB")]
)  # fmt: skip
def test_sizes_are_short(count: int, text: str) -> None:
    assert size(count) == text


def test_every_command_has_help() -> None:
    for name, command in checkpoints_group.commands.items():
        assert command.help, name
        assert all(option.help for option in command.params if isinstance(option, click.Option)), name
