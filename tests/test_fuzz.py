"""Inputs that nobody thought of: each command ends well or with exit code 2 and a message, and a refusal changes nothing.

Deterministic: the same examples in every run. A few in the fast suite, many more in the slow one.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from align.chat import rendering
from align.chat.rendering import Renderer
from align.chat.templates import check_template, prepare_tokenizer
from align.cli.main import main
from align.constitution import Constitution
from align.data.examples import Message
from align.errors import AlignError
from align.judge import Judge
from align.models.folders import load_tokenizer
from align.models.source import source_of
from align.registry import Registry
from tests.registry_fill import add_checkpoint, add_data
from tests.test_bad_inputs import contents

ROOT = Path(__file__).parents[1]
FEW, MANY = 40, 1500
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
NASTY = st.sampled_from([
    None, True, "", " ", 0, -1, 1e308, float("nan"), float("inf"), 10**30, "../../etc/passwd", "/dev/null", "a\0b", "\x1b[2J",
    "\ud800", "1e-5", "on", "{{ 7 * 7 }}", "<script>", [], {}, [[]], {"": None}, "a" * 5000, "~", "é\u202e", "!!python/object",
])  # fmt: skip


def some(examples: int) -> Callable[[Any], Any]:
    """So many examples, the same ones in every run."""
    return settings(
        max_examples=examples, derandomize=True, deadline=None, database=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )  # fmt: skip


def amounts() -> Any:
    """A test body with few examples, and with many where the slow tests run."""
    return pytest.mark.parametrize(
        "examples", [FEW, pytest.param(MANY, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
    )


class Bench:
    """A folder with a filled registry; commands run in it, in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "home"
        self.fill()
        self.before = self.state()

    def fill(self) -> None:
        registry = Registry.open(self.home)
        add_data(registry)
        add_checkpoint(registry)

    def state(self) -> tuple[Any, ...]:
        """All that a command could have changed: what the registry lists, its artifacts, and what lies around it."""
        registry = Registry.open(self.home, create=False)
        records = (*registry.all_checkpoints(), *registry.all_data(), *registry.all_runs())
        files = {path: sha for path, sha in contents(self.folder).items() if "registry.db" not in path}
        return [repr(record) for record in records], files, sorted(path.name for path in self.folder.parent.iterdir())

    def ended(self, *words: str) -> tuple[int, str]:
        """Exit code and words of a command. Anything but an end in words is an exception here."""
        out, err, argv = io.StringIO(), io.StringIO(), sys.argv
        sys.argv = ["align", *words]
        code = 0
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                main()
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            sys.argv = argv
        return code, f"{out.getvalue()}{err.getvalue()}"

    def holds(self, *words: str) -> int:
        """Run a command that may only end well or be refused in words, and never act on the terminal."""
        code, said = self.ended(*words)
        assert code in (0, 2), said
        assert code == 0 or said.strip()
        assert not set(said) & {"\x1b", "\x07", "\x00", "\x9b"}, said
        return code

    def reads(self, file: str, contents: Any, examples: int, *command: str) -> None:
        """Each of the contents, in that file, is read by the command or refused in words, and nothing else changes."""

        @some(examples)
        @given(contents)
        def holds(content: bytes) -> None:
            Path(file).write_bytes(content)
            self.holds(*command, file)

        holds()
        Path(file).unlink()
        assert self.state() == self.before


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    folder = tmp_path / "bench"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ALIGN_HOME", str(folder / "home"))
    monkeypatch.setenv("ALIGN_ALLOCATOR", "system")
    return Bench(folder)


# Changes of a tree, and of a text ----------------------------------------------------------------------------------------


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value below the root of a tree of mappings and lists."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [way for key, value in inner for way in ((*path, key), *places(value, (*path, key)))]


@st.composite
def changed(draw: Any, tree: Any) -> Any:
    """The tree with one to three of its values replaced, removed, wrapped or called otherwise."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        ways = places(tree)
        if not ways:
            break
        *above, last = draw(st.sampled_from(ways))
        holder = tree
        for step in above:
            holder = holder[step]
        match draw(st.sampled_from(["replace", "nasty", "remove", "wrap", "rename"])):
            case "replace":
                holder[last] = draw(JSON)
            case "nasty":
                holder[last] = copy.deepcopy(draw(NASTY))  # the next change may fall into it
            case "remove":
                del holder[last]
            case "wrap":
                holder[last] = draw(st.sampled_from([[holder[last]], {"kind": holder[last]}, str(holder[last])]))
            case "rename" if isinstance(holder, dict):
                holder[draw(st.text(max_size=8))] = holder.pop(last)
    return tree


@st.composite
def scratched(draw: Any, text: bytes) -> bytes:
    """The text with a few stretches cut out, doubled or overwritten."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = draw(st.integers(start, min(len(text), start + 40)))
        middle = draw(
            st.sampled_from([b"", text[start:end] * 2]) | st.binary(max_size=6) | st.text(max_size=4).map(str.encode)
        )
        text = text[:start] + middle + text[end:]
    return text


# What is read ------------------------------------------------------------------------------------------------------------

RECIPES = [
    yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "recipes").glob("*.yaml"))
]  # fmt: skip
ROWS: dict[str, list[Any]] = {
    "pairs": [{"prompt": "a?", "chosen": "b", "rejected": "c", "margin": 1.0, "probability": 0.9}],
    "talk": [{"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}], "tools": []}],
    "completion": [{"prompt": "a?", "completion": "b"}, {"prompt": [{"role": "user", "content": "c"}], "completion": "d"}],
    "alpaca": [{"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]]}],
    "sharegpt": [{"conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]}],
    "rated": [{"prompt": "a?", "completion": "b", "label": True}],
    "prompts": [{"prompt": "a?", "expected": {"answer": "b", "not": ["c"]}}],
    "text": [{"text": "a b c"}],
    "whole pairs": [{"prompt": "a?", "chosen": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}],
                     "rejected": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "c"}]}],
    "tools": [{"messages": [{"role": "user", "content": [{"type": "text", "text": "a?"}]}, {"role": "assistant", "content": "",
               "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}, {"role": "tool", "content": "1", "name": "f"},
               {"role": "assistant", "content": "b"}], "system": "c", "tools": '[{"name": "f"}]', "expected": {"answer": 1}}],
    "hh": [{"chosen": "\n\nHuman: a?\n\nAssistant: b", "rejected": "\n\nHuman: a?\n\nAssistant: c"}],
}  # fmt: skip


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def as_lines(values: list[Any]) -> bytes:
    return b"".join(as_json(value) + b"\n" for value in values)


@amounts()
def test_a_recipe_with_changed_values_is_read_or_refused(bench: Bench, examples: int) -> None:
    bench.reads("recipe.json", st.sampled_from(RECIPES).flatmap(changed).map(as_json), examples, "recipe", "show")


@amounts()
def test_a_recipe_with_scratched_text_is_read_or_refused(bench: Bench, examples: int) -> None:
    texts = [path.read_bytes() for path in sorted((ROOT / "recipes").glob("*.yaml"))]
    bench.reads("recipe.yaml", st.sampled_from(texts).flatmap(scratched), examples, "recipe", "show")


@amounts()
@pytest.mark.parametrize("form", ROWS)
def test_changed_rows_are_read_or_refused(bench: Bench, form: str, examples: int) -> None:
    rows = changed(ROWS[form] * 3)
    bench.reads("rows.jsonl", rows.map(as_lines) | rows.map(as_json), max(10, examples // len(ROWS)), "data", "check")


@amounts()
@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "jsonl.gz", "parquet"])
def test_scratched_files_of_rows_are_read_or_refused(bench: Bench, ending: str, examples: int) -> None:
    bench.reads(f"rows.{ending}", scratched(written(ending)), max(10, examples // 5), "data", "check")


def written(ending: str) -> bytes:
    """Good rows in a file of that kind."""
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n}, für dich."} for n in range(5)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if ending == "json":
        return json.dumps(rows).encode()
    if ending == "csv":
        return b"prompt,completion\n" + b"".join(f'{r["prompt"]},"{r["completion"]}"\n'.encode() for r in rows)
    if ending == "jsonl.gz":
        import gzip

        return gzip.compress(lines, mtime=0)
    if ending == "parquet":
        import pyarrow
        from pyarrow import parquet

        sink = io.BytesIO()
        parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
        return sink.getvalue()
    return lines


@amounts()
@pytest.mark.parametrize(
    ("load", "file"),
    [(Judge.load, "data/harbour/judge.yaml"), (Constitution.load, "data/harbour/constitution.yaml")],
    ids=["judge", "constitution"],
)
def test_a_changed_judge_or_constitution_is_read_or_refused_with_its_place(
    load: Callable[[Path], object], file: str, tmp_path: Path, examples: int
) -> None:
    place = tmp_path / "rules.yaml"
    content = (ROOT / file).read_bytes()
    tree = yaml.safe_load(content)

    @some(examples)
    @given(changed(tree).map(lambda tree: json.dumps(tree).encode()) | scratched(content))
    def holds(text: bytes) -> None:
        place.write_bytes(text)
        said = str(place)
        try:
            load(place)
        except AlignError as refusal:
            said = refusal.message
        assert str(place) in said

    holds()


# Names ---------------------------------------------------------------------------------------------------------------------

NAMES = st.one_of(
    st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=80),  # no argument can hold NUL
    st.text(alphabet="./\\~$-@: ab%\n\x1b\u202e\udcff\uff0f", max_size=20),
    st.lists(st.sampled_from(["..", ".", "", "a", "etc", "harbour", "sft", "~", "C:", "registry.db"]), max_size=6).map(
        "/".join
    ),
)


@amounts()
def test_a_name_is_a_name_or_refused_and_never_a_way_out(bench: Bench, examples: int) -> None:
    Path("rows.jsonl").write_text('{"prompt": "a?", "completion": "b"}\n' * 2, encoding="utf-8")
    before = bench.state()

    @some(examples)
    @given(NAMES, st.integers(0, 6))
    def holds(name: str, what: int) -> None:
        commands = [
            ("checkpoints", "show", "--", name), ("checkpoints", "verify", "--", name), ("data", "show", "--", name),
            ("runs", "show", "--", name), ("checkpoints", "untag", "--", name), ("checkpoints", "lineage", "--", name),
            ("recipe", "show", "--", name),
        ]  # fmt: skip
        bench.holds(*commands[what])
        assert bench.state() == before

    holds()


@amounts()
def test_a_data_set_gets_a_name_that_stays_in_the_registry(bench: Bench, examples: int) -> None:
    Path("rows.jsonl").write_text('{"prompt": "a?", "completion": "b"}\n' * 2, encoding="utf-8")
    outside = {path for path in contents(bench.folder) if not path.startswith("home/")}
    before = bench.state()

    @some(examples)
    @given(NAMES)
    def holds(name: str) -> None:
        nonlocal before
        code = bench.holds("data", "add", "rows.jsonl", f"--name={name}")
        now = bench.state()
        assert code == 0 or now == before
        assert {path for path in now[1] if not path.startswith("home/")} == outside
        assert now[2] == before[2]
        before = now

    holds()


# Templates ------------------------------------------------------------------------------------------------------------------

PIECES = [
    "{{ m.content }}", "{{ m.role }}", "{{ m['content'] | upper }}", "{{ eos_token }}", "{{ bos_token }}", "<|user|>", "<|assistant|>",
    "{% if add_generation_prompt %}", "{% endif %}", "{% else %}", "{% for m in messages %}", "{% endfor %}", "{{ loop.index }}",
    "{{ m.__class__ }}", "{{ messages.__class__.__mro__ }}", "{{ cycler.__init__.__globals__ }}", "{{ m.content.format(m) }}",
    "{% set m = messages[0] %}", "{% macro x() %}", "{% endmacro %}", "{{ x() }}", "{{ 1 // 0 }}", "{{ undefined.thing }}", "{{", "}}",
    "{%", "%}", "{#", "#}", "{{ raise_exception('no') }}", "{{ messages[9].content }}", "{{ tools }}", "{% generation %}",
    "{% endgeneration %}", "\n", "text", "{{ m | tojson }}", "{{ [] | first }}", "{{ 'a' ~ 1 }}", "{{ 'a' + 1 }}", "{% break %}",
]  # fmt: skip
WHOLE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
TURNS = (Message("user", "question"), Message("assistant", "answer"))
TEMPLATES = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
    st.tuples(st.sampled_from(PIECES), st.sampled_from(PIECES)).map(lambda ends: ends[0] + WHOLE + ends[1]),
    scratched(WHOLE.encode()).map(lambda text: text.decode(errors="replace")),
)


@amounts()
def test_a_template_can_be_trained_on_or_is_refused(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, examples: int
) -> None:
    """Without its guard, which takes a process for each: these hold no loop that does not end."""
    monkeypatch.setattr(rendering, "guard", str)
    plain = load_tokenizer(source_of(tiny_llama))

    @some(examples)
    @given(TEMPLATES)
    def holds(template: str) -> None:
        tokenizer = copy.deepcopy(plain)
        refusal = None
        try:
            prepare_tokenizer(tokenizer, template)
            check_template(tokenizer)
            text = Renderer(tokenizer).conversation(TURNS).text
        except AlignError as error:
            refusal, text = error, ""
        assert refusal is None or (refusal.message and refusal.hint)
        assert "site-packages" not in text

    holds()
