"""Intervals, sign flips and Holm's correction, against known values and brute force."""

from itertools import product

import numpy as np
import pandas as pd
import pytest
from scipy.stats import bootstrap

from gdviz.experiment.statistics import compare, holm, interval, sign_flip, summarise


@pytest.mark.parametrize("count", [3, 6, 8, 10])
def test_when_all_differences_have_one_sign_p_is_two_over_two_to_the_n(count):
    assert sign_flip(list(range(1, count + 1))) == pytest.approx(2 ** (1 - count))


def test_sign_flips_are_those_of_all_sign_patterns():
    x = np.random.default_rng(0).normal(0.4, 1, 9)
    flipped = np.array([np.mean(x * signs) for signs in product((-1, 1), repeat=9)])
    wanted = (np.abs(flipped) >= abs(x.mean()) - 1e-12).mean()
    assert sign_flip(x.tolist()) == pytest.approx(wanted)


def test_no_difference_is_no_evidence():
    assert sign_flip([0.0, 0.0, 0.0]) == 1.0


def test_holm_multiplies_the_smallest_by_all_and_never_falls():
    p = [0.005, 0.2, 0.011, 0.02]
    assert holm(p) == pytest.approx([0.02, 0.2, 0.033, 0.04])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_an_interval_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(60):
        low, high = interval(rng.normal(2, 1, 20).tolist())
        hits += low <= 2 <= high
    assert 49 <= hits <= 60  # 95 % of 60 is 57; 49 would be 4 deviations off


def test_too_few_values_have_no_interval():
    assert np.isnan(interval([1.0, 2.0])).all()


def test_contrasts_are_paired_by_draw():
    rng = np.random.default_rng(2)
    hard = rng.normal(0, 10, 10)  # draws differ far more than methods do
    wide = pd.DataFrame({"a": hard + 1 + rng.normal(0, 0.1, 10), "b": hard})
    (row,) = compare(wide, [("a", "b")], unit=1).to_dict("records")
    assert row["n"] == 10 and row["won"] == 1 and row["p_holm"] == pytest.approx(2**-9)
    assert 0.9 < row["low"] < row["difference"] < row["high"] < 1.1


def test_means_come_with_the_interval_that_scipy_gives():
    values = np.random.default_rng(3).normal(0.5, 0.05, 10)
    row = summarise(pd.DataFrame({"x": values})).loc["x"]
    found = bootstrap((100 * values,), np.mean, method="BCa", rng=0).confidence_interval
    assert row["mean"] == pytest.approx(100 * values.mean())
    assert (row["low"], row["high"]) == pytest.approx((found.low, found.high))
