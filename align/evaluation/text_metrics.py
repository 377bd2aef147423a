"""Metrics of generated text against a reference text, each with its 95% interval. The only importer of `evaluate`.

Each metric is a module of `evaluate`'s frame that needs no hub: it can be combined with the library's own, and its
`rows` give what intervals are made from. BLEU is sacrebleu's and ROUGE is rouge_score's, as papers quote them.
"""

from __future__ import annotations

import re
import string
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import evaluate
import numpy as np
from evaluate.module import Features, Value  # the types of `datasets`, through the library that asks for them
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

from align.answers import final_number
from align.errors import AlignError, did_you_mean
from align.evaluation.intervals import Estimate, Floats, Numbers, bootstrap, mean, wilson

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)
SHARES = ("exact_match", "numeric_match")  # 0 or 1 in every row
METRICS = ("exact_match", "f1", "bleu", "rouge", "numeric_match")
ROUGE_KINDS = ("rouge1", "rouge2", "rougeL")
BLEU_ORDERS = 4
BLEU_RESAMPLES = 500


class TextMetric(evaluate.Metric):  # type: ignore[misc]
    """One number per row, in [0, 1], whose mean is the metric; the name of the class in small letters is its name."""

    def __init__(self, score: Callable[[str, str], float], name: str, about: str) -> None:
        self.score, self.about, self.key = score, about, name
        with tempfile.TemporaryDirectory() as folder:  # the frame makes a folder even when all stays in memory
            super().__init__(keep_in_memory=True, cache_dir=folder)

    def rows(self, predictions: Sequence[str], references: Sequence[str]) -> list[float]:
        """The metric of each row."""
        return [self.score(said, right) for said, right in zip(predictions, references, strict=True)]

    def _info(self) -> evaluate.MetricInfo:
        text = Value("string")
        return evaluate.MetricInfo(
            description=self.about, citation="", inputs_description="predictions and references: one text a row",
            features=Features({"predictions": text, "references": text}),
        )  # fmt: skip

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        return {self.key: float(np.mean(self.rows(predictions, references)))}


def text_numbers(
    predictions: Sequence[str], references: Sequence[str], names: Sequence[str] | None = None, *, seed: int = 0
) -> Numbers:
    """The named metrics (all, when None) of one prediction and one reference a row; {} for no rows.

    Shares are in [0, 1], BLEU in [0, 100]. Raises AlignError for an unknown name.
    """
    chosen = METRICS if names is None else names
    for name in chosen:
        if name not in METRICS:
            raise AlignError(f"no text metric '{name}'", did_you_mean(name, METRICS))
    if not predictions:
        return {}
    numbers: Numbers = {}
    for name in chosen:
        if name == "bleu":
            numbers[name] = bleu(predictions, references, seed=seed)
        for metric in _modules(name):
            rows = metric.rows(predictions, references)
            numbers[metric.key] = wilson(sum(rows), len(rows)) if name in SHARES else mean(rows, seed=seed)
    return numbers


def exact_match(prediction: str, reference: str) -> float:
    """1 when both are equal without case, punctuation, articles and extra space (Rajpurkar 2016), else 0."""
    return float(_words(prediction) == _words(reference))


def token_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall over words, normalised as for exact_match (Rajpurkar 2016)."""
    said, right = _words(prediction), _words(reference)
    if not said or not right:
        return float(said == right)
    shared = sum((Counter(said) & Counter(right)).values())
    return 2 * shared / (len(said) + len(right))


def numeric_match(prediction: str, reference: str) -> float:
    """1 when the last number of both is the same (after `####`, where that stands, as in GSM8K), else 0."""
    said, right = final_number(prediction), final_number(reference)
    return float(said is not None and said == right)


def bleu(predictions: Sequence[str], references: Sequence[str], *, seed: int = 0) -> Estimate:
    """Corpus BLEU in [0, 100] (Papineni 2002; sacrebleu's 13a words, exponential smoothing), rows resampled."""
    scorer = BLEU()
    counts = np.asarray(
        [_bleu_counts(scorer, said, right) for said, right in zip(predictions, references, strict=True)]
    ).reshape(-1, 2 * BLEU_ORDERS + 2)

    def statistic(weights: Floats) -> Floats:
        sums = np.rint(weights @ counts).astype(int)
        return np.asarray([_bleu_of(row) for row in sums.tolist()])

    return bootstrap(statistic, len(counts), seed=seed, resamples=BLEU_RESAMPLES)


def _bleu_counts(scorer: Any, prediction: str, reference: str) -> list[int]:
    """Matched and possible n-grams of one row, and both lengths: what corpus BLEU sums."""
    score = scorer.corpus_score([prediction], [[reference]])
    return [*score.counts, *score.totals, score.sys_len, score.ref_len]


def _bleu_of(counts: list[int]) -> float:
    *grams, said, right = counts
    score = BLEU.compute_bleu(grams[:BLEU_ORDERS], grams[BLEU_ORDERS:], said, right, smooth_method="exp")
    return float(score.score)


def _modules(name: str) -> list[TextMetric]:
    """The modules behind a name of METRICS; none for BLEU, which is no mean over rows."""
    if name == "rouge":
        scorer = RougeScorer(ROUGE_KINDS, use_stemmer=True)
        return [TextMetric(_rouge(scorer, kind), kind.lower(), f"{kind}, F-measure (Lin 2004)") for kind in ROUGE_KINDS]
    scores = {"exact_match": exact_match, "f1": token_f1, "numeric_match": numeric_match}
    return [TextMetric(scores[name], name, str(scores[name].__doc__))] if name in scores else []


def _rouge(scorer: Any, kind: str) -> Callable[[str, str], float]:
    return lambda prediction, reference: float(scorer.score(reference, prediction)[kind].fmeasure)


def _words(text: str) -> list[str]:
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()
