"""The graph of a recipe: order, cycles, names, and stages that cannot start where they say."""

from __future__ import annotations

import itertools

import pytest

from align.errors import AlignError
from align.recipe.file import load_recipe
from align.recipe.graph import (
    adapter_stage,
    check_graph,
    find_cycle,
    gives_adapter,
    needed,
    recipe_warnings,
    stage_graph,
    topological_order,
    trains_adapter,
)
from align.recipe.settings import Recipe


def recipe(stages: dict[str, dict], data: dict | None = None, **others) -> Recipe:
    filled = {name: {**({} if s["kind"] in ("merge", "ppo") else {"data": "d"}), **s} for name, s in stages.items()}
    return Recipe.model_validate({"name": "r", "model": "m", "data": data or {"d": "f"}, "stages": filled, **others})


def ppo(reward: object = "reward", **more) -> dict:
    return {"kind": "ppo", "prompts": "d", "reward": reward, **more}


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


def test_a_cycle_through_a_reward_is_printed_with_the_keys_that_make_it():
    stages = {"policy": ppo(), "reward": {"kind": "reward", "from": "policy"}}
    assert problems(stages).startswith("a cycle in `from:` and `reward:`: ")
    watched = {"policy": ppo("other/reward", watch="policy")}
    assert problems(watched) == "a cycle in `watch:`: policy -> policy."


@pytest.mark.parametrize(
    "reward", ["reward", {"kind": "model", "from": "reward"}, [{"kind": "judge", "file": "f"}, "reward"]]
)
def test_reward_models_are_needed_before_the_policy(reward):
    found = recipe({"policy": ppo(reward, **{"from": "sft"}), **CHAIN})
    assert needed(found, ["policy"]) == ["sft", "reward", "policy"]
    assert topological_order(found).index("reward") < topological_order(found).index("policy")
    watched = recipe({"policy": ppo("other/model", watch=reward), **CHAIN})
    assert set(needed(watched, ["policy"])) == {"sft", "reward", "policy"}


def test_a_reward_of_the_registry_or_a_folder_is_no_edge():
    found = recipe({"policy": ppo(["other/reward", "../folder", "a-tag"])})
    assert stage_graph(found) == {"policy": []}
    assert check_graph(found) == []


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
        ({"r": {"kind": "reward"}, "x": ppo("r", **{"from": "r"})}, "'x' cannot start from 'r': a reward model"),
        ({"s": {"kind": "sft", "adapter": {}}, "x": ppo("o/r", adapter={}, **{"from": "s"})}, "goes on with the adapter it"),
        ({"s": {"kind": "sft"}, "x": ppo("s")}, "stage 'x': its reward 's' is no reward model: it is a stage of kind sft."),
        ({"s": {"kind": "sft"}, "x": ppo("o/r", watch="s")}, "stage 'x': its watched reward 's' is no reward model"),
        (
            {"s": {"kind": "sft", "adapter": {}}, "m": {"kind": "merge", "from": "s"}, "x": ppo("m")},
            "its reward 'm' is no reward model: it is a stage of kind sft.",
        ),
        ({"x": ppo(["o/r", "o/r"])}, "stage 'x': its reward 'o/r' stands there twice."),
        ({"x": ppo({"kind": "judge"})}, "its reward of kind judge names no file, and `evaluation:` has no judge."),
        ({"x": ppo("o/r", value="adapter")}, "'x' trains all weights of its policy, so its value model can be no adapter"),
        ({"x": ppo("o/r", prompts="e")}, "no data set 'e' in this recipe."),
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
        {"r": {"kind": "reward", "adapter": {}}, "m": {"kind": "merge", "from": "r"}, "x": ppo("m")},
        {"s": {"kind": "sft", "adapter": {}}, "x": ppo("o/r", value="adapter", **{"from": "s"})},
        {"x": ppo("o/r", value="adapter", **{"from": "only/the-registry-knows"})},
        {"r": {"kind": "reward"}, "x": ppo("r", watch="r")},
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


def test_a_policy_goes_on_with_the_adapter_it_starts_from_and_learns_at_its_rate(tmp_path):
    found = recipe({"policy": ppo(**{"from": "adapter"}), **CHAIN})
    assert trains_adapter(found, "policy") is True
    assert adapter_stage(found, "policy") is found.stages["adapter"]
    file = tmp_path / "r.yaml"
    file.write_text(found.model_dump_json(by_alias=True))
    rates = {name: stage.learning_rate for name, stage in load_recipe(file).stages.items()}
    assert rates["policy"] == pytest.approx(1e-5)


def test_a_learnt_reward_that_nothing_checks_is_a_warning():
    unseen = "stage 'policy' trains on a reward model, and with neither"
    assert recipe_warnings(recipe({"policy": ppo()}))[0].startswith(unseen)
    assert recipe_warnings(recipe({"policy": ppo(watch="other/reward")})) == []
    assert recipe_warnings(recipe({"policy": ppo(["reward", {"kind": "exact_match"}])})) == []
    assert recipe_warnings(recipe({"policy": ppo()}, evaluation={"judge": "judge.yaml"})) == []


def test_unused_data_is_a_warning():
    data = {"d": {"path": "f", "decontaminate": ["e"]}, "e": "g", "spare": "h"}
    found = recipe({"a": {"kind": "sft"}}, data)
    assert recipe_warnings(found) == ["data set 'spare' is used by no stage"]
    assert check_graph(found) == []
