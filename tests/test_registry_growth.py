"""A registry of many runs: a listing reads the rows that it shows, and no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from align.cli.listing import TABLE_ROWS
from align.cli.main import cli
from align.registry.database import SqliteDatabase
from align.registry.store import Registry
from tests.registry_fill import add_checkpoint, add_data

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
