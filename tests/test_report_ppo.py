"""The report of a ppo stage: its charts, proof, guards and answers over time, its two parents, and its line in the terminal."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from align.console import print_table, stage_table
from align.errors import AlignError
from align.recipe.settings import PpoSettings
from align.registry import MetricRow, Registry
from align.report.chain import gather
from align.report.numbers import changes, facts, raised_guards
from align.report.page import write_report
from align.report.ppo_curves import ppo_charts
from align.report.ppo_view import ppo_view
from align.report.samples_view import MOST_MOMENTS, samples_view
from align.report.settings_view import settings_view
from align.report.stage_view import stage_view
from tests.report_chain import HOSTILE, LONG_ANSWER, PPO, PROOF, add_policy, add_stage, filled_registry, ppo_rows
from tests.test_report import Page


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    found = filled_registry(tmp_path_factory.mktemp("report"))
    add_policy(found)
    return found


@pytest.fixture(scope="module")
def page(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Page:
    out = tmp_path_factory.mktemp("page") / "report.html"
    write_report(registry, "harbour/policy", out)
    assert out.stat().st_size < 400_000
    return Page(out.read_text("utf-8"))


def rows() -> list[MetricRow]:
    return [MetricRow(step, name, value) for step, row in ppo_rows().items() for name, value in row.items()]


def only(*names: str) -> list[MetricRow]:
    return [row for row in rows() if row.name in names]


def test_charts_tell_learning_from_hacking_first_and_the_rest_after() -> None:
    first, rest = ppo_charts(rows(), {})
    assert [chart.title for chart in first] == [
        "Reward", "Reward: reward", "Reward: length", "Judge's score", "Watched: second", "KL from parent", "Entropy",
        "Length of answers", "Finished answers", "Value fit", "Clip fractions", "KL coefficient",
    ]  # fmt: skip
    assert {chart.title for chart in rest} == {
        "Policy loss", "Value loss", "Loss", "Grad norm", "Learning rate", "KL from the round's start", "Repetition",
        "KL from parent, per token", "Spread of rewards", "Correlation with length", "Mismatch of generator and trainer",
    }  # fmt: skip


def test_what_a_run_did_not_record_has_no_chart() -> None:
    first, rest = ppo_charts(only("round.reward", "round.reward.reward", "round.kl", "train.clip_fraction"), {})
    assert [chart.title for chart in first] == ["Reward", "KL from parent", "Clip fractions"]
    assert [line.name for line in first[2].series] == ["policy"]
    assert [chart.title for chart in rest] == ["Reward: reward"], "the only part of a reward is the reward"
    assert ppo_charts([], {}) == ([], [])


def test_training_and_held_out_values_share_a_chart_and_so_do_both_clip_fractions() -> None:
    charts = {chart.title: chart for chart in ppo_charts(rows(), {})[0]}
    for title in ("Reward", "KL from parent", "Length of answers", "Watched: second"):
        assert [line.name for line in charts[title].series] == ["training", "held-out"], title
    assert [(line.name, line.style) for line in charts["Clip fractions"].series] == [
        ("policy", "policy"),
        ("value model", "value"),
    ]
    assert charts["Reward"].series[1].points[0] == (16, pytest.approx(0.15))


def test_kl_is_held_against_its_limit_and_its_target() -> None:
    settings = {"guards": {"kl_limit": 30.0}, "kl_target": 6.0}
    (chart,) = ppo_charts(only("round.kl"), settings)[0]
    assert chart.drawing.count('class="reference"') == 2
    assert ">limit</text>" in chart.drawing
    assert chart.note == "nats per answer, by step; target 6; limit 30"
    (chart,) = ppo_charts(only("round.kl"), {"guards": {"kl_limit": None}, "kl_target": None})[0]
    assert 'class="reference"' not in chart.drawing


def test_a_limit_far_beyond_the_curve_is_told_and_not_drawn() -> None:
    (chart,) = ppo_charts(only("round.kl"), {"guards": {"kl_limit": 3000.0}})[0]
    assert 'class="reference"' not in chart.drawing
    assert chart.note.endswith("limit 3000")
    (low,) = ppo_charts([MetricRow(step, "round.kl", 20.0 + step) for step in range(9)], {"guards": {"kl_limit": 30}})[
        0
    ]
    bottom, top = map(float, re.search(r'data-y="(\S+) (\S+)"', low.drawing).groups())
    assert bottom < 30 < top, "a limit that the curve does not reach is on the scale"


def test_entropy_is_held_against_a_share_of_its_first_value() -> None:
    (chart,) = ppo_charts(only("round.entropy"), {"guards": {"entropy_floor": 0.1}})[0]
    assert chart.note == "nats per token, by step; collapse 0.21"


def test_a_kl_coefficient_that_stays_and_a_fit_without_a_value_model_are_no_charts() -> None:
    assert ppo_charts([MetricRow(step, "round.value_explained", 0.0) for step in range(9)], {}) == ([], [])
    fixed = [MetricRow(step, "round.kl_coefficient", 0.05) for step in range(9)]
    assert ppo_charts(fixed, {}) == ([], [])
    assert [c.title for c in ppo_charts([*fixed, MetricRow(9, "round.kl_coefficient", 0.06)], {})[0]] == [
        "KL coefficient"
    ]


def test_levels_of_any_kind_and_values_that_broke_do_not_break_the_charts() -> None:
    broken = [MetricRow(step, "round.entropy", math.nan) for step in range(3)]
    odd: list[dict[str, Any]] = [
        {"guards": "none"},
        {"guards": {"kl_limit": "x", "entropy_floor": []}, "kl_target": {}},
    ]
    for settings in odd:
        first, _ = ppo_charts([*broken, *only("round.kl")], settings)
        assert [chart.title for chart in first] == ["KL from parent", "Entropy"]
    assert "no finite value" in ppo_charts(broken, {"guards": {"entropy_floor": 0.1}})[0][0].drawing


def test_the_proof_stands_in_a_table_with_value_limit_and_verdict(page: Page) -> None:
    for row in PROOF:
        assert row["check"] in page.text
    assert "KL to the reference is 0 3.1e−8 1.0e−6 ✓ holds" in page.text
    assert page.text.count("✓ holds") == 5
    assert "✗ broken" not in page.text


def test_a_check_that_does_not_hold_is_marked_as_broken() -> None:
    view = ppo_view({"proof": [{"check": "the ratio is 1", "value": None, "limit": 1e-4, "holds": False}, "odd"]})
    assert [(one.said, one.value, one.chip.sign, one.chip.text) for one in view.proof] == [
        ("the ratio is 1", "", "✗", "broken")
    ]
    assert ppo_view({"proof": [{"check": "x", "holds": "yes"}]}).proof[0].chip.text == "broken", "only true holds"


def test_each_guard_is_warned_of_once_with_its_rounds(page: Page) -> None:
    assert "Guards were raised in policy." in page.text
    assert "guards raised: 2" in page.text
    assert "Stopped before its last round by: KL limit" in page.text
    assert (
        "KL limit , 5 times from round 33 to 37: KL is 30.2 nats per response measured 30.20, limit 30.00" in page.text
    )
    assert "Reward for length , round 36: reward follows length measured 0.840, limit 0.800" in page.text


def test_that_no_guard_was_raised_is_said_and_silence_says_nothing() -> None:
    assert ppo_view({"guards": []}).guards == []
    assert ppo_view({}).guards is None
    assert ppo_view({"guards": [{"guard": "new_one"}]}).guards[0].guard == "New one"
    assert raised_guards({"guards": [{"guard": "kl"}, 3, {"guard": "entropy"}, {"guard": "kl"}]}) == ["kl", "entropy"]
    assert raised_guards({"guards": "none"}) == []


def test_a_run_without_warnings_says_so(tmp_path: Path) -> None:
    found = filled_registry(tmp_path)
    add_policy(found, metrics=PPO | {"guards": [], "stopped_by": None}, rows={})
    write_report(found, "harbour/policy", tmp_path / "page.html")
    said = Page((tmp_path / "page.html").read_text("utf-8")).text
    assert "No guard was raised." in said
    assert "Guards were raised" not in said
    assert "Stopped before" not in said


def test_answers_over_time_stand_with_their_rewards_and_long_ones_are_folded(page: Page) -> None:
    assert "Before ✗ wrong reward −0.400" in page.text
    assert "After ✓ correct reward 1.900" in page.text
    assert "Over time rounds 0 to 38" in page.text
    assert "Round 25 reward 1.200 Mara keeps it. Knock first." in page.text
    unfolded = [attributes for attributes in page.all("details") if attributes.get("class") == "over-time"]
    assert ["open" in attributes for attributes in unfolded] == [True, False], "the first sample is open"
    assert f"Round 12 reward 0.350 {LONG_ANSWER[:119]}… {' '.join(LONG_ANSWER.split())}" in page.text
    samples = samples_view(
        [{"prompt": "p", "over_time": [{"round": 1, "text": LONG_ANSWER}, {"round": 2, "text": "x"}]}]
    )
    assert [bool(moment.opening) for moment in samples[0].moments] == [True, False]


def test_of_many_rounds_the_first_the_last_and_some_between_are_shown() -> None:
    told = [{"round": number, "text": "x", "reward": math.nan if number else 0} for number in range(50)]
    moments = samples_view([{"prompt": "p", "over_time": told}, 7])[0].moments
    assert len(moments) == MOST_MOMENTS
    assert (moments[0].round, moments[-1].round) == ("0", "49")
    assert (moments[0].reward, moments[-1].reward) == ("0.000", "not finite")
    assert samples_view([{"prompt": "p", "over_time": "none"}])[0].moments == []


def test_a_policy_has_two_parents_in_the_picture_and_in_words(registry: Registry, page: Page) -> None:
    labels = " ".join(a["aria-label"] or "" for a in page.all("svg"))
    assert "policy from adapter; policy from reward" in labels
    dashed = [a for a in page.all("path") if a.get("class") == "edge dashed"]
    assert len(dashed) == 2, "the reward model's arrow in both drawings, and no other"
    assert "Made from harbour/adapter for the reward of harbour/reward on 2,364 rows of preferences" in page.text
    names = [stage.name.rpartition("/")[2] for stage in gather(registry, "harbour/policy").stages]
    assert names == ["sft", "adapter", "reward", "policy"]


def test_a_run_without_a_checkpoint_has_its_rewards_too_even_from_outside(tmp_path: Path) -> None:
    found = filled_registry(tmp_path)
    start = found.checkpoint("harbour/adapter")
    rewards = {"models/judge": "ee" * 32, "watched": "dd" * 32}
    inputs = {"parent": start.name, "parent_id": start.id, "rewards": rewards}
    settings = {"settings": {"kind": "ppo", "reward": [{"kind": "model", "from": "models/judge"}, {"kind": "judge"}]}}
    with (
        pytest.raises(AlignError),
        found.begin_run(
            recipe="harbour", stage="policy", kind="ppo", key="k", settings=settings, inputs=inputs, seed=0
        ),
    ):
        raise AlignError("proof at step 0: the ratio is 1.4")
    chain = gather(found, "harbour")
    assert "models/judge" in chain.outside.values()
    assert "watched" not in chain.outside.values(), "what is only watched made nothing"
    policy = next(stage for stage in chain.stages if stage.kind == "ppo")
    view = stage_view(policy, chain)
    assert view.sentence.startswith("Made from harbour/adapter for the reward of models/judge")
    assert "the ratio is 1.4" in view.problem


def test_rounds_and_estimator_are_facts_and_no_held_out_numbers() -> None:
    names = [change.name for change in changes(PPO, "ppo")]
    assert names[:2] == ["judge.score", "reward"]
    assert "rounds" not in names
    assert facts(PPO) == {"Rounds": 38, "Estimator": "gae"}
    by_name = {change.name: change for change in changes(PPO, "ppo")}
    assert by_name["kl"].meaning.about == "nats per token"
    assert by_name["watch.second"].meaning.label == "Watched: second"
    assert by_name["finished"].words(by_name["finished"].after) == "99.0%"
    assert by_name["reference_perplexity"].verdict == "none", "far from the reference is what a reward may ask for"


def test_a_default_estimator_is_no_chosen_setting() -> None:
    settings = PpoSettings(kind="ppo", prompts="p", reward="reward").model_dump(mode="json", by_alias=True)
    view = settings_view("ppo", settings)
    assert [setting.name for setting in view.chosen] == ["prompts", "reward"]
    assert "lambda: 0.95" in next(setting.default for setting in view.defaults if setting.name == "estimator")


def test_an_estimator_other_than_gae_is_named(tmp_path: Path) -> None:
    found = Registry.open(tmp_path / "home")
    add_stage(
        found, "policy", "ppo", ("m", "aa" * 32), settings={"estimator": {"kind": "rloo"}, "adapter": {}}, steps=1
    )
    chain = gather(found, "harbour")
    assert stage_view(chain.stages[0], chain).kind == "Proximal policy optimisation · RLOO"


def test_hostile_text_stays_text_wherever_a_ppo_run_has_any(tmp_path: Path) -> None:
    found = filled_registry(tmp_path)
    texts = [text.replace("\ud800", "?") for text in HOSTILE]
    metrics = {
        "proof": [{"check": text, "value": text, "limit": text, "holds": text} for text in texts],
        "guards": [{"round": text, "guard": text, "value": text, "limit": 1, "said": text} for text in texts],
        "stopped_by": texts[0], "estimator": texts[0],
    }  # fmt: skip
    told = [{"round": text, "text": text * 9, "reward": text} for text in texts]
    samples = [{"prompt": "p", "before": "b", "after": "a", "before_reward": texts[0], "over_time": told}]
    series = {step: {f"round.reward.{t}": 1.0 for t in texts} | {f"round.watch.{texts[0]}": 1.0} for step in (1, 2)}
    settings = {"guards": texts[0], "estimator": {"kind": texts[0]}, "kl_target": texts[0]}
    add_policy(found, metrics=metrics, samples=samples, rows=series, settings=settings)
    write_report(found, "harbour/policy", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text("utf-8")
    made = Page(text)
    assert not made.open, "every element is closed"
    assert len(made.all("script")) == 1
    assert not made.all("img")
    assert all(not key.startswith("on") for _, a in made.tags for key in a)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e]", text)
    assert made.text.count(HOSTILE[0]) > 5


def test_the_terminal_shows_the_headline_of_a_policy_and_what_stopped_it(registry: Registry) -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    print_table(stage_table([registry.checkpoint("harbour/policy")]), console)
    said = console.file.getvalue()
    assert re.search(r"policy +Judge's score +0\.780 +→ +0\.880 +\+0\.100 +better", said)
    assert "stopped by: kl" in said
    raised = registry.checkpoint("harbour/policy").metrics | {"stopped_by": None}
    record = type("Record", (), {"name": "x/y", "kind": "adapter", "recipe": {"kind": "ppo"}, "metrics": raised})()
    console.file = io.StringIO()
    print_table(stage_table([record]), console)
    assert "guards: kl, length" in console.file.getvalue()
