"""The report of critique stages and loops: where they stand in the chain, what became of rows, and the rounds as a curve."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from align.errors import AlignError
from align.registry import Registry
from align.report import comparisons
from align.report.chain import gather
from align.report.critique_view import critique_view, told_apart
from align.report.numbers import Number, changes, headline, meaning_of
from align.report.page import write_report
from align.report.rounds_view import loop_view
from align.report.stage_view import stage_view
from tests.report_chain import HOSTILE, add_data, add_stage, estimate
from tests.report_loop import BASE, COUNTS, METRICS, SAMPLES, add_critique, add_round, judged, looped_registry
from tests.test_report import Page


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return looped_registry(tmp_path_factory.mktemp("loop"))


@pytest.fixture(scope="module")
def page(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Page:
    out = tmp_path_factory.mktemp("page") / "report.html"
    write_report(registry, "loop", out)
    return Page(out.read_text("utf-8"))


def names(registry: Registry, target: str) -> list[str]:
    return [stage.short_name for stage in gather(registry, target).stages]


def test_a_critique_stage_stands_between_its_parent_and_what_trained_on_its_rows(
    registry: Registry, page: Page
) -> None:
    assert names(registry, "loop") == [
        "sft", "aligned.1.critique", "aligned.1", "aligned.2.critique", "aligned.2", "revised", "more",
    ]  # fmt: skip
    labels = " ".join(a["aria-label"] or "" for a in page.all("svg"))
    assert "aligned.1 from sft" in labels
    for edge in (
        "aligned.1.critique from sft",
        "aligned.1.critique from questions",
        "aligned.1 from aligned.1.critique",
    ):
        assert f"{edge};" in labels, edge
    assert "critique.sft" not in labels, "a made data set is no box of its own"
    assert "align…2.critique" in page.text, "names of rounds are told apart in their boxes"


def test_made_rows_lead_to_the_mixture_that_they_are_part_of(page: Page) -> None:
    labels = " ".join(a["aria-label"] or "" for a in page.all("svg"))
    assert "mix from revised" in labels
    assert "more from mix" in labels
    assert "more from revised" not in labels
    assert "on 500 rows of mix (44 of them of revised.sft)" in page.text


def test_a_checkpoint_brings_the_critique_stages_behind_its_rows(registry: Registry) -> None:
    assert names(registry, "loop/aligned.1") == ["sft", "aligned.1.critique", "aligned.1"]
    assert names(registry, "loop/more") == ["sft", "aligned.1.critique", "aligned.1", "revised", "more"]
    assert names(registry, "loop/revised") == ["sft", "aligned.1.critique", "aligned.1", "revised"]
    run = next(run for run in registry.all_runs() if run.stage == "aligned.2.critique")
    chain = gather(registry, run.id)
    assert chain.stages[-1].made is not None
    assert chain.title == "loop/aligned.2.critique"


def test_the_name_of_a_loop_stands_for_the_round_that_it_kept(registry: Registry) -> None:
    assert names(registry, "loop/aligned") == ["sft", "aligned.1.critique", "aligned.1"]
    (loop,) = gather(registry, "loop").loops
    assert (loop.name, list(loop.rounds), loop.kept, loop.planned) == ("loop/aligned", [1, 2], 1, 3)
    (shorter,) = gather(registry, "loop/aligned.1").loops
    assert (list(shorter.rounds), shorter.kept) == ([1], 1)


def test_a_loop_is_shown_round_by_round_from_its_start(registry: Registry, page: Page) -> None:
    view = loop_view(gather(registry, "loop").loops[0])
    assert [(row.name, row.kept, row.rows) for row in view.rounds] == [
        ("Start", False, ""), ("Round 1", True, "60"), ("Round 2", False, "60"),
    ]  # fmt: skip
    assert [row.cells[0].value for row in view.rounds] == ["40.0%", "10.0%", "12.0%"]
    assert view.rounds[1].cells[0].interval == "7.0 to 13.0%"
    assert (view.headline.before.value, view.headline.after.value, view.headline.verdict) == (0.4, 0.1, "better")
    assert [curve.title for curve in view.curves] == ["Answers with a violation", "Correct answers"]
    assert view.curves[0].drawing.count('class="whisker after"') == 3
    assert view.curves[0].drawing.count('class="ring"') == 1, "the round that is kept, and no other"
    assert "Answers with a violation: start 40.0%; round 1 10.0%; round 2 12.0%" in view.curves[0].drawing
    said = "2 rounds of 3 at most. Round 1 is kept. Answers with a violation: 40.0% at the start, 10.0% after it."
    assert said in page.text


def test_without_a_judge_a_loop_shows_what_its_critics_found(tmp_path: Path) -> None:
    found = Registry.open(tmp_path / "home")
    prompts = add_data(found, tmp_path, "questions")
    parent = add_stage(found, "sft", "sft", BASE, steps=1, recipe="loop")
    for number, rate in ((1, 0.5), (2, 0.2), (3, 0.25)):  # the third finds that the second round was the last
        metrics = {"before.critic.violation_rate": estimate(rate, 0.05)}
        made = add_critique(found, f"aligned.{number}.critique", parent, prompts, metrics=metrics)
        if number < 3:
            parent = add_stage(
                found, f"aligned.{number}", "sft", (parent.name, parent.id), data=[made["sft"]], steps=1, recipe="loop"
            )
    (loop,) = gather(found, "loop").loops
    view = loop_view(loop)
    assert [meaning.label for meaning in view.columns] == ["Answers that the critic objects to"]
    assert [row.cells[0].value for row in view.rounds] == ["50.0%", "20.0%", "25.0%"]
    assert "None of them is kept." in view.sentence
    assert view.headline is None
    write_report(found, "loop", tmp_path / "page.html")
    assert "none kept" in Page((tmp_path / "page.html").read_text("utf-8")).text


def test_rounds_of_an_earlier_run_of_a_loop_are_left_out(tmp_path: Path) -> None:
    found = Registry.open(tmp_path / "home")
    prompts = add_data(found, tmp_path, "questions")
    sft = add_stage(found, "sft", "sft", BASE, steps=1, recipe="loop")
    old = add_stage(found, "aligned.1", "sft", (sft.name, sft.id), steps=1, recipe="loop", metrics=judged(0.4, 0.3))
    add_round(found, 2, old, prompts, 0.3, 0.2)
    with found.begin_run(
        recipe="loop", stage="aligned.1", kind="dpo", key="k", seed=0, settings={}, inputs={"parent_id": sft.id}
    ) as run:
        (run.artifact / "model.safetensors").write_text("another first round")
        new = run.finish_checkpoint(
            name="loop/aligned.1", kind="model", parents=[sft.id], data=[], metrics=judged(0.4, 0.41), versions={}
        )
    found.name_again(new, "loop/aligned")
    assert names(found, "loop") == ["sft", "aligned.1"]
    assert list(gather(found, "loop").loops[0].rounds) == [1]


def test_what_became_of_the_prompts_is_said_in_sentences_and_adds_up(registry: Registry) -> None:
    stage = next(stage for stage in gather(registry, "loop").stages if stage.short_name == "revised")
    view = critique_view(stage)
    assert [(part.said, part.count) for part in view.parts] == [
        ("revised", "60"),
        ("answered, and not revised", "1"),
        ("the critic found nothing", "30"),
        ("the revision holds parts of the request", "7"),
        ("the critic prefers the answer to its revision", "2"),
    ]
    assert sum(int(part.count) for part in view.parts) == COUNTS["prompts"]
    assert view.comparisons.startswith("50 pairs of answers were compared; 4 of them (8.0%) stayed undecided")
    assert view.outputs == {"Made: sft": "60 rows and 20 held out", "Made: preferences": "60 rows and 20 held out"}


def test_principles_have_counts_and_what_the_judge_says_of_them(registry: Registry) -> None:
    view = critique_view(gather(registry, "loop").stages[1])
    rows = {one.name: one for one in view.principles}
    assert list(rows) == ["calm", "plain", "kind"], "those of the constitution first"
    assert (rows["calm"].asked, rows["calm"].found, rows["calm"].revised) == ("99", "45", "40")
    widths = re.findall(r'width="([\d.]+)"[^>]*class="(dropped|kept)"', rows["plain"].bar)
    assert [(style, round(float(width))) for width, style in widths] == [("dropped", 89), ("kept", 71)], "25, 20 of 45"
    assert (rows["calm"].change.before.value, rows["calm"].change.after.value) == (0.3, 0.05)
    assert rows["plain"].change is None
    assert rows["plain"].rates == ""
    assert rows["kind"].asked == "", "the critic was never asked about it"


def test_the_critic_is_held_against_the_judge_apart_from_the_held_out_numbers(registry: Registry, page: Page) -> None:
    chain = gather(registry, "loop")
    view = stage_view(chain.stages[1], chain)
    assert [(one.value, one.interval, one.n) for one in view.critique.critic] == [
        ("47.0%", "39.0 to 55.0%", "137"), ("61.0%", "52.0 to 70.0%", "106"), ("93.7%", "92.7 to 94.7%", "1,794"),
    ]  # fmt: skip
    listed = [row.change.name for row in view.changes]
    assert listed == ["judge.violation_rate", "critic.violation_rate", "words", "distinct", "critic.preferred"]
    assert view.sides == ("First answers", "Last revisions")
    assert told_apart(METRICS, "sft") == METRICS
    assert "The critic, held against the judge" in page.text
    assert page.text.count("Objections that are right") == 3, "once for each critique stage"


def test_samples_show_each_step_and_why_a_row_is_kept_apart(registry: Registry, page: Page) -> None:
    first, second = critique_view(gather(registry, "loop").stages[1]).samples
    assert [(step.principle, step.revision) for step in first.steps] == [("plain", None), ("calm", "By the pump.")]
    assert (first.fault, first.preferred, first.answer_verdict.style) == (None, "87.5%", "worse")
    assert second.fault.text == "the revision holds parts of the request"
    assert second.steps[0].fault.text == second.fault.text
    assert second.answer_verdict is None
    assert "First answer ✗ correct, breaks calm By the pump, you oaf." in page.text
    assert "calm Critique It insults. Revision By the pump." in page.text
    assert "Kept apart ✗ the revision holds parts of the request" in page.text


def test_of_many_samples_some_that_are_kept_apart_are_always_shown(tmp_path: Path) -> None:
    found = Registry.open(tmp_path / "home")
    prompts = add_data(found, tmp_path, "questions")
    parent = add_stage(found, "sft", "sft", BASE, steps=1, recipe="loop")
    add_critique(found, "revised", parent, prompts, samples=[*SAMPLES[:1] * 20, *SAMPLES[1:] * 5])
    view = critique_view(gather(found, "loop").stages[1])
    assert [bool(sample.fault) for sample in view.samples] == [False] * 6 + [True] * 2


def test_who_criticised_is_said(page: Page, tmp_path: Path) -> None:
    assert "Answers of loop/sft to 100 prompts of questions, criticised by itself" in page.text
    assert "Answers of loop/aligned.1 to 100 prompts of questions, criticised by loop/sft" in page.text
    dashed = [a for a in page.all("path") if a.get("class") == "edge dashed"]
    assert len(dashed) == 2, "the critic's arrow in both drawings, and no other"
    found = Registry.open(tmp_path / "home")
    prompts = add_data(found, tmp_path, "questions")
    parent = add_stage(found, "sft", "sft", BASE, steps=1, recipe="loop")
    critic = {"kind": "endpoint", "url": "http://localhost:8000/v1", "model": "big"}
    add_critique(found, "revised", parent, prompts, settings={"critic": critic})
    chain = gather(found, "loop")
    assert ", criticised by big at http://localhost:8000/v1, in" in stage_view(chain.stages[1], chain).sentence


def test_data_that_a_stage_made_names_it_and_not_all_that_it_says(page: Page) -> None:
    assert "Made by loop/aligned.1.critique" in page.text
    assert "template_sha256:" not in page.text


def test_a_failed_critique_stage_shows_with_its_reason(tmp_path: Path) -> None:
    found = Registry.open(tmp_path / "home")
    parent = add_stage(found, "sft", "sft", BASE, steps=1, recipe="loop")
    inputs = {"parent": parent.name, "parent_id": parent.id, "data": {}}
    with (
        pytest.raises(AlignError),
        found.begin_run(recipe="loop", stage="revised", kind="critique", key="k", settings={}, inputs=inputs, seed=0),
    ):
        raise AlignError("the endpoint answered 401")
    write_report(found, "loop", tmp_path / "page.html")
    said = Page((tmp_path / "page.html").read_text("utf-8")).text
    assert "Without data: revised." in said
    assert "This stage made no data." in said
    assert "the endpoint answered 401" in said


def test_a_round_is_headed_by_the_violation_rate_and_names_have_their_words() -> None:
    assert headline(METRICS, "critique").name == "judge.violation_rate"
    unjudged = {key: value for key, value in METRICS.items() if "judge" not in key}
    assert headline(unjudged, "critique").name == "critic.violation_rate"
    known = {
        "critic.violation_rate": "Answers that the critic objects to",
        "words": "Length of answers",
        "judge.answered_rightly": "Right, of what should be answered",
    }
    assert {name: meaning_of(name, "critique").label for name in known} == known
    assert meaning_of("distinct", "critique").about.startswith("of words")
    assert {c.name: c.verdict for c in changes(METRICS, "critique")}["words"] == "none", "shorter is no better"


def test_rounds_are_headed_by_what_a_loop_is_there_to_lower(registry: Registry) -> None:
    chain = gather(registry, "loop")
    heads = {stage.short_name: stage_view(stage, chain).headline.name for stage in chain.stages}
    assert heads["sft"] == "judge.correct"
    assert heads["aligned.2"] == "judge.violation_rate"


def test_curves_and_bars_bear_what_is_missing() -> None:
    assert comparisons.by_round([(0, Number(0.4))], 0, "x") == "", "one point is no curve"
    assert comparisons.by_round([(0, Number(0.4)), (1, Number(math.nan))], None, "x") == ""
    flat = comparisons.by_round([(0, Number(0.0, 0.0, 0.0)), (2, Number(0.0, 0.0, 0.0))], None, "x")
    assert "nan" not in flat
    assert 'class="ring"' not in flat
    assert comparisons.side_bars(None, Number(0.5), 1.0, "x").count("<rect") == 1


def test_page_is_whole_links_lead_somewhere_and_drawings_have_words(page: Page) -> None:
    assert not page.open, "every element is closed"
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"].removeprefix("#") for a in page.all("a") if a["href"]} <= set(ids)
    assert all(a.get("role") == "img" and a.get("aria-label") for a in page.all("svg"))
    assert all(a.get("scope") for a in page.all("th"))
    assert len(page.all("table")) == len(page.all("caption"))
    assert not any("style" in a for _, a in page.tags), "an inline style would be refused by the policy"


def test_hostile_text_stays_text_wherever_a_critique_stage_has_any(tmp_path: Path) -> None:
    found = Registry.open(tmp_path / "home")
    texts = [text.replace("\ud800", "?") for text in HOSTILE]
    prompts = add_data(found, tmp_path, "questions")
    parent = add_stage(found, "sft", "sft", BASE, steps=1, recipe="loop")
    steps = [{"principle": t, "critique": t, "revision": t, "fault": t} for t in texts]
    samples: list[Any] = [
        {"prompt": t, "answer": t, "final": t, "fault": t, "preferred": t, "steps": steps, "before_verdict": t}
        for t in texts
    ]
    counts = {
        "prompts": texts[0], "revised": 3, "apart": dict.fromkeys(texts, 2), "comparisons": 4, "undecided": texts[0],
        "principles": {t: {"asked": 3, "found": 2, "revised": t} for t in texts},
    }  # fmt: skip
    metrics = {f"{when}.judge.violation.{t}": 0.5 for t in texts for when in ("before", "after")} | {texts[0]: texts[0]}
    critic = {"kind": "endpoint", "url": texts[1], "model": texts[0]}
    made = add_critique(
        found, "aligned.1.critique", parent, prompts, counts=counts, metrics=metrics, samples=[*samples, 3, {"steps": 3}],
        settings={"critic": critic},
    )  # fmt: skip
    add_stage(found, "aligned.1", "sft", (parent.name, parent.id), data=[made["sft"]], metrics=judged(0.4, 0.1), steps=1, recipe="loop")  # fmt: skip
    write_report(found, "loop", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text("utf-8")
    page = Page(text)
    assert not page.open
    assert len(page.all("script")) == 1
    assert not page.all("img")
    assert all(not key.startswith("on") for _, a in page.tags for key in a)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e]", text)
    assert page.text.count(HOSTILE[0]) > 20
    with_nothing = add_critique(found, "empty", parent, prompts, counts={}, metrics={}, samples=[])
    assert with_nothing
    write_report(found, "loop/empty", tmp_path / "page.html")


def test_the_page_needs_no_torch() -> None:
    code = "import sys, align.report.page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
