"""A measured number with its 95% interval, so that a difference within the noise looks like one.

Shares get Wilson's interval; everything else the percentile bootstrap over rows, seeded. It leaves out tests of
significance: two intervals or one interval of the paired difference say the same and cannot be misread as easily.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

NORMAL_95 = 1.959963984540054
RESAMPLES = 2000
WEIGHTS_AT_ONCE = 4_000_000  # numbers held in memory while resampling, 32 MB


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value from `n` rows and the bounds of its 95% interval. n = 0: nothing was measured, and the value is 0."""

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float]:
        """The form that the registry and `--json` show."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


Numbers = dict[str, Estimate]


def wilson(successes: float, n: int) -> Estimate:
    """A share with Wilson's score interval (Wilson 1927), which holds near 0 and 1 and for few rows.

    successes: how many of the `n` rows; a tie may count one half. Of no rows the share is 0, between 0 and 1.
    """
    if n == 0:
        return Estimate(0.0, 0.0, 1.0, 0)
    share, square = successes / n, NORMAL_95**2
    middle = (share + square / (2 * n)) / (1 + square / n)
    reach = NORMAL_95 / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    return Estimate(share, min(share, max(0.0, middle - reach)), max(share, min(1.0, middle + reach)), n)


def bootstrap(statistic: Callable[[Floats], Floats], n: int, *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """The statistic of `n` rows and its percentile bootstrap interval (Efron 1979).

    statistic: how often each row is drawn, (R, n), to one number for each of the R draws, (R,).
    """
    if n == 0:
        return Estimate(0.0, 0.0, 0.0, 0)
    value = float(statistic(np.ones((1, n)))[0])
    random = np.random.default_rng(seed)
    at_once = max(1, WEIGHTS_AT_ONCE // n)
    parts = [
        statistic(random.multinomial(n, np.full(n, 1 / n), size=min(at_once, resamples - start)).astype(np.float64))
        for start in range(0, resamples, at_once)
    ]
    low, high = np.percentile(np.concatenate(parts), [2.5, 97.5])
    return Estimate(value, float(low), float(high), n)


def mean(values: Sequence[float], *, seed: int = 0) -> Estimate:
    """The mean of the rows' values."""
    column = np.asarray(values, dtype=np.float64)
    return bootstrap(lambda weights: weights @ column / len(column), len(column), seed=seed)


def ratio(parts: Sequence[float], wholes: Sequence[float], *, seed: int = 0) -> Estimate:
    """Sum of `parts` over sum of `wholes` (loss per token, say), rows drawn together; 0 where the wholes sum to 0."""
    above, below = np.asarray(parts, dtype=np.float64), np.asarray(wholes, dtype=np.float64)

    def statistic(weights: Floats) -> Floats:
        return _divide(weights @ above, weights @ below)

    return bootstrap(statistic, len(above), seed=seed)


def correlation(left: Sequence[float], right: Sequence[float], *, seed: int = 0) -> Estimate:
    """Pearson's correlation of two columns; 0 where one of them is constant."""
    x, y = (np.asarray(column, dtype=np.float64) for column in (left, right))
    x, y = (column - column.mean() if len(column) else column for column in (x, y))

    def statistic(weights: Floats) -> Floats:
        share = weights / weights.sum(axis=1, keepdims=True)
        mean_x, mean_y = share @ x, share @ y
        spread = np.sqrt(np.maximum(share @ (x * x) - mean_x**2, 0) * np.maximum(share @ (y * y) - mean_y**2, 0))
        return _divide(share @ (x * y) - mean_x * mean_y, spread)

    return bootstrap(statistic, len(x), seed=seed)


def paired_difference(before: Sequence[float], after: Sequence[float], *, seed: int = 0) -> Estimate:
    """Mean of after - before over the same rows; an interval without 0 is a change that the rows support."""
    if len(before) != len(after):
        raise ValueError(f"{len(before)} values before and {len(after)} after are not the same rows")
    return mean([later - earlier for earlier, later in zip(before, after, strict=True)], seed=seed)


def transformed(estimate: Estimate, function: Callable[[float], float]) -> Estimate:
    """The estimate of a rising function of the value (perplexity from loss): its bounds move with it."""
    return Estimate(function(estimate.value), function(estimate.low), function(estimate.high), estimate.n)


def _divide(above: Floats, below: Floats) -> Floats:
    return np.divide(above, below, out=np.zeros_like(above), where=below > 1e-300)
