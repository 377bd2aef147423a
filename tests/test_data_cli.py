"""`align data`: what a person sees and a script reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from align.cli.data import data_group
from align.errors import AlignError, CheckFailed

ROWS = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(30)]


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def call(*words: object, fails: type[BaseException] | None = None) -> Result:
    result = CliRunner().invoke(data_group, [str(word) for word in words])
    if fails is None:
        assert result.exit_code == 0, (result.output, result.exception)
    else:
        assert isinstance(result.exception, fails), (result.output, result.exception)
    return result


def test_data_that_was_added_is_listed_and_shown_with_its_rows(rows_file: Path) -> None:
    assert "no data sets yet" in call("list").stdout
    added = json.loads(call("add", rows_file, "--name", "rows", "--json").stdout)
    assert added["info"]["train_rows"] + added["info"]["test_rows"] == 30
    (listed,) = json.loads(call("list", "--json").stdout)
    assert listed == added
    assert "rows" in call("list").stdout
    shown = json.loads(call("show", "rows", "--rows", 2, "--json").stdout)
    assert len(shown["rows"]) == 2
    assert shown["rows"][0]["messages"][0]["role"] == "user"
    first, held_out = call("show", "rows", "--rows", 1).stdout, call("show", "rows", "--rows", 1, "--test").stdout
    assert "messages, assistant: answer" in first
    assert first != held_out


def test_adding_the_same_content_again_adds_nothing(rows_file: Path, align_home: Path) -> None:
    call("add", rows_file, "--name", "rows")
    call("add", rows_file, "--name", "rows")
    assert len(json.loads(call("list", "--json").stdout)) == 1
    assert not list(align_home.glob("data-*"))


def test_a_file_with_bad_rows_is_not_added(tmp_path: Path, align_home: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(json.dumps(ROWS[0]) + '\n{"prompt": "a"}\n')
    result = call("add", tmp_path / "bad.jsonl", "--name", "bad", fails=AlignError)
    assert "bad.jsonl:2: no 'completion'" in str(result.exception)
    assert not align_home.exists()


def test_an_edited_data_set_of_the_registry_is_refused(rows_file: Path) -> None:
    added = json.loads(call("add", rows_file, "--name", "rows", "--json").stdout)
    file = Path(added["path"]) / "train.jsonl"
    file.chmod(0o644)
    file.write_text(file.read_text().replace("answer", "anwser"))
    assert "train.jsonl" in str(call("show", "rows", fails=AlignError).exception)


def test_check_reports_and_names_every_bad_row_with_exit_code_two(tmp_path: Path) -> None:
    rows = [*ROWS, ROWS[0], *[{"prompt": "a"}] * 25]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = CliRunner().invoke(data_group, ["check", str(tmp_path / "rows.jsonl")])
    assert result.exit_code == 2
    assert "prompt_completion (conversation)" in result.stdout
    assert "duplicates: 1\n" in result.stdout
    assert all(f"rows.jsonl:{line}: no 'completion'" in result.stderr for line in range(32, 57))
    result = CliRunner().invoke(data_group, ["check", str(tmp_path / "rows.jsonl"), "--json"])
    assert result.exit_code == 2
    report = json.loads(result.stdout)
    assert (report["rows"], len(report["bad_rows"]), report["duplicates"]) == (56, 25, 1)
    assert report["words"] == {"median": 4, "p95": 4, "largest": 4}


def test_check_is_strict_about_duplicates_only_when_asked(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, ROWS[3]]))
    call("check", tmp_path / "rows.jsonl")
    result = call("check", tmp_path / "rows.jsonl", "--strict", fails=CheckFailed)
    assert "1 duplicates" in str(result.exception)


@pytest.mark.parametrize("words", [["check"], ["show"], ["show", "--json"], ["add"]])
def test_nothing_that_acts_on_a_terminal_is_printed(tmp_path: Path, words: list[str]) -> None:
    evil = "\x1b]0;title\x07\x9b31m\u202eabc\x08"
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{n}{evil}", "completion": evil + "=1+1"}) + "\n" for n in range(20))
    )
    call("add", tmp_path / "rows.jsonl", "--name", "rows")
    target = ["rows"] if words[0] == "show" else [str(tmp_path / "rows.jsonl")]
    name = ["--name", "again"] if words[0] == "add" else []
    output = call(words[0], *target, *words[1:], *name).output
    assert not set(output) & set("\x1b\x07\x9b\u202e\x08")


def test_trained_tokens_are_marked_and_only_those(rows_file: Path, tiny_llama: Path) -> None:
    call("add", rows_file, "--name", "rows")
    text = call("show", "rows", "--rows", 1, "--tokens", "--model", tiny_llama).stdout
    before, _, trained = text.partition("[[")
    assert "question" in before
    assert trained.startswith("answer")
    assert trained.rstrip().endswith("</s>]]")
    (spans,) = json.loads(call("show", "rows", "--rows", 1, "--tokens", "--model", tiny_llama, "--json").stdout)
    assert "".join(span["text"] for span in spans if span["trained"]) == trained.rstrip().removesuffix("]]")


@pytest.mark.parametrize(
    ("row", "trained_spans"),
    [
        ({"prompt": "why", "chosen": "yes", "rejected": "no"}, 2),
        ({"prompt": "why", "completion": "yes", "label": True}, 1),
        ({"prompt": "why"}, 0),
        ({"text": "once upon a time"}, 1),
    ],
)
def test_tokens_of_every_kind_of_row_can_be_shown(
    tmp_path: Path, tiny_llama: Path, row: dict[str, object], trained_spans: int
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    call("add", tmp_path / "rows.jsonl", "--name", "rows")
    text = call("show", "rows", "--tokens", "--model", tiny_llama).stdout
    assert text.count("[[") == trained_spans


def test_tokens_without_a_model_are_a_usage_error(rows_file: Path) -> None:
    call("add", rows_file, "--name", "rows")
    result = call("show", "rows", "--tokens", fails=SystemExit)
    assert result.exit_code == 2
    assert "--tokens needs --model" in result.output


def test_the_commands_import_nothing_heavy() -> None:
    code = "import sys, align.cli.data; print([m for m in ('torch', 'datasets', 'pydantic', 'sqlalchemy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    code = (
        "import sys, align.data.prepare; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
