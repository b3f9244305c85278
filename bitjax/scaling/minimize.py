"""Many small minimisations at once: BFGS on a stack of problems, in NumPy.

A bootstrap of a scaling law solves thousands of problems of 5 to 15 unknowns; one after the other
they are bound by Python, stacked they are matrix products. The line search is bisection to the weak
Wolfe conditions, which BFGS needs on objectives that are nearly not smooth, as a sum of Huber
losses with a small delta is (Lewis and Overton, "Nonsmooth optimization via quasi-Newton methods",
Math. Program. 141, 2013).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# f(x, rows) -> values [r] and gradients [r, P] of the problems `rows` [r] at x [r, P].
Objective = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]

ARMIJO, CURVATURE = 1e-4, 0.9
SEARCHES = 40  # halvings reach 1e-12 of a step
STALLED, IDLE = 1e-10, 4  # a value that changes less, relatively, so many steps in a row, is final
RESETS = 2  # of a problem whose search fails, to its first curvature


class Minima(NamedTuple):
    """Points [R, P], their values [R], and which met the tolerance [R]."""

    x: np.ndarray
    value: np.ndarray
    converged: np.ndarray


def minimize(
    objective: Objective, x: np.ndarray, inverse: np.ndarray,
    tolerance: float = 1e-9, steps: int = 500,
) -> Minima:  # fmt: skip
    """Minimise R problems of P unknowns.

    Args:
        objective: of any subset of the problems.
        x: [R, P] starts.
        inverse: [R, P, P] guesses of the inverse Hessians; they set the scale of every direction.
        tolerance: a problem is done when its expected gain, half of g' H g, is below
            `tolerance * (tolerance + |value|)`, or when steps no longer change its value: one
            whose lowest point is at infinity (a law whose E is 0) comes to an end so.
        steps: at most.
    """
    x, H = x.copy(), inverse.copy()
    rows = np.arange(len(x))
    f, g = objective(x, rows)
    done = np.zeros(len(x), bool)
    resets, idle = np.zeros(len(x), int), np.zeros(len(x), int)
    for _ in range(steps):
        gain = np.einsum("rp,rpq,rq->r", g, H, g) / 2
        done |= gain < tolerance * (tolerance + np.abs(f))
        left = rows[~done & (resets <= RESETS)]
        if not len(left):
            break
        direction = -np.einsum("rpq,rq->rp", H[left], g[left])
        moved, f_new, g_new, ok = _search(objective, left, x[left], f[left], g[left], direction)
        small = f[left] - f_new <= STALLED * (1 + np.abs(f_new))
        idle[left] = np.where(small & ok, idle[left] + 1, 0)
        done |= idle >= IDLE
        s, y = moved - x[left], g_new - g[left]
        x[left], f[left], g[left] = moved, f_new, g_new
        H[left] = _update(H[left], s, y)
        failed = left[~ok]
        H[failed] = inverse[failed]
        resets[failed] += 1
    return Minima(x, f, done)


def _search(
    objective: Objective, rows: np.ndarray, x: np.ndarray, f: np.ndarray, g: np.ndarray,
    direction: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Points along `direction` that meet the weak Wolfe conditions, by bracketing and bisection.

    Returns points, values, gradients, and which met them; the best point met with otherwise.
    """
    slope = np.einsum("rp,rp->r", g, direction)
    low, high, t = np.zeros(len(x)), np.full(len(x), np.inf), np.ones(len(x))
    best_x, best_f, best_g = x.copy(), f.copy(), g.copy()
    met = np.zeros(len(x), bool)
    for _ in range(SEARCHES):
        i = np.flatnonzero(~met)
        if not len(i):
            break
        point = x[i] + t[i, None] * direction[i]
        value, gradient = objective(point, rows[i])
        value = np.where(np.isfinite(value), value, np.inf)
        too_far = ~(value <= f[i] + ARMIJO * t[i] * slope[i])
        too_near = ~too_far & (np.einsum("rp,rp->r", gradient, direction[i]) < CURVATURE * slope[i])
        better = value < best_f[i]
        best_x[i[better]], best_f[i[better]] = point[better], value[better]
        best_g[i[better]] = gradient[better]
        met[i] = ~too_far & ~too_near
        high[i[too_far]] = t[i[too_far]]
        low[i[too_near]] = t[i[too_near]]
        bounded = np.isfinite(high[i])
        middle = (low[i] + np.where(bounded, high[i], 0)) / 2
        t[i] = np.where(met[i], t[i], np.where(bounded, middle, 2 * t[i]))
    return best_x, best_f, best_g, met


def _update(H: np.ndarray, s: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The BFGS update of inverse Hessians [r, P, P]; unchanged where the curvature is not positive.

    H' = (I - s y'/c) H (I - y s'/c) + s s'/c, c = s'y
    """
    c = np.einsum("rp,rp->r", s, y)
    usable = c > 1e-14 * np.linalg.norm(s, axis=1) * np.linalg.norm(y, axis=1)
    usable &= c > 0
    c = np.where(usable, c, 1.0)
    Hy = np.einsum("rpq,rq->rp", H, y)
    yHy = np.einsum("rp,rp->r", y, Hy)
    ss = s[:, :, None] * s[:, None, :]
    sHy = s[:, :, None] * Hy[:, None, :]
    cross = sHy + sHy.transpose(0, 2, 1)
    with np.errstate(over="ignore", invalid="ignore"):
        new = H + ((1 + yHy / c) / c)[:, None, None] * ss - cross / c[:, None, None]
    usable &= np.isfinite(new).all((1, 2))
    return np.where(usable[:, None, None], new, H)
