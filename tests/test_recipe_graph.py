"""The graph of a recipe: order, cycles, names, and stages that cannot start where they say."""

from __future__ import annotations

import itertools

import pytest

from align.errors import AlignError
from align.recipe.graph import (
    check_graph,
    find_cycle,
    gives_adapter,
    needed,
    recipe_warnings,
    topological_order,
    trains_adapter,
)
from align.recipe.settings import Recipe


def recipe(stages: dict[str, dict], data: dict | None = None, **others) -> Recipe:
    filled = {name: {**({} if s["kind"] == "merge" else {"data": "d"}), **s} for name, s in stages.items()}
    return Recipe.model_validate({"name": "r", "model": "m", "data": data or {"d": "f"}, "stages": filled, **others})


def problems(*args, **others) -> str:
    return "\n".join(problem.message for problem in check_graph(recipe(*args, **others)))


CHAIN = {
    "dpo": {"kind": "dpo", "from": "adapter"},
    "reward": {"kind": "reward", "from": "sft"},
    "adapter": {"kind": "sft", "from": "sft", "adapter": {}},
    "sft": {"kind": "sft"},
}


@pytest.mark.parametrize("names", list(itertools.permutations(CHAIN)))
def test_every_stage_comes_after_what_it_needs_in_any_order_of_writing(names):
    order = topological_order(recipe({name: CHAIN[name] for name in names}))
    assert sorted(order) == sorted(names)
    assert order.index("sft") < order.index("adapter") < order.index("dpo")
    assert order.index("sft") < order.index("reward")


def test_among_stages_that_could_run_the_first_written_runs_first():
    stages = {name: {"kind": "sft"} for name in ("c", "a", "b")}
    assert topological_order(recipe(stages)) == ["c", "a", "b"]


def test_needed_takes_what_lies_upstream_and_no_more():
    assert needed(recipe(CHAIN), ["dpo"]) == ["sft", "adapter", "dpo"]
    assert needed(recipe(CHAIN), ["reward", "sft"]) == ["sft", "reward"]


def test_needed_refuses_unknown_names():
    with pytest.raises(AlignError, match=r"no stage 'rewad'.*\n.*Did you mean 'reward'"):
        needed(recipe(CHAIN), ["rewad"])


def test_long_chains_are_no_trouble():
    stages = {f"s{i}": {"kind": "sft", "from": f"s{i + 1}"} for i in range(1500)}
    found = recipe(stages)
    assert topological_order(found)[0] == "s1499"
    assert check_graph(found) == []


@pytest.mark.parametrize(
    ("graph", "cycle"),
    [
        ({"a": ["a"]}, ["a", "a"]),
        ({"a": ["b"], "b": ["c"], "c": []}, []),
        ({"x": ["a"], "a": ["b"], "b": ["a"]}, None),
        ({"a": ["b"], "b": ["c"], "c": ["a"]}, None),
    ],
)
def test_cycles_are_found_and_walk_along_real_edges(graph, cycle):
    found = find_cycle(graph)
    if cycle is not None:
        assert found == cycle
    else:
        assert found[0] == found[-1]
        assert all(after in graph[before] for before, after in itertools.pairwise(found))


def test_a_cycle_of_stages_is_printed():
    text = problems({"a": {"kind": "sft", "from": "b"}, "b": {"kind": "sft", "from": "a"}})
    assert text in ("a cycle in `from:`: a -> b -> a.", "a cycle in `from:`: b -> a -> b.")
    assert problems({"a": {"kind": "sft", "from": "a"}}) == "a cycle in `from:`: a -> a."


def test_a_cycle_of_mixtures_is_printed():
    data = {"d": {"mix": [{"data": "e"}]}, "e": {"mix": [{"data": "d"}]}}
    assert "a cycle in `mix:`" in problems({"a": {"kind": "sft"}}, data)


@pytest.mark.parametrize(
    ("data", "others", "words"),
    [
        ({"instructions": "f"}, {}, "no data set 'd' in this recipe."),
        ({"d": {"mix": [{"data": "dd"}]}}, {}, "no data set 'dd'"),
        ({"d": {"path": "f", "decontaminate": ["evaluaton"]}, "evaluation": "f"}, {}, "Did you mean 'evaluation'?"),
        ({"d": {"path": "f", "decontaminate": ["d"]}}, {}, "cleaned of its own rows"),
        ({"d": "f"}, {"evaluation": {"prompts": "promts"}}, "no data set 'promts'"),
    ],
)
def test_names_of_data_that_do_not_exist_are_refused(data, others, words):
    assert words in problems({"a": {"kind": "sft"}}, data, **others)


def test_a_file_to_decontaminate_against_needs_no_name():
    assert problems({"a": {"kind": "sft"}}, {"d": {"path": "f", "decontaminate": ["eval/x.jsonl"]}}) == ""


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ({"r": {"kind": "reward"}, "x": {"kind": "dpo", "from": "r"}}, "'x' cannot start from 'r': a reward model"),
        ({"r": {"kind": "reward"}, "x": {"kind": "sft", "from": "r"}}, "'x' cannot start from 'r': a reward model"),
        (
            {"r": {"kind": "reward", "adapter": {}}, "m": {"kind": "merge", "from": "r"}, "x": {"kind": "dpo", "from": "m"}},
            "'x' cannot start from 'm'",
        ),
        ({"m": {"kind": "merge"}}, "'m' has nothing to merge: it needs `from:`"),
        ({"s": {"kind": "sft"}, "m": {"kind": "merge", "from": "s"}}, "'s' gives a whole model, not an adapter"),
        (
            {"s": {"kind": "sft", "adapter": {}}, "x": {"kind": "dpo", "from": "s", "adapter": {}}},
            "training goes on with the adapter it starts from",
        ),
        ({"s": {"kind": "sft"}, "x": {"kind": "sft", "from": "s", "quantize": "nf4"}}, "so it needs an 'adapter'"),
        ({"s": {"kind": "sft", "adapter": {"init": "pissa"}, "quantize": "nf4"}}, "cannot go with 'quantize'"),
    ],
)  # fmt: skip
def test_stages_that_cannot_start_where_they_say_are_refused(stages, words):
    assert words in problems(stages)


@pytest.mark.parametrize(
    "stages",
    [
        CHAIN,
        {"x": {"kind": "dpo", "from": "other/sft"}, "m": {"kind": "merge", "from": "some-tag"}},
        {"x": {"kind": "sft", "from": "other/sft", "quantize": "nf4"}},
        {"s": {"kind": "sft", "adapter": {}}, "m": {"kind": "merge", "from": "s"}, "x": {"kind": "dpo", "from": "m", "adapter": {}}},
        {"s": {"kind": "sft", "adapter": {}, "quantize": "nf4"}, "x": {"kind": "dpo", "from": "s", "quantize": "nf4"}},
        {"r": {"kind": "reward"}, "q": {"kind": "reward", "from": "r"}},
    ],
)  # fmt: skip
def test_stages_that_can_work_are_let_through(stages):
    assert problems(stages) == ""


def test_what_trains_an_adapter_is_known_along_the_chain():
    found = recipe({**CHAIN, "merged": {"kind": "merge", "from": "dpo"}, "out": {"kind": "dpo", "from": "a/b"}})
    assert {name: trains_adapter(found, name) for name in found.stages} == {
        "dpo": True, "reward": False, "adapter": True, "sft": False, "merged": False, "out": None,
    }  # fmt: skip
    assert gives_adapter(found, "dpo") is True
    assert gives_adapter(found, "merged") is False


def test_unused_data_is_a_warning():
    data = {"d": {"path": "f", "decontaminate": ["e"]}, "e": "g", "spare": "h"}
    found = recipe({"a": {"kind": "sft"}}, data)
    assert recipe_warnings(found) == ["data set 'spare' is used by no stage"]
    assert check_graph(found) == []
