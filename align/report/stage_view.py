"""One stage of a chain as the page shows it: sentences, verdict, charts, samples and tables, all from the stage's record.

What a record does not have is left out; what it has beyond what is known here is shown under its own name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from align.report import comparisons, curves, words
from align.report.chain import Chain
from align.report.chips import WRONG, Chip, chip, marked
from align.report.critique_view import CritiqueView, critic_words, critique_view, told_apart
from align.report.curves import CurveChart
from align.report.data_view import DataView, data_views
from align.report.numbers import Change, bare, changes, facts, headline, parity
from align.report.ppo_curves import ppo_charts
from align.report.ppo_view import PpoView, ppo_view
from align.report.samples_view import MOST_SAMPLES, Sample, samples_view
from align.report.settings_view import SettingsView, settings_view
from align.report.stage_facts import StageFacts
from align.signs import Series, signs

KINDS = {
    "pretrain": "Pretraining",
    "sft": "Supervised fine-tuning",
    "reward": "Reward model",
    "dpo": "Direct preference optimisation",
    "ppo": "Proximal policy optimisation",
    "critique": "Critique and revision",
    "merge": "Adapter merge",
}
_CAPTIONS = {
    "length_buckets": ("Accuracy by length", "Where the chosen answer is the shorter, of like length, the longer one."),
    "calibration": ("Calibration", "On the dashed line confidence is deserved; below it the model is too sure."),
}


@dataclass(frozen=True)
class Figure:
    """A drawing with its title and the sentence that says how to read it."""

    title: str
    caption: str
    drawing: Markup


@dataclass(frozen=True)
class NumberRow:
    """One line of the table of held-out numbers."""

    change: Change
    chip: Chip
    chart: Markup


@dataclass(frozen=True)
class StageView:
    """All that the page says of one stage."""

    anchor: str
    name: str
    kind: str
    identifier: str
    sentence: str
    problem: str
    signs: Sequence[str]
    headline: Change | None
    chip: Chip
    headline_chart: Markup
    changes: Sequence[NumberRow]
    figures: Sequence[Figure]
    ppo: PpoView | None
    critique: CritiqueView | None
    sides: tuple[str, str]
    curves: Sequence[CurveChart]
    more_curves: Sequence[CurveChart]
    facts: Mapping[str, str]
    counts: Mapping[str, Mapping[str, str]]
    samples: Sequence[Sample]
    samples_left_out: int
    data: Sequence[DataView]
    settings: SettingsView
    origin: Mapping[str, str]
    versions: Mapping[str, str]


def stage_view(stage: StageFacts, chain: Chain) -> StageView:
    """The view of one stage; the chain gives the names of its parents."""
    record = stage.checkpoint
    metrics = _of_round(stage.metrics) if stage.round else stage.metrics
    main = headline(metrics, stage.kind)
    samples = samples_view(record.samples if record else ())
    is_ppo = stage.kind == "ppo"
    drawn, more = ppo_charts(stage.curves, stage.settings) if is_ppo else (curves.charts(stage.curves), [])
    return StageView(
        anchor=stage.key,
        name=stage.name,
        kind=_kind(stage),
        identifier=words.short(record.id) if record else "",
        sentence=_sentence(stage, chain),
        problem=_problem(stage),
        signs=list(signs(stage.kind, stage.settings, _log(stage)).values()),
        headline=main,
        chip=_stage_chip(stage, main, metrics),
        headline_chart=comparisons.whiskers(main) if main else Markup(""),
        changes=[
            NumberRow(one, chip(one), comparisons.whiskers(one))
            for one in changes(told_apart(metrics, stage.kind), stage.kind)
        ],
        figures=list(_figures(metrics)),
        ppo=ppo_view(metrics) if is_ppo else None,
        critique=critique_view(stage),
        sides=("First answers", "Last revisions") if stage.made else ("Before", "After"),
        curves=drawn,
        more_curves=more,
        facts={name: words.plain(value) for name, value in facts(metrics).items()},
        counts=_counts(metrics),
        samples=samples[:MOST_SAMPLES],
        samples_left_out=max(0, len(samples) - MOST_SAMPLES),
        data=data_views(stage),
        settings=settings_view(stage.kind, stage.settings),
        origin=_origin(stage),
        versions=_versions(stage),
    )


def _of_round(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """A round of a loop is there to lower the violation rate, whatever it trains with."""
    name = "judge.violation_rate"
    return ({"headline": name} if f"after.{name}" in metrics else {}) | dict(metrics)


def _versions(stage: StageFacts) -> dict[str, str]:
    found = stage.checkpoint.versions if stage.checkpoint else stage.made.info.get("versions") if stage.made else None
    return {str(name): str(version) for name, version in found.items()} if isinstance(found, Mapping) else {}


def _stage_chip(stage: StageFacts, main: Change | None, metrics: Mapping[str, Any]) -> Chip:
    if not stage.done:
        return Chip(stage.run.status if stage.run else "unfinished", "worse", WRONG)
    holds = parity(metrics)
    if holds is not None:
        return marked("parity holds" if holds else "parity broken", holds)
    return chip(main) if main else Chip("not measured", "none")


def _kind(stage: StageFacts) -> str:
    settings = stage.settings
    said = [KINDS.get(stage.kind, words.label(stage.kind))]
    estimator = settings.get("estimator")
    if isinstance(estimator, Mapping) and estimator.get("kind", "gae") != "gae":
        said.append(words.one_line(str(estimator["kind"]).upper(), 20))
    if settings.get("quantize"):
        said.append(f"QLoRA, {settings['quantize']}")
    elif settings.get("adapter"):
        said.append("LoRA")
    return " · ".join(said)


def _sentence(stage: StageFacts, chain: Chain) -> str:
    names = chain.outside | {other.key: other.name for other in chain.stages}
    parents = chain.parents.get(stage.key, ())
    named = [names.get(parent, parent) for parent in parents]
    if stage.kind == "critique":
        parts = _critique_parts(stage, named)
    else:
        made, judges = (named[:1], named[1:]) if stage.kind == "ppo" else (named, [])
        parts = [f"made from {' and '.join(made)}"] if made else []
        parts += [f"for the reward of {' and '.join(judges)}"] if judges else []
        parts += [f"on {_learnt_from(stage, chain)}"] if stage.checkpoint and stage.uses else []
    if seconds := _seconds(stage):
        parts.append(f"in {words.duration(seconds)}")
    sentence = " ".join(parts).rstrip(",")
    return f"{sentence[:1].upper()}{sentence[1:]}." if sentence else ""


def _critique_parts(stage: StageFacts, parents: Sequence[str]) -> list[str]:
    """parents: who answered, and the critic where that is another checkpoint."""
    asked = [f"to {use.rows:,} prompts of {use.name}" for use in stage.uses]
    by = parents[1] if len(parents) > 1 else critic_words(stage.settings)
    return [f"{' '.join([f'answers of {parents[0]}' if parents else 'answers', *asked])}, criticised by {by},"]


def _learnt_from(stage: StageFacts, chain: Chain) -> str:
    """The rows that were trained on, and those of other stages among them."""
    made = chain.makers.get(stage.key, {})
    own = [use for place, use in enumerate(stage.uses) if place == 0 or use.id not in made]
    parts = [use for use in stage.uses if use not in own]
    said = ", ".join(f"{use.rows:,} rows of {use.name}" for use in own)
    return said + (f" ({', '.join(f'{use.rows:,} of them of {use.name}' for use in parts)})" if parts else "")


def _problem(stage: StageFacts) -> str:
    if stage.done or not stage.run:
        return ""
    reason = stage.run.message or "no reason was recorded"
    what = "data" if stage.kind == "critique" else "checkpoint"
    return f"This stage made no {what}. Its run {words.short(stage.run.id)} is {stage.run.status}: {reason}"


def _log(stage: StageFacts) -> dict[str, Series]:
    names = ("train.loss", "train.grad_norm")
    return {name: [(row.step, row.value) for row in stage.curves if row.name == name] for name in names}


def _figures(metrics: Mapping[str, Any]) -> Iterator[Figure]:
    """Drawings of metrics that are lists; of one measured before and after, the latter."""
    for key, value in metrics.items():
        rows = [row for row in value if isinstance(row, Mapping)] if isinstance(value, list | tuple) else []
        if not rows or (key.startswith("before.") and f"after.{bare(key)}" in metrics):
            continue
        title, caption = _CAPTIONS.get(bare(key), (words.label(bare(key)), ""))
        if "bucket" in rows[0]:
            yield Figure(title, caption or "Whiskers are 95% intervals.", comparisons.buckets(rows, title))
        elif "confidence" in rows[0]:
            yield Figure(title, caption, comparisons.calibration(rows, title))


def _counts(metrics: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Metrics that are mappings of several counts (token lengths, say): a small table each."""
    found = {}
    for key, value in metrics.items():
        if isinstance(value, Mapping) and "value" not in value:
            found[words.label(key)] = {words.label(name): words.counted(part) for name, part in value.items()}
            found[words.label(key)] |= _trained_share(value)
    return found


def _trained_share(counts: Mapping[str, Any]) -> dict[str, str]:
    trained, tokens = counts.get("trained_tokens"), counts.get("tokens")
    if isinstance(trained, int) and isinstance(tokens, int) and tokens > 0:
        return {"Share of tokens trained": words.number(trained / tokens, share=True)}
    return {}


def _seconds(stage: StageFacts) -> float | None:
    start = words.moment(stage.run.started) if stage.run else None
    end = words.moment(stage.run.ended) if stage.run and stage.run.ended else None
    return (end - start).total_seconds() if start and end else None


def _origin(stage: StageFacts) -> dict[str, str]:
    record, run = stage.checkpoint, stage.run
    seconds = _seconds(stage)
    said = {
        "Checkpoint": record.id if record else "",
        "Form": record.kind if record else "",
        "Tags": ", ".join(record.tags) if record else "",
        "Folder": str(record.path) if record else "",
        "Template SHA-256": (record.template_sha256 or "") if record else "",
        **_data_ids(stage),
        "Run": run.id if run else "",
        "Seed": str(run.seed) if run else "",
        "Started": words.day(run.started) if run else "",
        "Took": words.duration(seconds) if seconds is not None else "",
        "Machine": run.host if run else "",
        "Cache key": run.key if run else "",
    }
    return {name: value for name, value in said.items() if value}


def _data_ids(stage: StageFacts) -> dict[str, str]:
    """Ids of the data sets that a stage made, and of what it made them by."""
    if not stage.made:
        return {}
    outputs = {f"Data set {name}": record.id for name, record in stage.made.outputs.items()}
    told = stage.made.info.get("ingredients")
    constitution = told.get("constitution") if isinstance(told, Mapping) else ""
    return outputs | {"Constitution SHA-256": str(constitution or "")}
