import functools

import numpy as np
import pytest
import synthetic_runs as synthetic
from scipy.optimize import minimize
from scipy.stats import norm, t
from synthetic_runs import ETA

from bitjax.scaling import fit as fit_module
from bitjax.scaling.fit import fit_law
from bitjax.scaling.intervals import (
    _huber_statistics,
    _resampled,
    bootstrap,
    degenerate_share,
    derivatives,
    noise,
    profile,
)
from bitjax.scaling.runs import Runs


@pytest.fixture(scope="module")
def fit():
    return fit_law(synthetic.runs(0.005, seeds=2), "eta")


def test_a_resample_is_the_fit_to_repeated_cells(fit):
    """Cells are drawn as a whole, twins and seeds with them."""
    found = bootstrap(fit, 4, "cells", seed=3)
    draw, cells = np.random.default_rng(3), fit.runs.cells
    counts = draw.multinomial(12, np.full(12, 1 / 12), 4)
    for theta, count in zip(found, counts, strict=True):
        rows = np.repeat(np.arange(len(cells)), count[cells])
        again = fit_law(fit.runs[rows], "eta")
        here = fit.problem.objective(theta[None], count[cells][None].astype(float))[0][0] * 1e-6
        assert here == pytest.approx(again.objective, rel=1e-6)


def test_weights_keep_every_cell_and_are_narrower(fit):
    cells, weights = (bootstrap(fit, 300, method) for method in ("cells", "weights"))
    spread = [np.std(-x[:, 5] / x[:, 3]) for x in (cells, weights)]
    assert 0.5 * spread[0] < spread[1] < spread[0]
    assert abs(np.median(np.exp(-cells[:, 5] / cells[:, 3])) - ETA) < 0.03
    with pytest.raises(ValueError, match="no bootstrap 'x'; there are cells, weights"):
        bootstrap(fit, 2, "x")


def test_draws_that_leave_an_arm_alone_are_made_again():
    """Binary has two cells of one size each: both must be there, in every resample."""
    runs = synthetic.runs(0.004)
    cells = [(runs.N == 1e5) & (runs.D == 2e6), (runs.N == 1e6) & (runs.D == 8e7)]
    few = np.flatnonzero((runs.arm == "ternary") & (cells[0] | cells[1]))
    arm = np.concatenate([runs.arm, ["binary"] * 2]).astype(str)
    rows = np.concatenate([np.arange(24), few])
    both = Runs.of(runs.N[rows], runs.D[rows], runs.loss[rows], arm)
    drawn = _resampled(both, np.random.default_rng(0), 200)
    wanted = np.unique(both.cells[-2:])
    assert (drawn[:, wanted] > 0).all()
    assert (drawn.sum(1) == 12).all()
    plain = np.random.default_rng(1).multinomial(12, np.full(12, 1 / 12), 20_000)
    missing = (plain[:, wanted] == 0).any(1).mean()
    assert degenerate_share(both, resamples=20_000) == pytest.approx(missing, abs=0.02)
    alone = both[both.N == 1e5]
    with pytest.raises(ValueError, match="--bootstrap weights keeps every cell"):
        _resampled(alone, np.random.default_rng(0), 2)


def test_resamples_that_do_not_converge_are_said(fit, monkeypatch):
    short = functools.partial(fit_module.minimize, steps=1)
    monkeypatch.setattr(fit_module, "minimize", short)
    with pytest.warns(UserWarning, match=r"\d+ of 50 resamples of the eta law did not converge"):
        bootstrap(fit, 50)


def test_share_of_degenerate_resamples():
    """Of 2 sizes x 2 ratios every cell has a token count of its own, so 4 draws are degenerate if
    they are all of one size: 2 (1/2)^4."""
    runs = synthetic.runs(sizes=[1e5, 1e6])
    runs = runs[np.isin(runs.D / runs.N, [20, 80])]
    assert len(np.unique(runs.cells)) == 4
    assert degenerate_share(runs, resamples=4000) == pytest.approx(2 / 16, abs=0.02)


@pytest.mark.parametrize(("seeds", "sets"), [(40, 1), (1, 40)])
def test_noise_is_that_of_the_runs(seeds, sets):
    """Of many runs, and on average of 24, of which a fit of 6 parameters nearly meets 6."""
    found = [
        noise(fit_law(synthetic.runs(0.01, s, seeds=seeds), "eta", start=synthetic.TRUTH))
        for s in range(sets)
    ]
    assert np.mean(found) == pytest.approx(0.01, rel=0.08)


def test_huber_statistics_in_their_limits():
    factor, spread = _huber_statistics(1.0, 0.01)  # least squares
    assert spread == pytest.approx(0.01, rel=1e-9)
    assert factor == pytest.approx(2 / 0.01**2, rel=1e-9)
    factor, spread = _huber_statistics(1e-5, 0.01)  # medians
    assert spread == pytest.approx(0.01 * np.sqrt(np.pi / 2), rel=1e-3)
    assert factor == pytest.approx(2 * 2 * norm.pdf(0) * 1e-5 / 0.01, rel=1e-3)


def test_profile_of_least_squares_is_that_of_scipy():
    """With a large delta: log eta is fixed on a grid, the rest fitted by scipy."""
    runs = synthetic.runs(0.02)
    fit = fit_law(runs, "eta", delta=10.0)
    low, high, curve = profile(fit, lambda theta: -theta[:, 5] / theta[:, 3])
    n, P = len(runs), 6
    sd = noise(fit)
    limit = t.ppf(0.975, n - P) ** 2
    lowest = (fit.residuals**2).sum()

    def rest(log_eta):
        def squares(x):
            a, b, e, alpha, beta = x
            size = np.log(runs.N) + log_eta * (runs.arm == "ternary")
            terms = np.logaddexp(np.logaddexp(a - alpha * size, b - beta * np.log(runs.D)), e)
            return ((terms - np.log(runs.loss)) ** 2).sum() * 1e4

        start = fit.theta[:5]
        scale = {"xatol": 1e-9, "fatol": 1e-12, "maxiter": 6000, "maxfev": 6000}
        return minimize(squares, start, method="Nelder-Mead", options=scale).fun / 1e4

    for end in (low, high):
        assert (rest(end) - lowest) / sd**2 == pytest.approx(limit, rel=0.03)
    assert low < np.log(fit.natural["eta[ternary]"]) < high
    assert (np.diff(curve[:, 0]) > 0).all()


def test_profile_that_never_rises_is_unbounded(fit):
    """e of a law that needs none: E may be anything down to 0."""
    runs = synthetic.runs(0.02)
    loss = runs.loss - 0.9 * synthetic.E
    tiny = fit_law(type(runs).of(runs.N, runs.D, loss, runs.arm), "eta")
    low, high, _ = profile(tiny, lambda theta: theta[:, 2])
    assert low == -np.inf
    assert np.isfinite(high)


def test_numeric_derivatives():
    theta = np.array([[0.5, 2.0], [1.0, -1.0]])
    found = derivatives(lambda x: x[:, 0] ** 2 * np.exp(x[:, 1]), theta)
    e = np.exp(theta[:, 1])
    expected = np.stack([2 * theta[:, 0] * e, theta[:, 0] ** 2 * e], 1)
    np.testing.assert_allclose(found, expected, rtol=1e-8)
