"""`align init`: the recipe it writes is sound, says what was found, and never costs the user a file."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from align.cli.recipes import init_command
from align.errors import AlignError
from align.recipe.file import load_recipe
from align.recipe.graph import recipe_warnings, topological_order
from align.recipe.starter import write_starter

ROWS = {
    "chats": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "alpaca": {"instruction": "a", "input": "", "output": "b"},
    "pairs": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "stories": {"text": "Once upon a time."},
    "thumbs": {"prompt": "a", "completion": "b", "label": True},
    "questions": {"prompt": "a"},
}


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    for name, row in ROWS.items():
        Path(f"data/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(3)))


def started(*names: str, **options):
    written = write_starter("org/Model-1.5B", [f"data/{name}.jsonl" for name in names], **options)
    return written, load_recipe(written.path)


@pytest.mark.parametrize(
    ("names", "stages"),
    [
        (["chats"], ["sft"]),
        (["alpaca"], ["sft"]),
        (["pairs"], ["reward", "dpo"]),
        (["stories"], ["pretrain"]),
        (["thumbs"], ["kto"]),
        (["chats", "pairs"], ["sft", "reward", "dpo"]),
        (["pairs", "chats"], ["sft", "reward", "dpo"]),
        (["questions", "stories", "chats", "pairs", "thumbs"], ["pretrain", "sft", "reward", "dpo", "kto"]),
    ],
)
def test_the_data_decide_the_chain_and_every_file_is_used(names, stages):
    _, recipe = started(*names)
    assert topological_order(recipe) == stages
    assert recipe_warnings(recipe) == []


def test_the_chain_goes_on_with_one_adapter():
    _, recipe = started("chats", "pairs")
    assert [stage.from_ for stage in recipe.stages.values()] == [None, "sft", "sft"]
    assert [bool(stage.adapter) for stage in recipe.stages.values()] == [True, False, False]


def test_formats_are_written_down_and_prompts_measure():
    written, recipe = started("alpaca", "questions")
    assert recipe.data["alpaca"].format == "alpaca"
    assert recipe.evaluation.prompts == "questions"
    assert recipe.data["questions"].test_fraction == 1.0
    assert written.notes == (
        "data/alpaca.jsonl: conversations, format alpaca",
        "data/questions.jsonl: prompts, format prompts",
    )


def test_files_of_one_kind_are_mixed():
    _, recipe = started("chats", "alpaca")
    assert recipe.stages["sft"].data == "conversations"
    assert [part.data for part in recipe.data["conversations"].mix] == ["chats", "alpaca"]


def test_paths_are_relative_to_the_recipe():
    written, recipe = started("chats")
    assert written.path == Path("recipes/Model-1-5B.yaml")
    assert recipe.data["chats"].path == "../data/chats.jsonl"


def test_a_local_model_is_found_from_the_recipe_too():
    Path("models/tiny").mkdir(parents=True)
    written = write_starter("models/tiny", ["data/chats.jsonl"])
    model = load_recipe(written.path).model
    assert (written.path.parent / model).resolve() == Path("models/tiny").resolve()


@pytest.mark.parametrize(
    "name", ["two words.jsonl", "it's: a {file} #1.jsonl", "-dash.jsonl", "1e5", "010", "null", "naïve.jsonl.gz"]
)
def test_odd_file_names_are_written_so_that_they_read_back(name):
    path = Path("data") / (name if "." in name else f"{name}.jsonl")
    content = (json.dumps(ROWS["chats"]) + "\n").encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    recipe = load_recipe(write_starter("org/m", [str(path)], out=Path("data/r.yaml"), force=True).path)
    assert [data.path for data in recipe.data.values()] == [path.name]


def test_the_same_file_twice_counts_once():
    _, recipe = started("chats", "chats")
    assert list(recipe.data) == ["chats"]


def test_a_recipe_is_never_overwritten_unless_told():
    written, _ = started("chats")
    written.path.write_text("mine")
    with pytest.raises(AlignError, match="exists"):
        started("chats")
    assert written.path.read_text() == "mine"
    started("chats", force=True)
    assert written.path.read_text() != "mine"


@pytest.mark.parametrize(
    ("model", "file", "words"),
    [
        ("org/m", "data/chat.jsonl", "no file 'data/chat.jsonl'"),
        ("org/m", "owner/dataset", "is no file here"),
        ("./missing", "data/chats.jsonl", "no model folder './missing'"),
        ("org/m", "data/questions.jsonl", "only prompts"),
        ("org/m", "data/empty.jsonl", "empty"),
        ("org/m", "data/strange.jsonl", "no format fits"),
        ("org/m", "data/broken.jsonl", "none of the first"),
        ("org/m", "data/hollow.jsonl", "none of its first 1 rows is complete"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(model, file, words):
    Path("data/empty.jsonl").write_text("")
    Path("data/strange.jsonl").write_text('{"colour": "red"}\n')
    Path("data/broken.jsonl").write_text("{nonsense\n")
    Path("data/hollow.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(AlignError, match=words):
        write_starter(model, [file])
    assert not Path("recipes").exists()


def test_a_name_that_no_recipe_may_have_is_refused():
    with pytest.raises(AlignError, match="cannot be called 'my recipe'"):
        started("chats", name="my recipe")


def test_the_command_says_what_to_do_next():
    result = CliRunner().invoke(init_command, ["--model", "org/m", "--data", "data/pairs.jsonl", "--out", "my r.yaml"])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines() == [
        "wrote my r.yaml",
        "  data/pairs.jsonl: preferences, format preferences",
        "next: align check 'my r.yaml'",
    ]
    assert Path("my r.yaml").read_text().startswith("# align run 'my r.yaml'\n")


def test_real_files_are_recognised(shared):
    data = shared / "data"
    found = write_starter(
        "org/m",
        [str(data / "instruct/chats.jsonl"), str(data / "instruct/alpaca_identity.json"),
         str(data / "preference/hh_harmless_1300.jsonl.gz"), str(data / "eval/gsm8k_300.jsonl"),
         str(data / "eval/xstest_prompts.csv"), str(data / "text/stories_train.jsonl")],
    )  # fmt: skip
    assert [note.rpartition(": ")[2] for note in found.notes] == [
        "conversations, format messages", "conversations, format alpaca", "preferences, format hh",
        "conversations, format prompt_completion", "prompts, format prompts", "texts, format text",
    ]  # fmt: skip


def test_data_takes_several_files_at_once(tmp_path: Path, tiny_llama: Path) -> None:
    for name, row in (
        ("talk", {"prompt": "Hi?", "completion": "Hello."}),
        ("more", {"prompt": "So?", "completion": "Yes."}),
    ):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(12)))
    files = [str(tmp_path / "talk.jsonl"), str(tmp_path / "more.jsonl")]
    done = CliRunner().invoke(
        init_command, ["--model", str(tiny_llama), "--data", *files, "--out", str(tmp_path / "mine.yaml")]
    )
    assert done.exit_code == 0, done.output
    text = (tmp_path / "mine.yaml").read_text()
    assert "talk.jsonl" in text
    assert "more.jsonl" in text
