"""`align runs resume`: a stopped run goes on as what it was, or is refused with what has changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from align.cli.runs import runs_group
from align.errors import AlignError, Interrupted
from align.registry import Registry
from align.stopping import signals_handled
from tests.registry_fill import fail
from tests.test_run import Bench, SignalAt, bench_in


@pytest.fixture
def stopped(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A chain whose adapter stage was stopped in its second step."""
    bench = bench_in(tmp_path, tiny_llama)
    monkeypatch.setenv("ALIGN_HOME", str(tmp_path / "home"))
    bench.run(stages=["sft"])
    with signals_handled(), pytest.raises(Interrupted):
        bench.run("stages.adapter.epochs=6", stages=["adapter"], progress=SignalAt(2))
    return bench


def resume(bench: Bench, *arguments: str) -> Result:
    run = bench.workshop().registry.all_runs()[0]
    return CliRunner().invoke(runs_group, ["resume", run.id[:8], *arguments])


def test_it_goes_on_with_the_recipe_on_record(stopped: Bench) -> None:
    run = stopped.workshop().registry.all_runs()[0]
    result = resume(stopped, "--json")
    assert result.exception is None, result.exception
    done = json.loads(result.stdout)
    assert [(entry["action"], entry["checkpoint"]["stage"]) for entry in done] == [
        ("reuse", "sft"),
        ("resume", "adapter"),
    ]
    assert done[-1]["checkpoint"]["run"] == run.id
    whole = stopped.run("stages.adapter.epochs=6", stages=["adapter"], force=["adapter"])["adapter"]
    assert whole == ("run", done[-1]["checkpoint"]["id"])
    with pytest.raises(AlignError, match="is finished; there is nothing to resume"):
        raise resume_error(stopped)


def resume_error(bench: Bench) -> BaseException:
    error = resume(bench).exception
    assert isinstance(error, AlignError)
    assert error.exit_code == 2
    return error


def test_changed_data_is_refused_by_name(stopped: Bench) -> None:
    file = stopped.folder / "talk.jsonl"
    file.write_text(file.read_text().replace("Heron is a boat", "Heron is a goat"))
    with pytest.raises(AlignError, match=r"stage 'sft', which it needs, is not what it was \(changed: data.talk\)"):
        raise resume_error(stopped)


def test_other_numerics_are_refused_by_name(stopped: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.origins.NUMERICS", 99)
    with pytest.raises(AlignError, match=r"is not what it was \(changed: versions.numerics"):
        raise resume_error(stopped)


def test_an_edited_parent_is_refused(stopped: Bench) -> None:
    file = stopped.workshop().registry.checkpoint("harbour/sft").path / "config.json"
    file.chmod(0o644)
    file.write_text(file.read_text() + " ")
    with pytest.raises(AlignError, match=r"harbour/sft .* was changed behind the registry's back: config.json"):
        raise resume_error(stopped)


def test_a_run_without_a_recipe_on_record_is_refused() -> None:
    registry = Registry.open()
    fail(registry, "dpo")
    result = CliRunner().invoke(runs_group, ["resume", registry.all_runs()[0].id])
    assert isinstance(result.exception, AlignError)
    assert "no recipe on record" in result.exception.message
