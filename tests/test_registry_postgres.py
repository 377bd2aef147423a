"""The same registry in PostgreSQL. Needs ALIGN_TEST_POSTGRES_URL, or the server's own programs to start one."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from sqlalchemy.exc import ProgrammingError

from align.cli.run import run_command
from align.errors import AlignError
from align.registry import Registry
from align.registry.migrations import LATEST
from tests.postgres_kit import emptied, postgres_server
from tests.registry_fill import add_checkpoint, add_data, begin, fail, finish
from tests.test_registry_database import NOTHING, asked
from tests.test_run import bench_in

pytest.importorskip("psycopg", reason="no psycopg: pip install 'align[postgres]'")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with postgres_server() as url:
        yield url


@pytest.fixture
def registry(server: str) -> Registry:
    return Registry.open(url=emptied(server))


def test_a_chain_is_registered_found_traced_and_swept(registry: Registry) -> None:
    data = add_data(registry)
    old = add_checkpoint(registry, content="old")
    sft = add_checkpoint(registry, content="new")
    dpo = add_checkpoint(registry, "harbour/dpo", parents=[sft.id])
    registry.tag("harbour/dpo", "best")
    assert registry.checkpoint("best").id == registry.checkpoint(dpo.id[:9]).id == dpo.id
    assert registry.data("harbour/instructions").id == data.id
    assert set(registry.lineage("best").nodes) == {sft.id, dpo.id}
    assert registry.verify("best") == []
    told = [record.as_dict() for record in registry.all_checkpoints()]
    assert [json.loads(line) for line in registry.checkpoint_lines()] == told
    assert registry.newest_checkpoints("harbour/")[0].id == dpo.id
    with pytest.raises(AlignError, match="is the parent of"):
        registry.remove("harbour/sft")
    assert [removal.id for removal in registry.gc()] == [old.id]
    assert registry._database.version() == LATEST
    assert (registry.home / "checkpoints" / sft.id[:16]).is_dir()
    assert not (registry.home / "registry.db").exists()


def test_metrics_and_the_end_of_runs_are_kept(registry: Registry) -> None:
    with begin(registry) as run:
        run.log_metrics(1, {"loss": math.nan})
        run.log_metrics(2, {"loss": 2.0})
        run.log_metrics(2, {"loss": 1.0})
        run.log_metrics(3, {"loss": 0.5})
        run.truncate_metrics(2)
        finish(run, "harbour/sft", "w")
    first, second = registry.metrics(run.id)
    assert math.isnan(first.value)
    assert second.value == 1.0
    fail(registry)
    assert [record.status for record in registry.all_runs()] == ["failed", "finished"]


def test_a_database_without_tables_has_nothing_and_is_made(server: str) -> None:
    registry = Registry.open(url=emptied(server), create=False)
    assert asked(registry) == NOTHING
    registry.make()
    assert add_checkpoint(registry) == registry.checkpoint("harbour/sft")


def test_a_table_that_is_missing_from_a_made_registry_is_not_taken_for_nothing(registry: Registry) -> None:
    with registry._database.write() as connection:
        connection.exec_driver_sql("DROP TABLE tags")
    with pytest.raises(ProgrammingError, match="tags"):
        registry._database.read("SELECT tag FROM tags")


def test_a_recipe_runs_on_a_database_without_tables(
    server: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = bench_in(tmp_path, tiny_llama)
    options = ["--stage", "sft", "--json", "--set", "stages.sft.max_steps=1"]
    monkeypatch.setenv("ALIGN_REGISTRY_URL", emptied(server))
    result = CliRunner().invoke(run_command, [str(bench.recipe), *options])
    assert result.exception is None, result.exception
    assert [entry["action"] for entry in json.loads(result.stdout)] == ["run"]


WRITER = """
import sys
from align.registry import Registry
from tests.postgres_kit import emptied, postgres_server
from tests.registry_fill import add_checkpoint
registry = Registry.open()
for number in range(15):
    add_checkpoint(registry, "harbour/sft", f"{sys.argv[1]} {number}")
"""


def test_writers_at_once_lose_nothing(registry: Registry, server: str) -> None:
    environment = {**os.environ, "ALIGN_REGISTRY_URL": server}
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(number)], env=environment, cwd=ROOT) for number in range(4)
    ]
    assert [writer.wait() for writer in writers] == [0] * 4
    assert len({record.number for record in registry.all_checkpoints()}) == 60


@pytest.mark.usefixtures("registry")
def test_a_home_used_with_sqlite_before_is_refused(server: str, tmp_path: Path) -> None:
    add_checkpoint(Registry.open(tmp_path / "embedded"))
    with pytest.raises(AlignError, match="belongs to registry"):
        Registry.open(tmp_path / "embedded", url=server)
