"""Intervals cover what they promise, and are the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest

from align.evaluation.intervals import bootstrap, correlation, mean, paired_difference, ratio, transformed, wilson


def test_wilson_equals_the_worked_example():
    # 8 of 10: centre (0.8 + 0.19207) / 1.38415, reach 0.22657 (Wilson 1927, by hand)
    estimate = wilson(8, 10)
    assert estimate.value == 0.8
    assert estimate.low == pytest.approx(0.49016, abs=1e-4)
    assert estimate.high == pytest.approx(0.94332, abs=1e-4)


@pytest.mark.parametrize(("successes", "n"), [(0, 20), (20, 20), (1, 1), (0.5, 3)])
def test_wilson_stays_inside_zero_and_one_and_around_its_value(successes, n):
    estimate = wilson(successes, n)
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert estimate.high - estimate.low > 0


def test_nothing_measured_is_zero_rows_and_never_nan():
    assert wilson(0, 0).as_dict() == {"value": 0.0, "low": 0.0, "high": 1.0, "n": 0}
    assert mean([]).as_dict() == {"value": 0.0, "low": 0.0, "high": 0.0, "n": 0}
    assert correlation([], []).value == 0


def test_bootstrap_of_a_mean_agrees_with_the_normal_interval():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    estimate = mean(list(values))
    reach = 1.96 * values.std() / 20
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.low == pytest.approx(values.mean() - reach, abs=0.03)
    assert estimate.high == pytest.approx(values.mean() + reach, abs=0.03)


def test_bootstrap_covers_the_true_mean_about_95_times_of_100():
    random = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        estimate = mean(list(random.exponential(1.0, size=80)))
        covered += estimate.low <= 1.0 <= estimate.high
    assert 0.88 <= covered / 200 <= 0.99


def test_same_seed_same_interval_and_another_seed_another():
    values = list(np.random.default_rng(5).normal(size=30))
    assert mean(values, seed=3) == mean(values, seed=3)
    assert mean(values, seed=3) != mean(values, seed=4)


def test_resampling_in_parts_changes_no_number(monkeypatch):
    values = list(np.random.default_rng(2).normal(size=50))
    whole = mean(values)
    monkeypatch.setattr("align.evaluation.intervals.WEIGHTS_AT_ONCE", 50 * 7)
    assert mean(values) == whole


def test_ratio_weighs_rows_by_their_size():
    estimate = ratio([2.0, 30.0], [1.0, 10.0])
    assert estimate.value == pytest.approx(32 / 11)
    assert estimate.low == pytest.approx(2.0)
    assert estimate.high == pytest.approx(3.0)
    assert ratio([1.0], [0.0]).value == 0


def test_correlation_agrees_with_numpy_and_is_zero_for_a_constant():
    random = np.random.default_rng(3)
    x = random.normal(size=60)
    y = 0.5 * x + random.normal(size=60)
    assert correlation(list(x), list(y)).value == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert correlation(list(x + 1e6), list(y)).value == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-6)
    assert correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]).value == 0


def test_paired_rows_show_a_small_gain_that_unpaired_intervals_hide():
    random = np.random.default_rng(4)
    before = random.normal(0, 10, size=100)
    after = before + random.normal(1.0, 0.5, size=100)
    gain = paired_difference(list(before), list(after))
    assert gain.low > 0
    assert mean(list(before)).high > mean(list(after)).low
    with pytest.raises(ValueError, match="same rows"):
        paired_difference([1.0], [1.0, 2.0])


def test_transformed_moves_value_and_bounds():
    estimate = transformed(bootstrap(lambda weights: weights[:, 0], 4), lambda x: 2 * x)
    assert (estimate.value, estimate.n) == (2.0, 4)
    assert estimate.high == 2 * bootstrap(lambda weights: weights[:, 0], 4).high
