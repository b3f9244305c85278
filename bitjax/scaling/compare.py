"""Which form of law the runs speak for: information criteria, and larger runs held out.

A Huber loss is the log-likelihood of the density that it minimises best for (Huber, 1964),

    p(r) = exp(-Huber_delta(r) / (delta b)) / Z(b)
    Z(b) = sqrt(2 pi delta b) erf(sqrt(delta / 2b)) + 2 b exp(-delta / 2b)

normal within delta and Laplace of scale b outside; b is fitted like any parameter. From it come

    AICc = 2 k - 2 log p + 2 k (k + 1) / (n - k - 1)       BIC = k log n - 2 log p

with k parameters of the law and b, and the weights exp(-AICc / 2), which add up to 1 over the laws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bitjax.scaling.fit import DELTA, Fit, fit_law
from bitjax.scaling.laws import OFFSETS, Form
from bitjax.scaling.runs import Runs


@dataclass(frozen=True)
class Standing:
    """How a form does.

    Attributes:
        fit: to all runs.
        aicc, bic: smaller is better; inf with fewer than k + 2 runs.
        weight: of AICc among the forms compared.
        held_out: root mean square of log loss of the largest models, predicted from the others;
            NaN if the others are too few.
        held_out_gap: the same of the twins' differences in log loss; NaN without twins.
    """

    fit: Fit
    aicc: float
    bic: float
    weight: float
    held_out: float
    held_out_gap: float


def compare(
    runs: Runs, forms: Sequence[Form], arms: tuple[str, ...] | None = None, delta: float = DELTA,
    largest: int = 1,
) -> list[Standing]:  # fmt: skip
    """Fit forms and rank them by AICc.

    Args:
        largest: sizes that are held out, from the top.
    """
    fits: list[Fit] = []
    for form in sorted(forms, key=lambda form: len(OFFSETS.get(form, ()))):
        fits.append(fit_law(runs, form, arms, delta, simpler=fits))
    criteria = [information(fit) for fit in fits]
    aicc = np.array([a for a, _ in criteria])
    # Forms that are all too rich to judge count alike.
    finite = np.isfinite(aicc)
    relative = np.where(finite, np.exp(-(aicc - aicc[finite].min()) / 2), 0) if finite.any() else 1
    weights = relative / np.sum(relative) * np.ones(len(fits))
    errors = [held_out(runs, fit.law.form, fit.law.arms, delta, largest) for fit in fits]
    found = [
        Standing(fit, *both, float(weight), *error)
        for fit, both, weight, error in zip(fits, criteria, weights, errors, strict=True)
    ]
    return sorted(found, key=lambda s: s.aicc)


def information(fit: Fit) -> tuple[float, float]:
    """AICc and BIC of a fit."""
    n, k = len(fit.runs), len(fit.theta) + 1
    deviance = -2 * log_likelihood(fit)
    aicc = deviance + 2 * k + 2 * k * (k + 1) / (n - k - 1) if n > k + 1 else math.inf
    return aicc, deviance + k * math.log(n)


def log_likelihood(fit: Fit) -> float:
    """Of the residuals, at the best scale b."""
    from scipy.optimize import minimize_scalar

    n, delta = len(fit.runs), fit.problem.delta

    def negative(log_b: float) -> float:
        return n * log_normaliser(math.exp(log_b), delta) + fit.objective / (
            delta * math.exp(log_b)
        )

    # b is about the mean of |r|; far below delta the density is normal, of variance delta b.
    size = max(fit.objective / (n * delta), 1e-12)
    middle = math.log(size)
    return -float(minimize_scalar(negative, bounds=(middle - 8, middle + 8), method="bounded").fun)


def log_normaliser(b: float, delta: float) -> float:
    """log Z(b)."""
    inner = math.sqrt(2 * math.pi * delta * b) * math.erf(math.sqrt(delta / (2 * b)))
    return math.log(inner + 2 * b * math.exp(-delta / (2 * b)))


def held_out(
    runs: Runs, form: Form, arms: tuple[str, ...], delta: float = DELTA, largest: int = 1
) -> tuple[float, float]:
    """Errors of predicting the largest sizes from the others: see `Standing`."""
    sizes = np.unique(runs.N)
    if len(sizes) <= largest:
        return math.nan, math.nan
    big = np.isin(runs.N, sizes[-largest:])
    try:
        fit = fit_law(runs[~big], form, arms, delta)
    except ValueError:  # too few are left, or an arm has one size
        return math.nan, math.nan
    test = runs[big]
    error = np.log(fit.law.loss(fit.theta, test.N, test.D, list(test.arm))[0]) - np.log(test.loss)
    differences = [error[i] - error[j] for i, j in twins(test, arms[0])]
    return _rms(error), _rms(np.array(differences))


def twins(runs: Runs, reference: str) -> list[tuple[int, int]]:
    """Pairs (run, its twin in the reference arm) of one cell and seed."""
    cells = runs.cells
    keys = list(zip(cells, runs.seed, strict=True))
    of = {key: j for j, key in enumerate(keys) if runs.arm[j] == reference}
    return [(i, of[key]) for i, key in enumerate(keys) if runs.arm[i] != reference and key in of]


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2))) if len(values) else math.nan
