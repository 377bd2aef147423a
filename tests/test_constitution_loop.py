"""The loop of rounds: how it is written out, when it stops, which round is kept, and what a change makes run again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align.checks import check_recipe
from align.data.examples import Conversation, Preference, prompt_of
from align.data.prepared import read_prepared
from align.errors import AlignError, Interrupted
from align.plan import plan
from align.products import Products, best_round, too_late
from align.progress import Progress
from align.recipe.graph import stage_graph, topological_order
from align.recipe.loop_settings import ConstitutionSettings
from align.recipe.settings import (
    AdapterSettings,
    CritiqueSettings,
    DpoSettings,
    PpoSettings,
    RewardSettings,
    SftSettings,
)
from align.resume import stopped_run
from align.run import run_recipe
from align.stopping import signals_handled
from tests.critique_kit import LOOP, Port, brisk_llama, mending, port_in
from tests.endpoint_server import EndpointServer
from tests.test_critique_stage import SignalAfter

MIX = "mix: [{data: talk, weight: 2}], weight: 0.5, "
ADAPTER = "kind: sft, adapter: {rank: 4}"


def loop(changes: str = "", train: str = "kind: sft, learning_rate: 1.0e-3") -> str:
    """A loop of two rounds; changes: keys put before the others."""
    plain = LOOP.replace("rounds: 2, ", "") if "rounds: " in changes else LOOP
    return plain.replace("{", "{" + changes, 1).replace("kind: sft, learning_rate: 1.0e-3", train)


def port_of(folder: Path, stage: str, model: Path | str = "nowhere", more: str = "", **others: str) -> Port:
    return port_in(folder, model, {**others, "z": stage}, more)


# Written out ---------------------------------------------------------------------------------------------------------


def test_a_loop_of_sft_is_its_rounds_one_after_the_other_each_with_draws_of_its_own(tmp_path: Path) -> None:
    recipe = port_of(tmp_path, loop("from: b, seed: 7, "), b="{kind: sft, data: talk}").workshop().recipe
    assert list(recipe.stages) == ["b", "z.1.critique", "z.1", "z.2.critique", "z.2", "z"]
    starts = {name: (type(stage), stage.from_, stage.seed) for name, stage in recipe.stages.items() if name != "b"}
    assert starts == {
        "z.1.critique": (CritiqueSettings, "b", 7), "z.1": (SftSettings, "b", 7),
        "z.2.critique": (CritiqueSettings, "z.1", 8), "z.2": (SftSettings, "z.1", 8),
        "z": (ConstitutionSettings, "b", 7),
    }  # fmt: skip
    assert [recipe.stages[name].data for name in ("z.1.critique", "z.1", "z.2")] == [  # type: ignore[union-attr]
        "asked", "z.1.critique.sft", "z.2.critique.sft",
    ]  # fmt: skip
    assert topological_order(recipe) == list(recipe.stages)
    critique = recipe.stages["z.2.critique"]
    assert isinstance(critique, CritiqueSettings)
    assert (critique.max_new_tokens, critique.check_revisions, critique.constitution) == (8, False, "rules.yaml")


def test_a_loop_of_dpo_trains_on_preferences(tmp_path: Path) -> None:
    recipe = port_of(tmp_path, loop("samples: 2, rounds: 1, ", "kind: dpo, beta: 0.2")).workshop().recipe
    assert list(recipe.stages) == ["z.1.critique", "z.1", "z"]
    trained = recipe.stages["z.1"]
    assert isinstance(trained, DpoSettings)
    assert (trained.data, trained.beta, trained.from_) == ("z.1.critique.preferences", 0.2, None)


def test_a_loop_of_ppo_trains_a_reward_model_in_each_round(tmp_path: Path) -> None:
    changes, train = "samples: 2, reward: {epochs: 3}, ", "kind: ppo, max_new_tokens: 8"
    recipe = port_of(tmp_path, loop(changes, train)).workshop().recipe
    assert list(recipe.stages) == [f"z.{n}{kind}" for n in (1, 2) for kind in (".critique", ".reward", "")] + ["z"]
    rewards, policies = ([recipe.stages[f"z.{n}{kind}"] for n in (1, 2)] for kind in (".reward", ""))
    for number, (reward, policy) in enumerate(zip(rewards, policies, strict=True), 1):
        assert isinstance(reward, RewardSettings)
        assert isinstance(policy, PpoSettings)
        assert (reward.data, reward.epochs) == (f"z.{number}.critique.preferences", 3)
        assert [term.from_ for term in policy.reward if term.kind == "model"] == [f"z.{number}.reward"]
        assert (policy.data, reward.from_, policy.from_) == ("asked", *2 * [None if number == 1 else "z.1"])
    assert topological_order(recipe) == list(recipe.stages)


def test_a_loop_of_ppo_with_a_reward_of_its_own_trains_none(tmp_path: Path) -> None:
    train = "kind: ppo, max_new_tokens: 8, reward: {kind: regex, pattern: a}"
    recipe = port_of(tmp_path, loop("", train)).workshop().recipe
    assert list(recipe.stages) == ["z.1.critique", "z.1", "z.2.critique", "z.2", "z"]


def test_each_round_mixes_its_own_rows_by_weight(tmp_path: Path) -> None:
    recipe = port_of(tmp_path, loop(MIX)).workshop().recipe
    for number in (1, 2):
        assert recipe.stages[f"z.{number}"].data == f"z.{number}.mix"  # type: ignore[union-attr]
        parts = [(part.data, part.weight) for part in recipe.data[f"z.{number}.mix"].mix]
        assert parts == [(f"z.{number}.critique.sft", 0.5), ("talk", 2)]
    assert stage_graph(recipe)["z.2"] == ["z.1", "z.2.critique"]


def test_the_adapter_is_put_on_in_the_first_round_and_trained_on_at_its_rate(tmp_path: Path) -> None:
    recipe = port_of(tmp_path, loop("", ADAPTER)).workshop().recipe
    first, second = recipe.stages["z.1"], recipe.stages["z.2"]
    assert isinstance(first, SftSettings)
    assert isinstance(second, SftSettings)
    assert first.adapter == AdapterSettings(rank=4)
    assert second.adapter is None
    assert first.learning_rate == second.learning_rate == 2e-4


# When it stops -------------------------------------------------------------------------------------------------------


def products_of(judged: dict[int, tuple[float, float]], found: dict[int, float], rounds: int = 3) -> Any:
    """What rounds made: rates of the judge before and after each, and those that the critic found before each."""

    def numbers(rates: dict[str, float]) -> dict[str, Any]:
        return {name: {"value": rate, "n": 10_000} for name, rate in rates.items()}

    products = Products(SimpleNamespace())  # type: ignore[arg-type]
    for number in range(1, rounds + 1):
        rates = dict(zip(("before", "after"), judged.get(number, ()), strict=False))
        metrics = numbers({f"{when}.judge.violation_rate": rate for when, rate in rates.items()})
        products.checkpoints[f"z.{number}"] = SimpleNamespace(metrics=metrics)  # type: ignore[assignment]
    for number, rate in found.items():
        metrics = numbers({"before.critic.violation_rate": rate})
        outputs = {"sft": SimpleNamespace(info={"train_rows": 5})}
        products.data[f"z.{number}.critique"] = SimpleNamespace(info={"metrics": metrics}, outputs=outputs)  # type: ignore[assignment]
    return products


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return port_of(tmp_path_factory.mktemp("three"), loop("rounds: 3, ")).workshop().recipe


@pytest.mark.parametrize(
    ("name", "judged", "found", "why"),
    [
        ("z.2.critique", {1: (0.5, 0.4)}, {}, ""),
        ("z.2.critique", {1: (0.5, 0.5)}, {}, "round 1 no longer lowered the violation rate (50.0% to 50.0%)"),
        ("z.3.critique", {1: (0.5, 0.1), 2: (0.1, 0.2)}, {}, "round 2 no longer lowered the violation rate (10.0% to 20"),
        ("z.2.critique", {}, {1: 0.5}, ""),  # without a judge the next critique has to measure
        ("z.2", {}, {1: 0.5, 2: 0.4}, ""),
        ("z.2", {}, {1: 0.5, 2: 0.5}, "round 1 no longer lowered the violation rate (50.0% to 50.0%)"),
        ("z.2", {}, {}, ""),
        ("z.1", {1: (0.5, 0.9)}, {}, ""),
        ("z.1.critique", {1: (0.5, 0.9)}, {}, ""),
        ("z", {1: (0.5, 0.9)}, {}, ""),
    ],
)  # fmt: skip
def test_a_round_is_too_late_after_one_that_lowered_nothing(
    three: Any, name: str, judged: dict[int, tuple[float, float]], found: dict[int, float], why: str
) -> None:
    assert too_late(three, name, products_of(judged, found)).startswith(why)
    assert bool(too_late(three, name, products_of(judged, found))) == bool(why)


def test_after_a_skipped_round_none_is_run(three: Any) -> None:
    products = products_of({1: (0.5, 0.5)}, {}, rounds=1)
    products.skipped |= {"z.2.critique", "z.2"}
    assert too_late(three, "z.3.critique", products) == "round 2 is not run either"
    assert too_late(three, "z.3", products) == "round 2 is not run either"


def test_a_round_whose_critique_left_no_rows_is_not_trained(three: Any) -> None:
    products = products_of({1: (0.5, 0.4)}, {1: 0.5, 2: 0.0}, rounds=1)
    products.data["z.2.critique"].outputs["sft"].info["train_rows"] = 0
    assert too_late(three, "z.2.critique", products) == ""
    assert too_late(three, "z.2", products) == "the critique of round 2 left nothing to learn from"


@pytest.mark.parametrize(
    ("judged", "found", "rounds", "best"),
    [
        ({1: (0.5, 0.3), 2: (0.3, 0.1), 3: (0.1, 0.2)}, {}, 3, 2),
        ({1: (0.5, 0.2), 2: (0.2, 0.2)}, {}, 2, 1),
        ({1: (0.5, 0.0), 2: (0.0, 0.0)}, {}, 2, 1),
        ({}, {1: 0.9, 2: 0.5, 3: 0.4}, 3, 3),  # nobody measured the last one
        ({}, {1: 0.9, 2: 0.5, 3: 0.6}, 2, 1),  # round 3 was critiqued and not trained
        ({}, {}, 3, 3),
        ({1: (0.5, 0.3), 2: ()}, {}, 2, 2),
    ],
)
def test_the_round_with_the_lowest_rate_is_kept(
    three: Any, judged: dict[int, tuple[float, float]], found: dict[int, float], rounds: int, best: int
) -> None:
    products = products_of(judged, found, rounds)
    number, record, why = best_round("z", three.stages["z"], products)
    assert number == best
    assert record is products.checkpoints[f"z.{best}"]
    assert why


@pytest.mark.parametrize(
    ("answers", "scores", "best"),
    [
        (300, {1: 0.5, 2: 0.6}, 2),  # 7% against 6% of 300 is chance: a standard error is 1.4 points
        (300, {1: 0.6, 2: 0.5}, 1),
        (300, {1: 0.5, 2: 0.5}, 1),
        (10_000, {1: 0.5, 2: 0.6}, 1),  # ... and of 10,000 it is not: 0.24 points
    ],
)
def test_among_rates_within_a_standard_error_the_better_score_is_kept(
    three: Any, answers: int, scores: dict[int, float], best: int
) -> None:
    products = products_of({1: (0.4, 0.06), 2: (0.06, 0.07)}, {}, rounds=2)
    for number, score in scores.items():
        metrics = products.checkpoints[f"z.{number}"].metrics
        metrics["after.judge.violation_rate"]["n"] = answers
        metrics["after.judge.score"] = {"value": score, "n": answers}
    assert best_round("z", three.stages["z"], products)[0] == best


# Run -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def brisk(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return brisk_llama(tiny_tokenizer, tmp_path_factory.mktemp("brisk"))


@pytest.fixture(scope="module")
def done(brisk: Path, tmp_path_factory: pytest.TempPathFactory) -> Port:
    """Two rounds of a loop with a mixture, and a stage that starts from it; no judge."""
    others = {"b": "{kind: sft, data: talk}", "other": "{kind: sft, data: talk, seed: 5}"}
    port = port_of(tmp_path_factory.mktemp("loop"), loop("from: b, " + MIX), brisk, **others)
    port.recipe.write_text(port.recipe.read_text() + "  last: {kind: sft, from: z, data: talk}\n")
    with pytest.MonkeyPatch.context() as patch:  # the random critic finds fault with everything, before and after
        patch.setattr("align.products.FOUND", "nobody.measures")
        actions = port.run()
    assert actions == {
        "b": "run", "other": "run", "z.1.critique": "run", "z.1": "run", "z.2.critique": "run", "z.2": "run",
        "z": "reuse", "last": "run",
    }  # fmt: skip
    return port


def actions_of(port: Port, *overrides: str) -> dict[str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("align.products.FOUND", "nobody.measures")
        return {stage.name: stage.action for stage in plan(port.workshop(*overrides))}


def test_a_later_stage_starts_from_the_round_that_is_kept(done: Port) -> None:
    registry = done.workshop().registry
    assert registry.checkpoint("port/z").id == registry.checkpoint("port/z.2").id
    assert registry.checkpoint("port/last").parents == (registry.checkpoint("port/z.2").id,)
    assert registry.checkpoint("port/z.2").parents == (registry.checkpoint("port/z.1").id,)
    assert {use.name for use in registry.checkpoint("port/z.2").data} == {"z.2.mix", "z.2.critique.sft"}


def test_no_round_trains_on_a_held_out_prompt(done: Port) -> None:
    registry = done.workshop().registry
    held_out = {prompt_of(row) for row in read_prepared(registry.data("port/asked").path).test}
    assert held_out
    trained = [use.id for name in ("z.1", "z.2") for use in registry.checkpoint(f"port/{name}").data]
    paths = {record.id: record.path for record in registry.all_data()}
    rows = [row for one in trained for row in read_prepared(paths[one]).train]
    assert len(rows) > 10
    assert all(isinstance(row, Conversation | Preference) and prompt_of(row) not in held_out for row in rows)


def test_nothing_changed_nothing_runs(done: Port) -> None:
    assert set(actions_of(done).values()) == {"reuse"}


def test_a_changed_constitution_runs_what_depends_on_it(done: Port) -> None:
    rules = done.folder / "rules.yaml"
    before = rules.read_text()
    rules.write_text(before.replace("calmer", "calmer still"))
    try:
        actions = actions_of(done)
    finally:
        rules.write_text(before)
    assert {name for name, action in actions.items() if action == "reuse"} == {"b", "other"}


def test_a_changed_setting_of_train_keeps_the_first_critique(done: Port) -> None:
    actions = actions_of(done, "stages.z.train.epochs=2.0")
    assert {name for name, action in actions.items() if action == "reuse"} == {"b", "other", "z.1.critique"}


def test_more_rounds_keep_the_earlier_ones(done: Port) -> None:
    actions = actions_of(done, "stages.z.rounds=3")
    assert [name for name, action in actions.items() if action == "run"] == ["z.3.critique", "z.3", "z", "last"]


JUDGED = "evaluation: {judge: judge.yaml, max_new_tokens: 8}\n"


def test_a_judge_that_sees_no_progress_ends_the_loop_and_all_rounds_are_held_to_the_same_prompts(
    brisk: Path, tmp_path: Path
) -> None:
    port = port_of(tmp_path, loop("", "kind: sft, learning_rate: 1.0e-12"), brisk, JUDGED)
    half = "data.asked.test_fraction=0.5"
    expected = {"z.1.critique": "run", "z.1": "run", "z.2.critique": "skip", "z.2": "skip", "z": "reuse"}
    assert port.run(half) == expected
    registry = port.workshop().registry
    rate = registry.checkpoint("port/z.1").metrics["before.judge.violation_rate"]
    assert rate["n"] == len(read_prepared(registry.data("port/asked").path).test)
    assert registry.data("port/z.1.critique.sft").info["test_rows"] < rate["n"]
    assert port.run(half) == {name: "reuse" if action == "run" else action for name, action in expected.items()}


def test_a_loop_of_ppo_runs_with_a_reward_model_per_round(brisk: Path, tmp_path: Path) -> None:
    train = "kind: ppo, max_new_tokens: 8, rollouts: 8, rounds: 1, batch_size: 4, learning_rate: 1.0e-4"
    port = port_of(tmp_path, loop("samples: 2, rounds: 1, ", train), brisk)
    assert port.run() == {"z.1.critique": "run", "z.1.reward": "run", "z.1": "run", "z": "reuse"}
    registry = port.workshop().registry
    assert registry.checkpoint("port/z.1.reward").id in registry.checkpoint("port/z.1").parents


def test_a_stopped_critique_of_a_round_is_taken_up_by_its_run(
    brisk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("align.critique.work.ROWS_AT_ONCE", 4)
    port = port_of(tmp_path, loop(), brisk)
    with signals_handled(), pytest.raises(Interrupted):
        port.run(progress=SignalAfter(4))
    registry = port.workshop().registry
    (run,) = registry.all_runs()
    workshop, stage = stopped_run(registry, run.id)
    assert stage == "z.1.critique"
    (done,) = run_recipe(workshop, Progress(), [stage])
    assert done.planned.action == "resume"
    assert [(one.id, one.status) for one in registry.all_runs()] == [(run.id, "finished")]


def test_a_mixture_of_other_rows_is_refused_before_the_first_round(brisk: Path, tmp_path: Path) -> None:
    port = port_of(tmp_path, loop("mix: [{data: pairs}], "), brisk)
    with pytest.raises(AlignError, match=r"stage 'z\.1' .* cannot train on data set 'pairs'") as refusal:
        port.run()
    assert refusal.value.exit_code == 2
    assert port.workshop().registry.all_runs() == []
    with pytest.raises(AlignError, match="cannot train on data set 'pairs'"):
        check_recipe(port.workshop())


@pytest.fixture
def server() -> Iterator[EndpointServer]:
    with EndpointServer() as server:
        yield server


def test_a_critic_that_finds_nothing_any_more_ends_the_loop(
    brisk: Path, tmp_path: Path, server: EndpointServer
) -> None:
    class Satisfied(Progress):
        """From the second round on the critic has nothing to object to."""

        def note(self, text: str) -> None:
            if "z.2.critique: run" in text:
                server.reply = lambda _: "No."

    server.reply = lambda body: mending(body["messages"][-1]["content"])
    critic = f"critic: {{kind: endpoint, url: '{server.url}', model: tiny}}, "
    port = port_of(tmp_path, loop(critic), brisk)
    assert port.run(progress=Satisfied()) == {
        "z.1.critique": "run", "z.1": "run", "z.2.critique": "run", "z.2": "skip", "z": "reuse",
    }  # fmt: skip
    server.seen.clear()
    assert set(port.run().values()) == {"reuse", "skip"}
    assert server.seen == []
