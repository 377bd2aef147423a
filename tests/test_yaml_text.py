"""YAML reading: what scalars mean, where things were written, and that no file can take the machine down."""

from __future__ import annotations

import json
import math
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.errors import AlignError
from align.recipe.yaml_text import parse_yaml


def read(text: str):
    node = parse_yaml(text, "r.yaml")
    return None if node is None else node.plain()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5), ("1E3", 1000.0), (".5", 0.5), ("5.", 5.0), ("-3", -3), ("+4", 4), ("0", 0), ("0.1", 0.1),
        ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
        ("on", "on"), ("off", "off"), ("yes", "yes"), ("no", "no"), ("y", "y"),
        ("1:30", "1:30"), ("2020-01-01", "2020-01-01"), ("1_000", "1_000"), ("0x10", "0x10"), ("0o7", "0o7"),
        ("'010'", "010"), ('"1e-5"', "1e-5"), ("'null'", "null"), ("=", "="), (".inf", math.inf), ("-.INF", -math.inf),
    ],
)  # fmt: skip
def test_scalars_mean_what_yaml_1_2_says(text, value):
    found = read(f"key: {text}")["key"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: 1\nb: 010", 2, "starts with 0"),
        ("a: 1\n\na: 2", 3, "stands twice in one mapping, first at line 1"),
        ("x: {b: 1,\n c: 2, b: 3}", 2, "stands twice"),
        ("a: !!python/object/apply:os.system [ls]", 1, "tag"),
        ("a: !!str 3", 1, "tag"),
        ("a: 1\nb: !local x", 2, "tag"),
        ("a: b: c", 1, "not valid YAML"),
        ("a:\n\tb: 1", 2, "indent with spaces"),
        ("a: [1, 2", 1, "not valid YAML"),
        ("? [a]\n: b", 1, "key has to be plain text"),
        ("a: 1\n--- \nb: 2", 2, "second document"),
        ("a: *x", 1, "has no &x above it"),
        ("a: &a [*a]", 1, "inside of its own"),
        ("a: 1\nb: {<<: 3}", 2, "takes a mapping"),
        ("a: 1\nb: x\x00y", 2, "U+0000"),
        ("a: " + "9" * 5000, 1, "5000 digits"),
        ('a: 1\nb: "\\ud800"', 2, "surrogate"),
    ],
)
def test_each_refusal_names_the_line(text, line, words):
    with pytest.raises(AlignError) as caught:
        parse_yaml(text, "r.yaml")
    assert caught.value.message.startswith(f"r.yaml:{line}: ")
    assert words in caught.value.message


BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)
MERGE_BOMB = "a0: &a0 {k: v}\n" + "".join(f"a{i}: &a{i} {{x: *a{i - 1}, y: *a{i - 1}}}\n" for i in range(1, 25))


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "text",
    [BOMB, MERGE_BOMB, "&a [*a]", "[" * 20000, "{a: " * 20000, "- " * 20000, "a:\n" * 20000, "[" + "1," * 100_000, "x" * 10**6],
    ids=["bomb", "mapping bomb", "self", "lists", "mappings", "dashes", "same key", "many", "long"],
)  # fmt: skip
def test_bombs_are_refused_quickly(text):
    with pytest.raises(AlignError):
        parse_yaml(text, "r.yaml")


def test_a_bomb_takes_little_memory():
    tracemalloc.start()
    try:
        with pytest.raises(AlignError):
            parse_yaml(BOMB, "r.yaml")
        assert tracemalloc.get_traced_memory()[1] < 2 * 2**20
    finally:
        tracemalloc.stop()


def test_every_value_and_key_knows_its_line():
    root = parse_yaml("a:\n  - 1\n  - {x: 2,\n     y: 3}\nb: text\n", "r.yaml")
    items = root.value["a"].value
    assert str(root.value["a"].key_place) == "r.yaml:1"
    assert str(items[0].place) == "r.yaml:2"
    assert str(items[1].value["y"].place) == "r.yaml:4"
    assert str(root.value["b"].place) == "r.yaml:5"


def test_merged_keys_come_in_unless_stated():
    assert read("a: &x {b: 1, c: 1}\nd: {<<: *x, c: 2}")["d"] == {"b": 1, "c": 2}
    assert read("a: &x {b: 1}\nc: &y {b: 2, d: 2}\ne: {<<: [*x, *y]}")["e"] == {"b": 1, "d": 2}


def test_a_quoted_merge_key_and_odd_keys_stay_text():
    assert read("1: a\ntrue: b\n'': c\n'<<': d\n") == {"1": "a", "true": "b", "": "c", "<<": "d"}


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n"])
def test_nothing_is_read_as_none(text):
    assert parse_yaml(text, "r.yaml") is None


def test_control_characters_are_escaped_in_messages():
    with pytest.raises(AlignError) as caught:
        parse_yaml('"\\e]0;x\\a": 1\n"\\e]0;x\\a": 2', "r.yaml")
    assert "\x1b" not in str(caught.value)


@given(st.text(alphabet="ab:-[]{}&*!#'\"\n \t|>%@0.e,?<", max_size=60))
def test_any_text_is_read_or_refused_with_a_line(text):
    refusal = "r.yaml:"
    try:
        read(text)
    except AlignError as error:
        refusal = error.message
    assert refusal.startswith("r.yaml:")


TEXT = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=20)  # NUL is refused


@given(st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
))  # fmt: skip
def test_json_reads_as_itself(value):
    assert read(json.dumps({"value": value})) == {"value": value}
