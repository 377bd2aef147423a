"""The critique stage on a tiny model: its data sets train the next stages, and a stopped one goes on to the same rows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from align.cli.checkpoints import checkpoints_group
from align.critique.rows import Row, RowFile
from align.critique.work import seed_of
from align.data.examples import Preference, Prompt
from align.data.prepared import read_prepared
from align.errors import AlignError, Interrupted, StageFailed
from align.plan import planned_stage
from align.products import Products
from align.progress import Progress
from align.registry.records import DataRecord, StageData
from align.stopping import signals_handled
from tests.critique_kit import CRITIQUE, Port, Scripted, brisk_llama, mending, port_in, questions, said, work, workbench

STAGES = {
    "x": CRITIQUE,
    "sft": "{kind: sft, data: x.sft, learning_rate: 1.0e-3}",
    "dpo": "{kind: dpo, data: x.preferences, learning_rate: 1.0e-3}",
    "reward": "{kind: reward, data: x.preferences, learning_rate: 1.0e-3}",
}
FEW = 4  # rows of a group, in the tests about stops


@pytest.fixture(scope="module")
def brisk(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return brisk_llama(tiny_tokenizer, tmp_path_factory.mktemp("brisk"))


@pytest.fixture(scope="module")
def done(brisk: Path, tmp_path_factory: pytest.TempPathFactory) -> Port:
    """Critique, and one stage of each kind that trains on what it made."""
    port = port_in(tmp_path_factory.mktemp("port"), brisk, STAGES)
    assert set(port.run().values()) == {"run"}
    return port


def made(port: Port, output: str) -> DataRecord:
    return port.workshop().registry.data(f"port/x.{output}")


def rows_of(port: Port) -> bytes:
    return (made(port, "sft").path / "rows.jsonl").read_bytes()


# What it makes -------------------------------------------------------------------------------------------------------


def test_both_data_sets_follow_from_the_rows_on_record(done: Port) -> None:
    rows = [Row.from_dict(json.loads(line)) for line in rows_of(done).splitlines()]
    assert [row.index for row in rows] == list(range(10))
    kept = [row for row in rows if not row.fault]
    compared = [one for row in rows for one in row.comparisons if one.probability not in (None, 0.5)]
    pairs, answers = (read_prepared(made(done, output).path) for output in ("preferences", "sft"))
    assert 0 < len(kept) < 10
    assert len(answers.train) == len(kept)
    assert len(pairs.train) == len(kept) + len(compared)
    soft = [pair.probability for pair in pairs.train if isinstance(pair, Preference) and pair.probability is not None]
    assert sorted(soft) == sorted(max(one.probability or 0, 1 - (one.probability or 0)) for one in compared)
    assert all(0.5 < chance <= 0.95 for chance in soft)


def test_held_out_prompts_make_the_held_out_rows_and_no_other(done: Port) -> None:
    asked = read_prepared(done.workshop().registry.data("port/asked").path)
    held_out = {example.messages for example in asked.test if isinstance(example, Prompt)}
    pairs = read_prepared(made(done, "preferences").path)
    assert {pair.prompt for pair in pairs.test if isinstance(pair, Preference)} <= held_out
    assert not {pair.prompt for pair in pairs.train if isinstance(pair, Preference)} & held_out
    lines = (made(done, "sft").path / "held_out.jsonl").read_text().splitlines()
    assert [Row.from_dict(json.loads(line)).prompt for line in lines] == [e.messages for e in asked.test]  # type: ignore[union-attr]


def test_what_the_stage_says_of_itself_stands_with_each_data_set(done: Port) -> None:
    told = [made(done, output).info["stage"] for output in ("sft", "preferences")]
    assert told[0] == told[1]
    assert told[0]["counts"]["prompts"] == 10
    assert 0 <= told[0]["metrics"]["before.critic.violation_rate"]["value"] <= 1
    assert told[0]["samples"][0]["steps"]
    assert told[0]["ingredients"]["constitution"]


def test_the_stages_after_it_trained_on_its_rows_and_nothing_runs_twice(done: Port) -> None:
    registry = done.workshop().registry
    for name, output in (("sft", "sft"), ("dpo", "preferences"), ("reward", "preferences")):
        record = registry.checkpoint(f"port/{name}")
        assert [(use.name, use.id) for use in record.data] == [(f"x.{output}", made(done, output).id)]
        assert record.data[0].rows == len(read_prepared(made(done, output).path).train)
    assert set(done.run().values()) == {"reuse"}


def test_other_rows_from_the_same_critique_train_anew_and_the_same_rows_do_not(done: Port) -> None:
    workshop = done.workshop()
    products = Products(workshop)
    planned_stage(workshop, "x", products)
    weights = workshop.weights("dpo", products.checkpoints)
    assert weights is not None
    before = workshop.key("dpo", weights)
    record = made(done, "preferences")
    workshop.deliver("x", StageData({"sft": made(done, "sft"), "preferences": record}))
    assert workshop.key("dpo", weights) == before
    workshop.deliver("x", StageData({"sft": made(done, "sft"), "preferences": replace(record, id="0" * 64)}))
    assert workshop.key("dpo", weights) != before


def test_the_lineage_leads_through_the_data_to_the_model_that_answered(brisk: Path, tmp_path: Path) -> None:
    stages = {"start": "{kind: sft, data: talk, learning_rate: 1.0e-4}", "x": CRITIQUE.replace("{", "{from: start, ")}
    stages["dpo"] = "{kind: dpo, data: x.preferences, learning_rate: 1.0e-3}"
    port = port_in(tmp_path, brisk, stages)
    port.run()
    registry = port.workshop().registry
    start, pairs = registry.checkpoint("port/start"), registry.data("port/x.preferences")
    edges = {(edge.child, edge.parent) for edge in registry.lineage("port/dpo").edges}
    assert (registry.checkpoint("port/dpo").id, pairs.id) in edges
    assert (pairs.id, start.id) in edges
    environment = {"ALIGN_HOME": str(tmp_path / "home"), "COLUMNS": "200"}
    shown = CliRunner().invoke(checkpoints_group, ["lineage", "port/dpo"], env=environment).stdout
    assert "x.preferences" in shown
    assert "port/start" in shown
    port.run("stages.start.epochs=2", stages=["start"])  # now another checkpoint has the name
    removed = {removal.id for removal in registry.gc()}
    assert not removed & {start.id, pairs.id}
    assert start.path.is_dir()


def test_reused_data_is_the_newest_of_its_name_again_and_gc_keeps_it(brisk: Path, tmp_path: Path) -> None:
    port = port_in(tmp_path, brisk, {"x": CRITIQUE})
    port.run()
    first = made(port, "preferences").id
    port.run("stages.x.samples=2")
    assert made(port, "preferences").id != first
    assert port.run() == {"x": "reuse"}
    assert made(port, "preferences").id == first
    port.workshop().registry.gc()
    assert port.run() == {"x": "reuse"}
    assert port.run("name=quay") == {"x": "reuse"}
    other = port.workshop().registry.data("quay/x.preferences")
    assert (other.id, other.info["stage"]["name"]) == (first, "quay/x")
    count = len(port.workshop().registry.all_data())
    port.run("name=quay")
    assert len(port.workshop().registry.all_data()) == count


def test_a_prompt_longer_than_the_context_is_kept_apart_and_counted(brisk: Path, tmp_path: Path) -> None:
    port = port_in(tmp_path, brisk, {"x": CRITIQUE})
    with (tmp_path / "asked.jsonl").open("a") as stream:
        stream.write(json.dumps({"prompt": "long " * 200}) + "\n")
    port.run("data.asked.test_fraction=0.0")
    told = made(port, "sft").info["stage"]["counts"]
    assert (told["prompts"], told["apart"]["too_long"]) == (13, 1)


def test_without_any_row_the_stage_fails_and_says_why(brisk: Path, tmp_path: Path) -> None:
    port = port_in(tmp_path, brisk, {"x": CRITIQUE.replace("samples: 3", "samples: 0")})
    rules = (tmp_path / "rules.yaml").read_text()
    (tmp_path / "rules.yaml").write_text(rules + 'nothing_found: ["(?s).+"]\n')
    with pytest.raises(StageFailed, match=r"no row came of 10 prompts: .*times the critic found nothing") as failure:
        port.run()
    assert failure.value.exit_code == 1


# Durable and resumable -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unbroken(brisk: Path, tmp_path_factory: pytest.TempPathFactory) -> Port:
    """The stage in groups of four, run without a stop."""
    port = port_in(tmp_path_factory.mktemp("unbroken"), brisk, {"x": CRITIQUE})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("align.critique.work.ROWS_AT_ONCE", FEW)
        port.run()
    return port


@pytest.fixture
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.critique.work.ROWS_AT_ONCE", FEW)


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from align.critique import work
    from align.critique.rows import RowFile
    from tests.critique_kit import Port

    work.ROWS_AT_ONCE = 4
    add = RowFile.add

    def torn(self, rows):
        if self.path.name == "rows.jsonl" and 4 in [row.index for row in rows]:
            add(self, rows[:1])
            with self.path.open("a") as stream:
                stream.write('{"index": 5, "prom')
            os.kill(os.getpid(), signal.SIGKILL)
        add(self, rows)

    RowFile.add = torn
    folder = Path(sys.argv[1])
    Port(folder, folder / "port.yaml").run()
"""


@pytest.mark.usefixtures("few_at_once")
def test_killed_in_the_middle_of_a_line_it_goes_on_to_the_same_rows(
    brisk: Path, tmp_path: Path, unbroken: Port
) -> None:
    port = port_in(tmp_path, brisk, {"x": CRITIQUE})
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)], cwd=Path(__file__).parent.parent, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
    )  # fmt: skip
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    (state,) = (tmp_path / "home" / "runs").glob("*/state/rows.jsonl")
    assert state.read_text().endswith('{"index": 5, "prom')
    assert port.run() == {"x": "resume"}
    assert rows_of(port) == rows_of(unbroken)
    assert made(port, "sft").id == made(unbroken, "sft").id
    assert made(port, "preferences").id == made(unbroken, "preferences").id


class SignalAfter(Progress):
    """Sends SIGTERM to this process once some prompts are done."""

    def __init__(self, prompts: int) -> None:
        self.left = prompts

    @contextmanager
    def bar(self, title: str, total: float) -> Iterator[Any]:
        outer = self

        class Bar:
            def advance(self, amount: float = 1, *, tokens: int = 0, note: str = "") -> None:
                outer.left -= int(amount) if title == "prompts" else 0
                if title == "prompts" and amount and outer.left == 0:
                    signal.raise_signal(signal.SIGTERM)

        yield Bar()


@pytest.mark.usefixtures("few_at_once")
def test_a_signal_stops_it_between_groups_and_the_same_command_goes_on(
    brisk: Path, tmp_path: Path, unbroken: Port
) -> None:
    port = port_in(tmp_path, brisk, {"x": CRITIQUE})
    with signals_handled(), pytest.raises(Interrupted, match="finished rows are saved") as stop:
        port.run(progress=SignalAfter(2 * FEW))
    assert stop.value.exit_code == 128 + signal.SIGTERM
    (run,) = port.workshop().registry.all_runs()
    assert run.status == "interrupted"
    assert sorted(RowFile(run.work / "state" / "rows.jsonl").rows) == list(range(2 * FEW))
    assert port.run() == {"x": "resume"}
    assert rows_of(port) == rows_of(unbroken)


def test_only_missing_groups_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.critique.work.ROWS_AT_ONCE", 2)
    file = RowFile(tmp_path / "rows.jsonl")
    whole = workbench(work(), Scripted(mending)).rows(questions(5), file, "prompts")
    lines = file.path.read_text().splitlines(keepends=True)
    file.path.write_text("".join(lines[:3]))
    writer = Scripted(mending)
    again = workbench(work(), writer).rows(questions(5), RowFile(file.path), "prompts")
    assert again == whole
    assert file.path.read_text().splitlines(keepends=True) == lines
    assert {text for text in writer.asked if "|" not in text} == {"q2", "q3", "q4"}


def test_each_group_draws_answers_of_its_own() -> None:
    seeds = [seed_of(seed, start) for seed in (0, 1) for start in (0, 256, 512)]
    assert len(set(seeds)) == 6
    assert seeds == [seed_of(seed, start) for seed in (0, 1) for start in (0, 256, 512)]
    assert all(0 <= seed < 2**48 for seed in seeds)


def test_answers_are_sorted_into_rows_with_their_faults(tmp_path: Path) -> None:
    answers: Sequence[str | None] = ("whole", "cut off", "", None)
    policy = Scripted({f"q{number}": text for number, text in enumerate(answers)}, cut=("cut off",))
    bench = workbench(work(check_revisions=False), policy, Finding())
    rows = bench.rows(questions(4), RowFile(tmp_path / "rows.jsonl"), "prompts")
    assert [(row.fault, row.answer, row.final) for row in rows] == [
        ("", "whole", "better"), ("unfinished", "", "cut off"), ("unanswered", "", ""), ("too_long", "", ""),
    ]  # fmt: skip


class Finding:
    """A critic that always finds something and mends it."""

    def critiques(self, cases: Sequence[Any]) -> list[Any]:
        return Scripted(lambda _: "bad").write([said("")] * len(cases), 8)

    def revisions(self, cases: Sequence[Any]) -> list[Any]:
        return Scripted(lambda _: "better").write([said("")] * len(cases), 8)

    def choices(self, contests: Sequence[Any]) -> list[float | None]:
        return [0.5] * len(contests)


def test_another_checkpoint_can_be_the_critic(brisk: Path, tmp_path: Path) -> None:
    stages = {"other": "{kind: sft, data: talk, learning_rate: 1.0e-2}"}
    stages["x"] = CRITIQUE.replace("{", "{critic: {kind: checkpoint, from: other}, ")
    port = port_in(tmp_path, brisk, stages)
    assert port.run() == {"other": "run", "x": "run"}
    ingredients = made(port, "sft").info["stage"]["ingredients"]
    assert ingredients["critic_id"] == port.workshop().registry.checkpoint("port/other").id


def test_a_reward_model_of_the_registry_is_no_critic(brisk: Path, tmp_path: Path) -> None:
    port_in(tmp_path, brisk, {"r": "{kind: reward, data: pairs}"}).run()
    port = port_in(tmp_path, brisk, {"x": CRITIQUE.replace("{", "{critic: {kind: checkpoint, from: port/r}, ")})
    with pytest.raises(AlignError, match="is a reward model, which writes no text"):
        port.run()
