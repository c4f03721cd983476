"""How sure a difference is: paired over draws of data, teachers and students together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import bootstrap, permutation_test, trim_mean


def interval(values: list[float]) -> tuple[float, float]:
    """Return the 95 % BCa interval of the mean (bootstrap, Efron 1987); NaN for under 3 values."""
    x = np.asarray(values, dtype=float)
    if len(x) < 3 or np.ptp(x) == 0:
        return (np.nan, np.nan) if len(x) < 3 else (x[0], x[0])
    found = bootstrap((x,), np.mean, method="BCa", rng=0)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def sign_flip(differences: list[float]) -> float:
    """Return the two-sided p of "the sign of each difference is a coin's", on their mean.

    Exact up to 13 differences. With n of them p is at least ``2^(1 - n)``.
    """
    x = np.asarray(differences, dtype=float)
    if len(x) < 2 or not x.any():
        return 1.0
    test = permutation_test((x,), np.mean, permutation_type="samples", n_resamples=2**13, rng=0)
    return float(test.pvalue)


def holm(p: list[float]) -> list[float]:
    """Return p-values corrected for their number (Holm 1979).

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = np.argsort(p)
    scaled = np.asarray(p, dtype=float)[order] * np.arange(len(p), 0, -1)
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(1, np.maximum.accumulate(scaled))
    return [round(float(x), 12) for x in corrected]


def compare(
    wide: pd.DataFrame, contrasts: Sequence[tuple[str, str]], unit: float = 100
) -> pd.DataFrame:
    """Return one row a contrast "first minus second", in points, over the draws that have both.

    Args:
        wide: a measure; rows are draws, columns what is compared.
        contrasts: pairs of columns, named before the results were seen.
        unit: points of a difference of one.

    Returns:
        Columns ``better``, ``than``, ``n``, ``difference``, ``low``, ``high`` (BCa, 95 %), ``won``
        (share of draws), ``p`` (sign flips) and ``p_holm``.
    """
    rows = []
    for better, than in contrasts:
        gain = unit * (wide[better] - wide[than]).dropna()
        low, high = interval(gain.tolist())
        row = {"better": better, "than": than, "n": len(gain), "difference": gain.mean()}
        row |= {"low": low, "high": high, "won": (gain > 0).mean(), "p": sign_flip(gain.tolist())}
        rows.append(row)
    found = pd.DataFrame(rows)
    return found.assign(p_holm=holm(found["p"].tolist())) if len(found) else found


def summarise(wide: pd.DataFrame, unit: float = 100) -> pd.DataFrame:
    """Return mean, interval and interquartile mean of every column of a measure."""
    rows = {}
    for name in wide:
        values = unit * wide[name].dropna()
        low, high = interval(values.tolist())
        middle = trim_mean(values, 0.25) if len(values) else np.nan
        rows[name] = {"n": len(values), "mean": values.mean(), "low": low, "high": high}
        rows[name]["iqm"] = middle
    return pd.DataFrame(rows).T
