"""`align runs`: the status that is true now, numbers, the end of the log; fast with thousands of runs."""

from __future__ import annotations

import json
import math
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from sqlalchemy import insert

from align.cli.runs import runs_group
from align.errors import AlignError
from align.registry import Registry, schema
from tests.registry_fill import add_checkpoint, begin, fail, finish


def shown(*arguments: str) -> str:
    result = CliRunner().invoke(runs_group, arguments, env={"COLUMNS": "80"})
    assert result.exception is None, result.exception
    return result.stdout


def document(*arguments: str) -> Any:
    return json.loads(shown(*arguments, "--json"))


@pytest.fixture
def registry() -> Registry:
    return Registry.open()


def test_the_listing_shows_each_run_with_its_status(registry: Registry) -> None:
    add_checkpoint(registry)
    fail(registry, "dpo")
    with begin(registry, "policy") as run:
        text = shown("list")
        assert re.search(rf"{run.id} +harbour/policy +sft +running", text)
        assert re.search(r"harbour/dpo +sft +failed", text)
        assert re.search(r"harbour/sft +sft +finished", text)
        assert [entry["status"] for entry in document("list")] == ["running", "failed", "finished"]
        finish(run, "harbour/policy", "p")
    assert max(map(len, text.splitlines())) <= 80


def test_an_empty_registry_says_so(align_home: Path) -> None:
    assert "No runs" in shown("list")
    assert document("list") == []
    assert not align_home.exists()


def test_show_has_settings_metrics_and_the_end_of_the_log(registry: Registry) -> None:
    with begin(registry, inputs={"parent": "org/base", "data": {"rows": "ab" * 32}}) as run:
        for step in range(1, 21):
            run.log_metrics(step, {"loss": 4.0 / step})
            run.log(f"line {step}")
        run.log_metrics(21, {"loss": math.nan})
        record = finish(run, "harbour/sft", "w")
    text = shown("show", run.id[:6])
    assert re.search(r"loss +21 +4 +nan +0\.2 +4 +21", text)
    assert "line 11\n" in text
    assert "line 10\n" not in text
    assert "10 earlier lines" in re.sub(r"\s+", " ", text)
    assert "epochs: 2" in text
    assert "data.rows: abababababab\n" in re.sub(r" +\n", "\n", text)
    assert f"harbour/sft@{record.id[:8]}" in text
    machine = document("show", run.id)
    assert machine["checkpoints"] == [record.id]
    assert machine["metrics"][-1] == {"step": 21, "name": "loss", "value": None}
    assert len(machine["metrics"]) == 21


def test_text_from_outside_cannot_steer_the_terminal(registry: Registry) -> None:
    with pytest.raises(ValueError), begin(registry) as run:
        raise ValueError("\x1b]0;owned\x07 [bold]x[/bold]")
    text = shown("show", run.id)
    assert "\x1b" not in text
    assert "\\x1b]0;owned\\x07 [bold]x[/bold]" in text


def test_an_unknown_run_ends_with_2(registry: Registry) -> None:
    record = add_checkpoint(registry)
    result = CliRunner().invoke(runs_group, ["show", record.run[:-1] + "x"])
    assert isinstance(result.exception, AlignError)
    assert result.exception.exit_code == 2
    assert record.run in result.exception.hint


def thousands(registry: Registry, count: int) -> None:
    fail(registry)
    (row,) = registry._database.read("SELECT * FROM runs")
    settings = json.dumps({"settings": {f"key_{i}": i for i in range(60)}})
    rows = [{**row, "number": n, "id": f"{n:012x}", "settings": settings, "key": str(n)} for n in range(2, count + 1)]
    with registry._database.write() as connection:
        connection.execute(insert(schema.runs), rows)


@pytest.mark.slow
def test_a_listing_of_ten_thousand_runs_costs_less_than_a_third_of_a_second(registry: Registry) -> None:
    """Processor time of the whole command, Python's start included; other work on the machine does not count."""
    thousands(registry, 10_000)
    code = "from align.cli.runs import runs_group; runs_group()"
    for arguments in (["list"], ["list", "--limit", "100", "--json"]):
        took = []
        for _ in range(5):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(
                [sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.DEVNULL, env=os.environ
            )
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert min(took) < 0.33, (arguments, took)


def test_a_long_listing_reads_only_what_it_shows(registry: Registry) -> None:
    thousands(registry, 200)
    assert len(registry.all_runs(5)) == 5
    assert registry.all_runs(5)[0].number == 200
    assert "--limit N shows more" in shown("list")
    assert len(document("list")) == 200
