import math

import numpy as np
import pytest
import synthetic_runs as synthetic
from scipy.integrate import quad

from bitjax.scaling.compare import (
    compare,
    held_out,
    information,
    log_likelihood,
    log_normaliser,
    twins,
)
from bitjax.scaling.fit import fit_law
from bitjax.scaling.runs import Runs


@pytest.mark.parametrize(("b", "delta"), [(1e-2, 1e-3), (1e-3, 1e-3), (1e-4, 1e-2)])
def test_density_of_a_huber_loss_is_one(b, delta):
    def density(r):
        size = abs(r)
        huber = r**2 / 2 if size <= delta else delta * (size - delta / 2)
        return math.exp(-huber / (delta * b))

    reach = max(40 * b, 10 * delta)
    area = 2 * (quad(density, 0, delta)[0] + quad(density, delta, reach, limit=200)[0])
    assert log_normaliser(b, delta) == pytest.approx(math.log(area), rel=1e-8)


def test_criteria_in_the_limit_of_least_squares():
    """A large delta: the density is normal with the variance of the residuals."""
    fit = fit_law(synthetic.runs(0.01), "eta", delta=10.0)
    n, k = 24, 7
    variance = (fit.residuals**2).mean()
    normal = -n / 2 * (math.log(2 * math.pi * variance) + 1)
    assert log_likelihood(fit) == pytest.approx(normal, abs=1e-3)
    aicc, bic = information(fit)
    assert aicc == pytest.approx(2 * k - 2 * normal + 2 * k * (k + 1) / (n - k - 1), abs=1e-2)
    assert bic == pytest.approx(k * math.log(n) - 2 * normal, abs=1e-2)


def test_criteria_in_the_limit_of_medians():
    fit = fit_law(synthetic.runs(0.01), "eta", delta=1e-7)
    scale = abs(fit.residuals).mean()
    assert log_likelihood(fit) == pytest.approx(-24 * (math.log(2 * scale) + 1), abs=1e-2)


def test_the_true_form_wins():
    standings = compare(synthetic.runs(0.003, seeds=2), ["own-e", "eta", "shared", "separate"])
    assert standings[0].fit.law.form == "eta"
    assert sum(s.weight for s in standings) == pytest.approx(1)
    assert standings[0].weight > 0.7
    assert [s.fit.law.form for s in standings][-1] == "shared"
    by = {s.fit.law.form: s for s in standings}
    assert by["eta"].held_out_gap < 0.02 < by["shared"].held_out_gap
    delta = by["separate"].aicc - by["eta"].aicc
    assert by["separate"].weight / by["eta"].weight == pytest.approx(math.exp(-delta / 2))


def test_a_form_that_holds_another_never_fits_worse():
    """Even where runs decide nothing: two sizes, noise of 5 %."""
    runs = synthetic.runs(0.05, seed=4, sizes=[1e5, 1.2e5], ratios=(20, 21, 22), seeds=3)
    forms = ["separate", "eta-e", "drift", "eta", "own-e", "shared"]
    S = {s.fit.law.form: s.fit.objective for s in compare(runs, forms)}
    for less, more in (
        ("shared", "eta"), ("shared", "own-e"), ("eta", "drift"), ("eta", "eta-e"),
        ("own-e", "eta-e"), ("eta-e", "separate"),
    ):  # fmt: skip
        assert S[more] <= S[less] * (1 + 1e-6), (less, more)


def test_held_out_runs_are_not_fitted():
    """The largest size's losses are 10 % off: all of it is seen, had they been left out."""
    runs = synthetic.runs(0.0)
    big = runs.N.max() == runs.N
    loss = runs.loss * np.where(big, 1.1, 1.0)
    off = Runs.of(runs.N, runs.D, loss, runs.arm, seed=runs.seed)
    error, gap = held_out(off, "eta", ("float", "ternary"))
    assert error == pytest.approx(math.log(1.1), rel=1e-2)
    assert gap == pytest.approx(0, abs=1e-3)
    assert all(map(math.isnan, held_out(off, "eta", ("float", "ternary"), largest=4)))


def test_twins_are_of_one_cell_and_seed():
    runs = synthetic.runs(seeds=2)
    pairs = twins(runs, "float")
    assert len(pairs) == 24
    for i, j in pairs:
        assert (runs.arm[i], runs.arm[j]) == ("ternary", "float")
        assert (runs.N[i], runs.D[i], runs.seed[i]) == (runs.N[j], runs.D[j], runs.seed[j])
    assert len(twins(runs[np.arange(1, 48)], "float")) == 23
