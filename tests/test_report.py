"""The report page: what it says of a chain, that it stays small and whole, and that nothing from data acts in it."""

from __future__ import annotations

import base64
import hashlib
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from align.errors import AlignError
from align.registry import MetricRow, Registry
from align.report import curves, lineage, svg, words
from align.report.chain import gather
from align.report.numbers import Change, Meaning, Number, changes, headline
from align.report.page import write_report
from tests.report_chain import HOSTILE, add_stage, filled_registry

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return filled_registry(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "report.html"
    write_report(registry, "harbour", out)
    return out


class Page(HTMLParser):
    """Tags with their attributes, and the text outside of style and script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.said: list[str] = []
        self.inside: dict[str, str] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1:] == [tag], f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("style", "script"):
            self.inside[self.open[-1]] = data
        else:
            self.said.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.said).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_page_is_whole_small_and_asks_for_nothing(page: Path) -> None:
    text = page.read_text("utf-8")
    found = Page(text)
    assert not found.open, "every element is closed"
    assert page.stat().st_size < 400_000
    assert not {"link", "img", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in found.tags}
    requests = [value for _, a in found.tags for key, value in a.items() if key in ("src", "href", "srcset", "action")]
    assert all(value and value.startswith("#") for value in requests)
    assert "url(" not in found.inside["style"]
    assert "@import" not in found.inside["style"]


def test_links_lead_to_stages_and_ids_are_unique(page: Path) -> None:
    found = Page(page.read_text("utf-8"))
    ids = [a["id"] for _, a in found.tags if "id" in a]
    assert len(ids) == len(set(ids))
    links = {a["href"].removeprefix("#") for a in found.all("a") if a["href"]}
    assert links <= set(ids)
    assert len(links) == 6


def test_policy_lets_through_our_style_and_script_only(page: Path) -> None:
    found = Page(page.read_text("utf-8"))
    policy = next(a["content"] or "" for a in found.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(found.inside[tag].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
        assert len(found.all(tag)) == 1


def test_page_says_what_was_made_and_what_improved(page: Path) -> None:
    said = Page(page.read_text("utf-8")).text
    assert "5 stages from data/harbour/model. Improved on held-out rows: sft, adapter and reward." in said
    assert "Not to be told from before: aligned." in said
    assert "parity holds" in said
    assert "75.6 to 86.4%" in said  # the interval stands beside its number
    assert "Mara keeps it, and she asks that you knock first." in said
    assert "12 prompts occur in both halves" in said
    assert "Pairs of equal answers 40 (1.5%)" in said
    assert "Share of tokens trained 43.3%" in said
    assert "Answers against Calm" in said


def test_drawings_have_words_and_tables_have_headers(page: Path) -> None:
    found = Page(page.read_text("utf-8"))
    drawings = found.all("svg")
    assert len(drawings) > 30
    assert all(a.get("role") == "img" and a.get("aria-label") for a in drawings)
    assert all(a.get("scope") for a in found.all("th"))
    assert len(found.all("table")) == len(found.all("caption"))
    labels = " ".join(a["aria-label"] or "" for a in drawings)
    assert "sft from model; adapter from sft; reward from sft; aligned from adapter" in labels
    assert not any("style" in a for _, a in found.tags), "an inline style would be refused by the policy"


def test_settings_differing_from_their_default_come_first(page: Path) -> None:
    said = Page(page.read_text("utf-8")).text
    first, all_of_it = said.index("learning_rate"), said.index("All that stayed at its default")
    assert said.index("epochs") < all_of_it
    assert first < all_of_it
    assert "beta Pull towards the reference; small is weak. (SimPO's papers use 2.) 0.3 0.1" in said


def test_hostile_text_is_shown_and_stays_text(registry: Registry, tmp_path: Path) -> None:
    write_report(registry, "hostile", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_bytes().decode("utf-8")
    found = Page(text)
    assert len(found.all("script")) == 1
    assert not found.all("img")
    assert all(not key.startswith("on") for _, a in found.tags for key in a)
    for hostile in HOSTILE[:5]:
        assert hostile in found.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e]", text)
    assert "{{ 7*7 }} {% raw %} ${7*7}" in found.text


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the page in")
@pytest.mark.parametrize("recipe", ["hostile", "harbour"])
def test_a_browser_runs_nothing_from_data_and_all_of_ours(registry: Registry, tmp_path: Path, recipe: str) -> None:
    out = tmp_path / "page.html"
    write_report(registry, recipe, out)
    dom = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--no-first-run", f"--user-data-dir={tmp_path / 'profile'}",
         "--enable-logging=stderr", "--dump-dom", out.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert re.search(r"<title>(.*?)</title>", dom.stdout)[1] == f"{recipe} · align report"
    assert 'class="readout"' in dom.stdout, "our script ran under the policy"
    assert "CONSOLE" not in dom.stderr, "neither an error nor a refusal by the policy"


def test_a_failed_run_shows_with_its_reason(registry: Registry, tmp_path: Path) -> None:
    write_report(registry, "hostile", tmp_path / "page.html")
    said = Page((tmp_path / "page.html").read_text("utf-8")).text
    assert "Without a checkpoint: next." in said
    assert "is failed: " + HOSTILE[1] in said


def test_a_checkpoint_brings_its_ancestors_and_no_others(registry: Registry) -> None:
    assert [stage.name for stage in gather(registry, "harbour/aligned").stages] == [
        "harbour/sft", "harbour/adapter", "harbour/aligned",
    ]  # fmt: skip
    chain = gather(registry, "harbour")
    assert [stage.name.rpartition("/")[2] for stage in chain.stages] == [
        "sft",
        "adapter",
        "reward",
        "aligned",
        "merged",
    ]
    run = registry.checkpoint("harbour/adapter").run
    assert [stage.name for stage in gather(registry, run).stages] == ["harbour/sft", "harbour/adapter"]


def test_an_unknown_target_is_refused_with_what_there_is(registry: Registry) -> None:
    with pytest.raises(AlignError, match=r"harbuor.*\n.*Did you mean 'harbour'"):
        gather(registry, "harbuor")


def test_a_newer_checkpoint_takes_the_place_of_the_older(tmp_path: Path) -> None:
    found = Registry.open(tmp_path / "home")
    add_stage(found, "sft", "sft", ("base", "aa" * 32), metrics={"after.loss": 3.0}, steps=2)
    newer = add_stage(found, "sft", "dpo", ("base", "aa" * 32), metrics={"after.loss": 2.0}, steps=2)
    stages = gather(found, "harbour").stages
    assert [stage.checkpoint.number for stage in stages if stage.checkpoint] == [newer.number]


@pytest.mark.parametrize(
    ("before", "after", "paired", "verdict"),
    [
        (Number(1.0, 0.9, 1.1), Number(0.5, 0.4, 0.6), None, "better"),
        (Number(1.0, 0.9, 1.1), Number(1.5, 1.4, 1.6), None, "worse"),
        (Number(1.0, 0.9, 1.1), Number(0.95, 0.85, 1.05), None, "unclear"),
        (Number(1.0, 0.9, 1.1), Number(0.95, 0.85, 1.05), Number(-0.05, -0.06, -0.04), "better"),
        (Number(1.0, 0.9, 1.1), Number(0.5, 0.4, 0.6), Number(-0.5, -1.1, 0.1), "unclear"),
        (Number(1.0), Number(1.0), None, "same"),
        (Number(1.0), Number(math.nan), None, "none"),
        (None, Number(1.0), None, "none"),
    ],
)
def test_a_change_is_called_better_only_when_intervals_tell(before, after, paired, verdict) -> None:
    assert Change("loss", Meaning("Loss", "lower"), before, after, paired).verdict == verdict


def test_headline_is_the_number_of_the_kind_or_the_one_that_is_named() -> None:
    metrics = {"before.loss": 2.0, "after.loss": 1.0, "before.x": 1, "after.x": 2}
    assert headline(metrics, "sft").name == "loss"
    assert headline({**metrics, "headline": "x"}, "sft").name == "x"
    assert headline({"after.lengths": {"rows": 1}, "note": "text"}, "sft") is None
    assert [change.name for change in changes(metrics, "unheard-of")] == ["loss", "x"]


def test_thinning_keeps_ends_and_every_spike() -> None:
    points = [(float(step), 1.0) for step in range(10_000)]
    points[7321] = (7321.0, 99.0)
    thinned = svg.thin(points, 160)
    assert len(thinned) <= 160
    assert thinned[0] == points[0]
    assert thinned[-1] == points[-1]
    assert (7321.0, 99.0) in thinned
    assert thinned == sorted(thinned)


def test_a_long_run_draws_small_and_a_broken_value_is_marked() -> None:
    rows = [MetricRow(step, "train.loss", math.nan if step == 500 else math.sin(step)) for step in range(20_000)]
    rows += [MetricRow(step, "train.epoch", step / 9) for step in range(5)] + [MetricRow(1, "eval.f1", 1.0)]
    found = curves.charts(rows)
    assert [chart.title for chart in found] == ["Loss"], "a lone point is no curve, and an epoch no metric"
    assert len(found[0].drawing) < 8_000
    assert found[0].drawing.count("×") == 1
    assert curves.charts([MetricRow(step, "train.loss", math.nan) for step in range(3)])[0].drawing.count("<path") == 0


def test_a_moving_mean_is_the_mean_of_its_window() -> None:
    points = [(float(step), float(step % 2)) for step in range(81)]
    means = curves.moving_mean(points)
    assert [y for _, y in means][:2] == [0.0, pytest.approx(1 / 3)], "the window narrows at the ends"
    window = [y for _, y in points[38:43]]
    assert means[40] == (40.0, pytest.approx(sum(window) / 5))


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_text_can_be_read_in_light_and_dark(page: Path) -> None:
    style = Page(page.read_text("utf-8")).inside["style"]
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in style.split("prefers-color-scheme: dark")[:2]
    )
    pairs = [(ink, on) for on in ("paper", "sheet", "soft") for ink in ("ink", "quiet")]
    pairs += [(name, f"{name}-soft") for name in ("blue", "rust", "ochre")] + [("blue", "paper")]
    pairs += [(ink, f"{name}-soft") for name in ("blue", "rust", "ochre") for ink in ("ink", "quiet")]
    for colours in (light, dark):
        for ink, ground in pairs:
            low, high = sorted((luminance(colours[ink]), luminance(colours[ground])))
            assert (high + 0.05) / (low + 0.05) >= 4.5, f"{ink} on {ground} (WCAG 2.2, 1.4.3)"


def test_round_marks_and_their_words() -> None:
    assert svg.ticks(0.0, 1.0) == [0.0, 0.5, 1.0]
    assert svg.tick_words([0.0, 0.5, 1.0]) == ["0.0", "0.5", "1.0"]
    assert svg.tick_words([0.0, 5e-5, 1e-4]) == ["0", "5e−5", "1e−4"]
    assert svg.ticks(3.0, 3.0) == [3.0]


def test_elements_escape_texts_and_attributes() -> None:
    made = svg.element("text", '<b>"&', aria_label='"><script>')
    assert str(made) == '<text aria-label="&#34;&gt;&lt;script&gt;">&lt;b&gt;&#34;&amp;</text>'


def test_lineage_stands_parents_before_children_whatever_the_order() -> None:
    nodes = [lineage.Node(name, "stage", name) for name in "dcba"]
    placed = lineage.layout(nodes, [("a", "b"), ("b", "c"), ("a", "d"), ("c", "d"), ("x", "a")])
    assert [placed.rank[name] for name in "abcd"] == [0, 1, 2, 3]
    assert len(placed.routes["a", "d"]) == 4, "an edge that crosses two ranks holds a place in each"
    spots = {(placed.rank[key], placed.across[key]) for key in placed.rank}
    assert len(spots) == len(placed.rank), "no two share a place"
    loop = lineage.layout(nodes, [("a", "b"), ("b", "a")])
    assert set("abcd") <= set(loop.rank), "a cycle in a broken registry still ends"


def test_words_for_numbers() -> None:
    assert [words.number(v) for v in (0, 12345, 1.23456, 0.00002, -0.5, 45.678)] == [
        "0", "12,345", "1.235", "2.0e−5", "−0.500", "45.68",
    ]  # fmt: skip
    assert words.number(0.8712, share=True) == "87.1%"
    assert words.signed(0.12, share=True) == "+12.0 points"
    assert [words.duration(s) for s in (3.21, 38, 252, 3900)] == ["3.2 s", "38 s", "4 min 12 s", "1 h 05 min"]


def test_command_writes_the_newest_recipe_and_refuses_an_empty_registry(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from align.cli.report import report_command

    refused = CliRunner().invoke(report_command, ["--out", str(tmp_path / "no.html")])
    assert isinstance(refused.exception, AlignError)
    assert not (tmp_path / "no.html").exists()
    monkeypatch.setenv("ALIGN_HOME", str(registry.home))
    out = tmp_path / "new" / "page.html"
    done = CliRunner().invoke(report_command, ["--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "<title>hostile" in out.read_text("utf-8")
    recipe = tmp_path / "some.yaml"
    recipe.write_text("name: harbour\nmodel: m\ndata: {d: x.jsonl}\nstages: {sft: {kind: sft, data: d}}\n")
    assert CliRunner().invoke(report_command, [str(recipe), "--out", str(out)]).exit_code == 0
    assert "<title>harbour" in out.read_text("utf-8")
    assert list(out.parent.iterdir()) == [out]
