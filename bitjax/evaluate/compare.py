"""Paired tests of two models on the same items.

    McNemar, exact   b items only A has right, c only B: under equality b ~ Binomial(b + c, 1/2)
                     p = min(1, 2 P(X <= min(b, c)))
    bootstrap        items drawn with replacement, both models' values together; the interval of
                     the mean difference lies between quantiles of the resampled means
    Holm             p values of several comparisons, so that all hold together

Sources: McNemar, Psychometrika 12 (1947); Efron, Ann. Statist. 7 (1979); Holm, Scand. J. Statist.
6 (1979).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import numpy as np

RESAMPLES = 2000  # the quantiles' own error is then below a tenth of the interval
CONFIDENCE = 0.95


def mcnemar(a: Sequence[float], b: Sequence[float]) -> float:
    """The exact two-sided p value of right (1) and wrong (0) answers to the same items.

    Raises:
        ValueError: not as many answers of one as of the other.
    """
    first, second = _paired(a, b)
    only_a = int(np.count_nonzero(first > second))
    only_b = int(np.count_nonzero(first < second))
    n = only_a + only_b
    tail = sum(comb(n, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)  # integers of any size, divided as such


def bootstrap_interval(
    a: Sequence[float],
    b: Sequence[float],
    seed: int = 0,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> tuple[float, float]:
    """The percentile interval of mean(b) - mean(a).

    Raises:
        ValueError: not as many values of one as of the other, or none.
    """
    first, second = _paired(a, b)
    differences = second - first
    n = len(differences)
    draw = np.random.default_rng(seed)
    means = np.empty(resamples)
    for i in range(resamples):
        means[i] = differences[draw.integers(0, n, n)].mean()
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values, in the given order."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def _paired(a: Sequence[float], b: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.shape != second.shape or not len(first):
        raise ValueError(f"{len(first)} values of one model and {len(second)} of the other")
    return first, second
