"""Bad inputs kept as files: each ends with exit code 2, a message that names the place and what to do, and no change.

`bad_inputs/` has a folder for each kind of input; `expected.txt` in it says for every file, in the lines below its name,
what the message has to hold. What stands in `around` lies beside the input in the folder where the command runs. A folder
in `models` holds files that are put over a good model's.
"""

from __future__ import annotations

import gc
import hashlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from align.cli.main import main
from align.registry import Registry
from tests.registry_fill import add_checkpoint, add_data

CORPUS = Path(__file__).parent / "bad_inputs"
COMMANDS = {
    "recipes": ("check", "{file}"),
    "rows": ("data", "add", "{file}", "--name", "rows"),
    "constitutions": ("check", "recipe.yaml", "--set", "stages.critique.constitution={file}"),
    "judges": ("check", "recipe.yaml", "--set", "evaluation.judge={file}"),
    "templates": ("check", "recipe.yaml", "--set", "template={file}"),
    "models": ("check", "recipe.yaml", "--set", "model=./{file}"),
    "names": ("data", "add", "talk.jsonl", "--name={text}"),
}
WITHOUT_WEIGHTS = ("pickled", "shard-leaves-its-folder", "index-is-a-list", "index-names-no-file")
IN_A_CHILD = {"changes-the-messages.jinja", "escape-by-class.jinja", "include.jinja", "misspelt-name.jinja", "no-stop-token.jinja",
              "prompt-is-shown-otherwise.jinja", "shouts.jinja", "two-starts.jinja", "endless.jinja", "memory.jinja", "flood.jinja",
              "template-runs-code"}  # fmt: skip  # a foreign template is first rendered in a process of its own: seconds


def expected(kind: str) -> dict[str, list[str]]:
    """By the name of an input, what the message about it has to hold."""
    found: dict[str, list[str]] = {}
    words: list[str] = []
    for line in (CORPUS / kind / "expected.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):
            words.append(line.strip())
        else:
            words = found[line] = []
    return found


def cases() -> Iterator[object]:
    for kind in COMMANDS:
        for name, words in expected(kind).items():
            marks = [pytest.mark.slow] if name in IN_A_CHILD else []
            yield pytest.param(kind, name, words, id=f"{kind}/{name}", marks=marks)


SECOND_DATA_SET_IS_BAD = ("run", "recipe.yaml", "--set", "data.asks=bad.jsonl")
Command = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """The folder where the commands run, with a registry that holds something."""
    folder = tmp_path_factory.mktemp("bench") / "here"
    shutil.copytree(CORPUS / "around", folder)
    shutil.copytree(tiny_llama, folder / "model")
    shutil.copy(CORPUS / "rows" / "cut-off.jsonl", folder / "bad.jsonl")
    fill(folder / "home")
    gc.collect()  # the last connection to leave tidies up the database's files
    return folder


def fill(home: Path) -> None:
    registry = Registry.open(home)
    add_data(registry)
    add_checkpoint(registry)


@pytest.fixture
def align(bench: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs the command line in this process; exit code and everything that was said."""
    monkeypatch.chdir(bench)
    monkeypatch.setenv("ALIGN_HOME", str(bench / "home"))
    monkeypatch.setenv("ALIGN_ALLOCATOR", "system")

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["align", *words])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        said = capfd.readouterr()
        return code, f"{said.out}{said.err}".replace(f"{bench}/", "")

    return run


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder with the hash of its bytes, but for the cache of what files hash to."""
    files = (path for path in folder.rglob("*") if path.is_file() and "cache" not in path.parts)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def listing(home: Path) -> list[str]:
    """The ids of all that a registry lists."""
    registry = Registry.open(home, create=False)
    return [record.id for record in (*registry.all_checkpoints(), *registry.all_data(), *registry.all_runs())]


def put(kind: str, name: str, bench: Path) -> Path:
    """The input, beside what it belongs to."""
    place = bench / name
    if kind != "models":
        return Path(shutil.copy(CORPUS / kind / name, place))
    shutil.copytree(bench / "model", place)
    if name in WITHOUT_WEIGHTS:
        (place / "model.safetensors").unlink()
    for file in (CORPUS / kind / name).iterdir():
        shutil.copy(file, place / file.name.removesuffix(".txt"))
    return place


@pytest.mark.parametrize(("kind", "name", "words"), list(cases()))
def test_it_is_refused_by_name_and_changes_nothing(
    kind: str, name: str, words: list[str], bench: Path, align: Command
) -> None:
    place = put(kind, name, bench)
    listed, before = listing(bench / "home"), contents(bench)
    text = place.read_text(encoding="utf-8") if kind == "names" else ""
    try:
        code, said = align(*(word.format(file=name, text=text) for word in COMMANDS[kind]))
        after = contents(bench)
    finally:
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    assert code == 2, said
    assert "Traceback" not in said
    assert not [part for part in words if part not in said], said
    assert "\x1b" not in said
    assert after == before
    assert listing(bench / "home") == listed


@pytest.mark.parametrize("kind", COMMANDS)
def test_every_file_of_the_corpus_is_expected_to_say_something(kind: str) -> None:
    named = expected(kind)
    assert sorted(named) == sorted(path.name for path in (CORPUS / kind).iterdir() if path.name != "expected.txt")
    assert all(named.values())


def test_the_corpus_is_large() -> None:
    assert sum(len(expected(kind)) for kind in COMMANDS) >= 240


def test_what_stands_around_the_inputs_is_good(align: Command) -> None:
    code, said = align("check", "recipe.yaml")
    assert (code, "The recipe can run." in said) == (0, True), said


@pytest.mark.parametrize(
    "words",
    [
        ("check", "judge.yaml"),
        ("data", "add", "recipe.yaml", "--name", "rows"),
        ("data", "add", "talk.jsonl", "--name", "../evil"),
        ("data", "add", "~nobody-of-that-name/talk.jsonl", "--name", "rows"),
        ("data", "add", "talk.jsonl", "--name", "rows", "--test-fraction", "nan"),
        ("data", "add", "talk.jsonl", "--name", "rows", "--seed", "4294967296"),
        ("data", "show", "nothing"),
        ("run", "judge.yaml"),
        ("run", "recipe.yaml", "--stage", "nothing"),
        ("run", "recipe.yaml", "--force", "nothing"),
        ("run", "recipe.yaml", "--report", "talk.jsonl/page.html"),
        ("run", "recipe.yaml", "--set", "model=./nothing"),
        ("run", "recipe.yaml", "--set", "template=asks.jsonl"),
        ("run", "recipe.yaml", "--set", "stages.sft.max_length=9999"),
        SECOND_DATA_SET_IS_BAD,
        ("sft", "recipe.yaml", "--set", "evaluation.judge=recipe.yaml"),
        ("ppo", "recipe.yaml"),
        ("critique", "recipe.yaml", "--set", "stages.critique.constitution=judge.yaml"),
        ("check", "recipe.yaml", "--set", "stages.sft.max_length=8", "--set", "stages.sft.too_long=error"),
        ("plan", "recipe.yaml", "--stage", "nothing"),
        ("checkpoints", "show", "../evil"),
        ("checkpoints", "tag", "a/b", "c"),
        ("checkpoints", "untag", "c"),
        ("checkpoints", "remove", "a/b"),
        ("runs", "resume", "0123456789ab"),
        ("report", "nothing"),
    ],
    ids=" ".join,
)
def test_where_there_is_no_registry_a_refusal_makes_none(
    words: tuple[str, ...], align: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGN_HOME", str(tmp_path / "nowhere"))
    code, said = align(*words)
    assert code == 2, said
    assert not (tmp_path / "nowhere").exists()


def test_a_chain_whose_second_data_set_is_bad_registers_none_of_them(bench: Path, align: Command) -> None:
    listed, before = listing(bench / "home"), contents(bench)
    code, said = align(*SECOND_DATA_SET_IS_BAD)
    assert (code, "bad.jsonl:2: broken JSON" in said) == (2, True), said
    assert contents(bench) == before
    assert listing(bench / "home") == listed
