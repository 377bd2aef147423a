"""Held-out numbers of a checkpoint, read from its flat metrics: what was measured before and after, and what that says.

Names are `before.<name>`, `after.<name>` and (a paired difference, where a stage gives one) `change.<name>`; a value is
a number or {"value", "low", "high", "n"}. What is known about a name (words, unit, direction) stands in `KNOWN`; an
unknown name is shown under its own. Tables and charts are made elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from align.report import words

Direction = Literal["higher", "lower", "none"]
Verdict = Literal["better", "worse", "unclear", "same", "none"]


@dataclass(frozen=True)
class Number:
    """A value, its 95% interval where one was measured, and the count of rows behind it."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Both ends of the interval, or None."""
        return None if self.low is None or self.high is None else (self.low, self.high)


@dataclass(frozen=True)
class Meaning:
    """What is known about a metric: its words, which direction is good, whether it is a share of one."""

    label: str
    better: Direction = "none"
    share: bool = False
    about: str = ""


KNOWN: dict[str, Meaning] = {
    "loss": Meaning("Loss", "lower", about="nats per trained token"),
    "perplexity": Meaning("Perplexity", "lower", about="exp of the loss"),
    "accuracy": Meaning("Preference accuracy", "higher", True, "share of pairs in which chosen wins"),
    "margin": Meaning("Margin", "higher", about="chosen minus rejected"),
    "reward": Meaning("Reward", "higher"),
    "kl": Meaning("KL from parent", about="nats; how far the answers moved"),
    "ece": Meaning("Calibration error", "lower", about="gap of confidence and accuracy"),
    "length_correlation": Meaning("Correlation with length", about="0: length buys no reward"),
    "top1_agreement": Meaning("Top-1 agreement", "higher", True, "same next token as the unmerged model"),
    "compared": Meaning("Tokens compared"),
    "max_kl": Meaning("KL allowed", about="nats per token"),
    "tokens": Meaning("Trained tokens per row"),
    "likelihood_accuracy": Meaning("Chosen is the likelier", "higher", True, "share of pairs"),
    "reward_chosen": Meaning("Implicit reward of chosen"),
    "reward_rejected": Meaning("Implicit reward of rejected"),
    "kl_sequence": Meaning("KL from parent, per answer", about="nats"),
    "win_rate": Meaning("Win rate", "higher", True),
    "exact_match": Meaning("Exact match", "higher", True),
    "f1": Meaning("F1", "higher", True),
    "bleu": Meaning("BLEU", "higher"),
    "length": Meaning("Length of answers", about="tokens"),
    "finished": Meaning("Finished answers", "higher", True, "stopped by itself, not cut off"),
    "distinct": Meaning("Distinct 3-grams", "none", True, "over all answers; falls when they become alike"),
    "reference_perplexity": Meaning(
        "Perplexity under the parent", about="of the answers; high: no longer its language"
    ),
    "judge.correct": Meaning("Correct answers", "higher", True, "by the judge"),
    "judge.score": Meaning("Judge's score", "higher", about="0 to 1"),
    "judge.violations": Meaning("Violations", "lower", about="per answer, by the judge"),
    "judge.violation_rate": Meaning("Answers with a violation", "lower", True, "by the judge"),
    "judge.refused_rightly": Meaning("Refused, of what should be", "higher", True, "by the judge"),
    "judge.refused_wrongly": Meaning("Refused, of what should be answered", "lower", True, "by the judge"),
    "judge.refused": Meaning("Refusals", "none", True, "by the judge"),
    "judge.answered_rightly": Meaning("Right, of what should be answered", "higher", True, "by the judge"),
    "critic.violation_rate": Meaning("Answers that the critic objects to", "lower", True, "under any principle"),
    "critic.preferred": Meaning("Revisions that the critic prefers", "higher", True, "to the answers they came from"),
    "critic.precision": Meaning("Objections that are right", "higher", True, "precision; the judge objects too"),
    "critic.recall": Meaning("Violations that it finds", "higher", True, "recall; of those that the judge sees"),
    "critic.accuracy": Meaning("Verdicts like the judge's", "higher", True, "accuracy; over all looks"),
    "words": Meaning("Length of answers", about="words"),
}
OF_KIND: dict[tuple[str, str], Meaning] = {
    ("merge", "kl"): Meaning("KL to the unmerged model", "lower", about="nats per token"),
    ("reward", "loss"): Meaning("Loss", "lower", about="nats per pair"),
    ("ppo", "reward"): Meaning("Reward", "higher", about="mean per answer, as it is trained on"),
    ("ppo", "kl"): Meaning("KL from parent", about="nats per token"),
    ("dpo", "accuracy"): Meaning("Preference accuracy", "higher", True, "by implicit reward, against the parent"),
    ("critique", "distinct"): Meaning("Distinct 3-grams", "none", True, "of words; falls when answers become alike"),
}
_COUNTS = ("rounds",)  # numbers of a run, not measured on anything
_APART = ("headline", "merge.holds", "stopped_by")  # said elsewhere on the page
_PREFIXES = ("before.", "after.", "change.", "merge.")
VIOLATION, _WATCHED = "judge.violation.", "watch."
HEADLINES: dict[str, tuple[str, ...]] = {
    "pretrain": ("loss", "perplexity"),
    "sft": ("judge.correct", "judge.score", "loss", "perplexity"),
    "reward": ("accuracy", "loss"),
    "dpo": ("judge.score", "judge.correct", "accuracy", "margin", "reward"),
    "ppo": ("judge.score", "judge.correct", "reward"),
    "critique": ("judge.violation_rate", "judge.violations", "critic.violation_rate"),
    "merge": ("top1_agreement", "kl"),
}
CHANCE = 0.5


@dataclass(frozen=True)
class Change:
    """One measured name with its numbers before and after a stage."""

    name: str
    meaning: Meaning
    before: Number | None
    after: Number | None
    paired: Number | None = None
    baseline: str = "parent"

    @property
    def difference(self) -> float | None:
        """After minus before, or the paired difference; None when either is missing."""
        if self.paired:
            return self.paired.value
        return self.after.value - self.before.value if self.before and self.after else None

    @property
    def verdict(self) -> Verdict:
        """What the numbers allow to say: `unclear` when the 95% intervals cannot tell before from after."""
        if self.difference is None or self.meaning.better == "none" or not math.isfinite(self.difference):
            return "none"
        if self.difference == 0:
            return "same"
        if self._overlaps():
            return "unclear"
        return "better" if (self.difference > 0) == (self.meaning.better == "higher") else "worse"

    @property
    def certain(self) -> bool:
        """Whether intervals stand behind the verdict."""
        return self._spans() is not None

    def words(self, value: Number | None) -> str:
        """A number of this change as text."""
        return words.number(value.value, share=self.meaning.share) if value else ""

    def interval_words(self, value: Number | None) -> str:
        """The interval of a number of this change as text, or nothing."""
        if value is None or value.interval is None:
            return ""
        low, high = (words.number(end, share=self.meaning.share) for end in value.interval)
        return f"{low.removesuffix('%')} to {high}"

    def difference_words(self) -> str:
        """The difference with its sign, or nothing."""
        return "" if self.difference is None else words.signed(self.difference, share=self.meaning.share)

    def _spans(self) -> tuple[tuple[float, float], tuple[float, float]] | None:
        if self.paired and self.paired.interval:
            return self.paired.interval, (0.0, 0.0)
        if self.after is None or self.before is None or self.after.interval is None:
            return None
        before = self.before.interval or ((self.before.value,) * 2 if self.baseline == "chance" else None)
        return None if before is None else (self.after.interval, before)

    def _overlaps(self) -> bool:
        spans = self._spans()
        return spans is not None and spans[0][0] <= spans[1][1] and spans[1][0] <= spans[0][1]


def number_from(value: Any) -> Number | None:
    """The number behind a metric's value; None when it is something else (a list, a text, yes or no)."""
    if isinstance(value, Mapping):
        found = _real(value.get("value"))
        n = _real(value.get("n"))
        ends = _real(value.get("low")), _real(value.get("high"))
        return None if found is None else Number(found, *ends, None if n is None else int(n))
    found = _real(value)
    return None if found is None else Number(found)


def meaning_of(name: str, kind: str = "") -> Meaning:
    """What is known about a metric of a stage of this kind; for an unknown one, its name in words."""
    if name.startswith(VIOLATION):
        return Meaning(f"Answers against {words.label(name.removeprefix(VIOLATION))}", "lower", True, "by the judge")
    if name.startswith(_WATCHED):
        return Meaning(f"Watched: {name.removeprefix(_WATCHED)}", "higher", about="a reward that is not trained on")
    return OF_KIND.get((kind, name)) or KNOWN.get(name) or Meaning(words.label(name))


def changes(metrics: Mapping[str, Any], kind: str) -> list[Change]:
    """Every number of a checkpoint, the stage's own first, then in the order in which they were recorded.

    kind: the stage's kind; a reward stage without a number before is held against chance.
    """
    names = dict.fromkeys(bare(key) for key, value in metrics.items() if number_from(value) and key not in _COUNTS)
    found = [_change(name, metrics, kind) for name in names]
    first = headline_names(metrics, kind)
    order = {name: place for place, name in enumerate(first)}
    return sorted(found, key=lambda change: order.get(change.name, len(order)))


def headline(metrics: Mapping[str, Any], kind: str) -> Change | None:
    """The one number that a stage of this kind is there to move."""
    found = {change.name: change for change in changes(metrics, kind)}
    for name in headline_names(metrics, kind):
        if name in found:
            return found[name]
    moved = [change for change in found.values() if change.verdict != "none"]
    return next(iter(moved or found.values()), None)


def headline_names(metrics: Mapping[str, Any], kind: str) -> tuple[str, ...]:
    """Names that may head a stage, best first; the metric `headline` (a name) overrides the kind's own list."""
    chosen = metrics.get("headline")
    own = (chosen,) if isinstance(chosen, str) else ()
    return own + HEADLINES.get(kind, ("loss", "accuracy", "judge.score"))


def parity(metrics: Mapping[str, Any]) -> bool | None:
    """Whether a merged model was found to be what its adapter was; None where nobody asked."""
    found = metrics.get("merge.holds")
    return found if isinstance(found, bool) else None


def facts(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says besides held-out numbers: short texts, yes or no, and counts of its run."""
    return {
        words.label(bare(key)): value
        for key, value in metrics.items()
        if key not in _APART and (isinstance(value, str | bool) or (key in _COUNTS and number_from(value)))
    }


def raised_guards(metrics: Mapping[str, Any]) -> list[str]:
    """Names of the guards of a ppo run that were raised, in the order in which that first happened."""
    found = metrics.get("guards")
    rows = [row for row in found if isinstance(row, Mapping)] if isinstance(found, list | tuple) else []
    return list(dict.fromkeys(str(row.get("guard", "")) for row in rows))


def _change(name: str, metrics: Mapping[str, Any], kind: str) -> Change:
    before, after = number_from(metrics.get(f"before.{name}")), number_from(metrics.get(f"after.{name}"))
    if after is None and before is None:
        after = number_from(metrics.get(f"merge.{name}", metrics.get(name)))
    baseline = "parent"
    if before is None and kind == "reward" and name == "accuracy":
        before, baseline = Number(CHANCE), "chance"
    return Change(name, meaning_of(name, kind), before, after, number_from(metrics.get(f"change.{name}")), baseline)


def bare(key: str) -> str:
    """The name of a metric without before, after, change or merge."""
    return next((key.removeprefix(prefix) for prefix in _PREFIXES if key.startswith(prefix)), key)


def _real(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
