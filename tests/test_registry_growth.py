"""A registry of many runs: a listing reads the rows that it shows, a report those of its chain, and no more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from align.cli.commands import cli
from align.cli.listing import TABLE_ROWS
from align.registry import DataUse, queries
from align.registry.database import SqliteDatabase
from align.registry.store import Registry
from tests.registry_fill import add_checkpoint, add_data, fail, finish

MANY = TABLE_ROWS + 15


@pytest.fixture
def full(align_home: Path) -> Registry:
    registry = Registry.open(align_home)
    for number in range(MANY):
        add_checkpoint(registry, f"r{number}/sft", f"weights {number}")
        add_data(registry, f"r{number}/rows", f'{{"text": "{number}"}}\n')
    return registry


@pytest.fixture
def read_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows that each query brought."""
    counts: list[int] = []
    read = SqliteDatabase.read

    def counted(self: SqliteDatabase, *asked: Any, **values: Any) -> Any:
        rows = read(self, *asked, **values)
        counts.append(len(rows))
        return rows

    monkeypatch.setattr(SqliteDatabase, "read", counted)
    return counts


@pytest.mark.usefixtures("full")
@pytest.mark.parametrize("what", ["runs", "checkpoints", "data"])
def test_a_listing_reads_what_it_shows_in_a_few_queries(read_rows: list[int], what: str) -> None:
    shown = CliRunner().invoke(cli, [what, "list"])
    assert shown.exit_code == 0
    assert f"The newest {TABLE_ROWS}" in shown.output
    assert max(read_rows) == TABLE_ROWS + 1
    assert len(read_rows) <= 8
    read_rows.clear()
    assert CliRunner().invoke(cli, [what, "list", "--limit", "2"]).exit_code == 0
    assert max(read_rows) == 2


def test_a_run_and_a_folder_are_found_without_reading_all_checkpoints(full: Registry, read_rows: list[int]) -> None:
    record = full.all_checkpoints(1)[0]
    read_rows.clear()
    assert [made.id for made in full.checkpoints_of(record.run)] == [record.id]
    full.check_folder(record.path)
    full.check_folder(Path("/"))
    assert CliRunner().invoke(cli, ["runs", "show", record.run]).exit_code == 0
    assert max(read_rows) <= 20  # the ids that an unknown one is compared with


def chain(registry: Registry) -> str:
    """A data set, two checkpoints made from it, and a run that failed; the id of the last checkpoint's run."""
    data = add_data(registry, "mine/rows")
    first = add_checkpoint(registry, "mine/sft", "first", data=[DataUse("rows", data.id, 1)])
    last = add_checkpoint(registry, "mine/dpo", "last", [first.id])
    registry.tag("mine/dpo", "best")
    return last.run


def others(registry: Registry, count: int) -> None:
    """Runs of another recipe: finished, superseded and failed ones."""
    for number in range(count):
        add_checkpoint(registry, "other/sft", f"other {number}")
        add_data(registry, "other/rows", f'{{"text": "{number}"}}\n')
        fail(registry, "other")


def test_no_command_asks_more_of_a_registry_that_holds_more_runs(
    align_home: Path, read_rows: list[int], tmp_path: Path
) -> None:
    """Queries of each command, and the rows that they bring where it shows one thing; a sweep looks at all there is."""
    registry = Registry.open(align_home)
    run = chain(registry)
    page = str(tmp_path / "page.html")
    commands = [
        ["runs", "show", run], ["checkpoints", "show", "mine/dpo"], ["checkpoints", "show", "best"],
        ["checkpoints", "lineage", "mine/dpo"], ["report", "mine", "--out", page], ["report", run, "--out", page],
        ["doctor"], ["checkpoints", "gc", "--dry-run"],
    ]  # fmt: skip
    asked: list[list[tuple[int, int]]] = []
    for more in (2, 4):
        others(registry, more)
        asked.append([])
        for command in commands:
            read_rows.clear()
            result = CliRunner().invoke(cli, command)
            assert result.exit_code == 0, result.output
            asked[-1].append((len(read_rows), 0 if "gc" in command else sum(read_rows)))
    assert asked[0] == asked[1]


def test_a_json_listing_is_what_the_records_say_page_by_page(
    align_home: Path, read_rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queries, "PAGE_ROWS", 2)
    registry = Registry.open(align_home)
    chain(registry)
    metrics = {"after.loss": {"value": 0.5, "n": 3}, "before.loss": None}
    settings = {"recipe": {"name": "größe\u202e", "rate": 1e-05, "stages": {"a'b": [1, True]}}, "seed": 1}
    with registry.begin_run(
        recipe="mine", stage="ppo", kind="ppo", key="k", settings=settings, inputs={}, seed=1
    ) as run:
        finish(run, "mine/ppo", "ppo", versions={"python": "3.11 [größe]"}, metrics=metrics, template_sha256="ab")
    registry.tag("mine/ppo", "second")
    records = registry.all_checkpoints()
    assert [json.loads(line) for line in registry.checkpoint_lines()] == [record.as_dict() for record in records]
    assert records[0].as_dict()["recipe"] == settings["recipe"]
    for what, expected in (
        ("checkpoints", [record.as_dict() for record in records]),
        ("runs", [record.summary() for record in registry.all_runs()]),
        ("data", [record.as_dict() for record in registry.all_data()]),
    ):
        for limit in (None, 1, 2, 5):
            read_rows.clear()
            arguments = ["--limit", str(limit)] if limit else []
            output = CliRunner().invoke(cli, [what, "list", "--json", *arguments]).output
            assert output.isascii()
            assert json.loads(output) == expected[:limit]
            assert max(read_rows) <= 2
    assert CliRunner().invoke(cli, ["data", "list", "--json"], env={"ALIGN_HOME": str(align_home / "none")}).output == (
        "[]\n"
    )


def test_a_long_sweep_shows_its_first_lines_and_says_how_many_more(align_home: Path) -> None:
    registry = Registry.open(align_home)
    for number in range(TABLE_ROWS + 3):
        add_checkpoint(registry, "r/sft", f"weights {number}")
    shown = CliRunner().invoke(cli, ["checkpoints", "gc", "--dry-run"]).output
    assert shown.count("superseded") == TABLE_ROWS
    assert "and 2 more; --json lists all" in shown
    assert f"{TABLE_ROWS + 2} would go" in shown
    assert len(json.loads(CliRunner().invoke(cli, ["checkpoints", "gc", "--json"]).output)) == TABLE_ROWS + 2
