"""How well the runs decide a fit: bootstraps and profile likelihoods.

    cells    cells of equal N and D are drawn with replacement, twins and seeds with them (Efron,
             1979; Besiroglu et al., arXiv 2404.10102, have one run to a cell)
    weights  every cell stays, with a random weight of mean 1 (exponential, divided by their mean:
             Rubin, "The Bayesian bootstrap", Ann. Statist. 9, 1981)
    profile  no resampling: a quantity is moved from its best value and all else fitted again, until
             the objective has risen by what noise explains that is the same in every run (where
             it is not, as in Chinchilla's points, the bootstraps are wider and to be preferred)

Drawing few cells often gives an arm of one size or token count, whose fit means nothing: such draws
are made again. Weights keep the design. Measured (experiments/scaling_coverage): intervals of
`cells` cover as often as they claim or more, those of `weights` and profiles are narrower and cover
a little less.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np

from bitjax.scaling.fit import Fit
from bitjax.scaling.minimize import minimize
from bitjax.scaling.runs import Runs

Resampling = Literal["cells", "weights"]
RESAMPLINGS: tuple[Resampling, ...] = get_args(Resampling)
RESAMPLES = 4000  # Besiroglu et al.
CHUNK = 2_000_000  # numbers in a stack [R, n, P]: 16 MB
MAX_MISSED = 0.01  # of the resamples without convergence, against 0.05 outside an interval
POINTS = 24  # of a profile, to each side
MAX_DEGENERATE = 0.5  # of the resamples: more of them drawn again would make another bootstrap
REDRAWS = 1000  # of a resample, then the cells are hopeless
REACH = 6.0  # standard deviations that a profile goes to each side, if it must

Quantity = Callable[[np.ndarray], np.ndarray]  # theta [R, P] -> values [R]


def bootstrap(
    fit: Fit, resamples: int = RESAMPLES, method: Resampling = "cells", seed: int = 0
) -> np.ndarray:
    """Fits to resampled runs, [resamples, P]; each starts from the fit to all. Warns if some fail.

    Raises:
        ValueError: an unknown method, cells of which no resample can be fitted.
    """
    if method not in RESAMPLINGS:
        raise ValueError(f"no bootstrap {method!r}; there are {', '.join(RESAMPLINGS)}")
    draw = np.random.default_rng(seed)
    cells = fit.runs.cells
    count = int(cells.max()) + 1
    found, missed = np.empty((resamples, len(fit.theta))), 0
    rows = max(1, CHUNK // (len(cells) * len(fit.theta)))
    for first in range(0, resamples, rows):
        R = min(rows, resamples - first)
        start = np.tile(fit.theta, (R, 1))
        if method == "cells":
            weights = _resampled(fit.runs, draw, R)
        else:
            weights = count * draw.dirichlet(np.ones(count), R)
        minima = fit.problem.minimize(start, weights[:, cells])
        found[first : first + R] = minima.x
        missed += int((~minima.converged).sum())
    if missed > MAX_MISSED * resamples:
        warnings.warn(
            f"{missed} of {resamples} resamples of the {fit.law.form} law did not converge: its "
            "intervals are not to be trusted",
            stacklevel=2,
        )
    return found


def degenerate_share(runs: Runs, seed: int = 0, resamples: int = 500) -> float:
    """Which share of resamples of cells leaves an arm with one size or one token count."""
    count = int(runs.cells.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), resamples)
    return float(_degenerate(runs, drawn).mean())


def _resampled(runs: Runs, draw: np.random.Generator, resamples: int) -> np.ndarray:
    """How often each cell is drawn, [resamples, cells]; degenerate resamples are drawn again."""
    count = int(runs.cells.max()) + 1
    found = np.zeros((resamples, count))
    bad = np.arange(resamples)
    for _ in range(REDRAWS):
        found[bad] = draw.multinomial(count, np.full(count, 1 / count), len(bad))
        bad = bad[_degenerate(runs, found[bad])]
        if not len(bad):
            return found
    raise ValueError(
        f"after {REDRAWS} draws a resample of these cells still leaves an arm with one size or "
        "token count; --bootstrap weights keeps every cell"
    )


def _degenerate(runs: Runs, drawn: np.ndarray) -> np.ndarray:
    """Which of drawn [R, cells] leave an arm with one size or token count, or none: [R]."""
    cells = runs.cells
    found = np.zeros(len(drawn), bool)
    for arm in runs.arms:
        rows = runs.arm == arm
        for values in (runs.N[rows], runs.D[rows]):
            distinct, of = np.unique(values, return_inverse=True)
            member = np.zeros((drawn.shape[1], len(distinct)))
            member[cells[rows], of] = 1
            found |= ((drawn @ member) > 0).sum(1) < 2
    return found


def noise(fit: Fit) -> float:
    """Standard deviation of log loss around the law, were it normal: the median of |residuals| over
    0.6745, without the P smallest, which a fit of P parameters to medians makes nearly 0."""
    sizes = np.sort(np.abs(fit.residuals))
    # Losses without noise would leave nothing to divide by; they are known to 1e-9 at best.
    return max(float(np.median(sizes[len(fit.theta) :]) / 0.6745), 1e-9)


def profile(
    fit: Fit, quantity: Quantity, confidence: float = 0.95
) -> tuple[float, float, np.ndarray]:
    """The interval of a quantity by its profile, and the profile itself.

    Each point minimises S + k (g - c)^2 for one c: whatever c and k, its own g and S lie on the
    profile, so c need not be met.

    Returns:
        low and high, -inf or inf where the objective does not rise enough within reach; and
        [points, 2]: values of the quantity, and sqrt of the likelihood ratio (in standard
        deviations).
    """
    from scipy.stats import t

    n, P = fit.jacobian.shape
    factor, spread = _huber_statistics(fit.problem.delta, noise(fit))
    limit = float(t.ppf((1 + confidence) / 2, max(n - P, 1)))

    theta = fit.theta[None]
    best = float(quantity(theta)[0])
    slope = derivatives(quantity, theta)[0]
    covariance = spread**2 * np.linalg.pinv(fit.jacobian.T @ fit.jacobian, rcond=1e-12)
    width = max(float(np.sqrt(slope @ covariance @ slope)), 1e-9 * abs(best), 1e-300)
    steps = np.linspace(0, REACH * limit / 2, POINTS + 1)[1:]
    targets = best + np.concatenate([-steps[::-1], steps]) * width
    stiffness = 50 / width**2 / factor
    weights = np.ones((1, n))

    def penalised(x: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        S, g = fit.problem.objective(x, weights)
        off = np.nan_to_num(quantity(x), nan=1e300, posinf=1e300, neginf=-1e300) - targets[rows]
        with np.errstate(over="ignore", invalid="ignore"):
            value = S + stiffness * off**2
            gradient = g + (2 * stiffness * off)[:, None] * derivatives(quantity, x)
        return value, np.nan_to_num(gradient)

    start = np.tile(theta, (len(targets), 1))
    inverse = fit.problem.inverse_curvature(start, weights)
    found = minimize(penalised, start, inverse, 1e-10)
    values = quantity(found.x)
    rise = factor * (
        fit.problem.objective(found.x, weights)[0] - fit.objective / fit.problem.delta**2
    )
    z = np.sqrt(np.maximum(rise, 0))
    below, above = values < best, values > best
    low = _crossing(best, values[below], z[below], limit, -np.inf)
    high = _crossing(best, values[above], z[above], limit, np.inf)
    order = np.argsort(values)
    return low, high, np.stack([values[order], z[order]], 1)


def _huber_statistics(delta: float, sd: float) -> tuple[float, float]:
    """For normal residuals of deviation sd: what makes a rise of S / delta^2 a likelihood ratio
    (Ronchetti's tau test, Stat. Probab. Lett. 4, 1986), and the deviation of a run's residual as
    the Huber loss uses it (sd where delta is large, sd sqrt(pi / 2) where it is small).

    With psi(u) = clip(u, -1, 1) at u = r / delta these are 2 E psi' / E psi^2 and
    delta sqrt(E psi^2) / E psi'.
    """
    from scipy.stats import norm

    edge = delta / sd
    inside = float(2 * norm.cdf(edge) - 1)  # E psi'
    square = float((inside - 2 * edge * norm.pdf(edge)) / edge**2 + 1 - inside)  # E psi^2
    return 2 * inside / square, delta * math.sqrt(square) / inside


def derivatives(quantity: Quantity, theta: np.ndarray) -> np.ndarray:
    """[R, P] by central differences, of 1e-6 in every coordinate (they are logarithms)."""
    P, h = theta.shape[1], 1e-6
    shifted = theta[:, None, None] + h * np.stack([np.eye(P), -np.eye(P)])[None]
    values = quantity(shifted.reshape(-1, P)).reshape(len(theta), 2, P)
    return (values[:, 0] - values[:, 1]) / (2 * h)


def _crossing(
    best: float, values: np.ndarray, z: np.ndarray, limit: float, nothing: float
) -> float:
    """Where z first passes the limit on the way out from the best value, by interpolation."""
    order = np.argsort(np.abs(values - best))
    v = np.concatenate([[best], values[order]])
    z = np.concatenate([[0.0], z[order]])
    over = np.flatnonzero(z >= limit)
    if not len(over):
        return nothing
    i = over[0]
    share = (limit - z[i - 1]) / (z[i] - z[i - 1])
    return float(v[i - 1] + share * (v[i] - v[i - 1]))
