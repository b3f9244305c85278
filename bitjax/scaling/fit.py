"""Fitting a law: the sum of Huber losses of log loss, as Hoffmann et al. (arXiv 2203.15556, D.2).

    S(theta) = sum over runs of w Huber_delta(log L(theta) - log loss)

    Huber_delta(r) = r^2 / 2 where |r| <= delta, else delta (|r| - delta / 2)

The sum, not the mean: with the mean, optimisers stop early and intervals come out far too narrow
(Besiroglu et al., arXiv 2404.10102). Starts come by variable projection: for each pair of exponents
on a grid, E, A and B follow from a linear problem (non-negative least squares of L / loss), so the
grid has 2 dimensions where theirs has 5. On Chinchilla's points the curvature (J'J) has a condition
number of 1.8e13 in A, B, E, alpha and beta, 4e6 with logarithms of the first three, 1.2 in alpha
and beta once these are projected out; each start goes through BFGS scaled by its own curvature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bitjax.scaling.laws import OFFSETS, Form, Law, logsumexp
from bitjax.scaling.minimize import Minima, minimize
from bitjax.scaling.runs import Runs, check_runs

DELTA = 1e-3  # Hoffmann et al., D.2
EXPONENTS = (0.05, 0.15, 0.3, 0.5, 0.8, 1.2)  # of the grid of starts, each of alpha and beta
RIDGE = 1e-9  # of the scaled curvature: for directions that the runs do not see
BLIND = 1e-6  # of the largest scale: the smallest, of a term whose share of the loss is gone


@dataclass(frozen=True)
class Problem:
    """A law and the runs to fit it to.

    Attributes:
        X: [3, n, P] the law's design.
        arm: [n] positions of the runs' arms in the law's.
        y: [n] log losses.
        delta: of the Huber loss.
    """

    law: Law
    X: np.ndarray
    arm: np.ndarray
    y: np.ndarray
    delta: float

    @classmethod
    def of(cls, law: Law, runs: Runs, delta: float = DELTA) -> Problem:
        """The problem of some runs, whose arms the law must have."""
        arm = law.index(runs.arm)
        return cls(law, law.design(runs.N, runs.D, arm), arm, np.log(runs.loss), delta)

    def residuals(self, theta: np.ndarray) -> np.ndarray:
        """log L - log loss, [R, n], for theta [R, P]."""
        return logsumexp(self.law.exponents(theta, self.X, self.arm))[0] - self.y

    def jacobian(self, theta: np.ndarray) -> np.ndarray:
        """Derivatives of log L, [R, n, P]."""
        share = logsumexp(self.law.exponents(theta, self.X, self.arm))[1]
        return self.law.jacobian(theta, self.X, self.arm, share)

    def objective(self, theta: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """S / delta^2 [R], of size 1 to 1000 with losses' usual noise, and its gradient [R, P].

        Args:
            weights: [R, n] of the runs (or [1, n]).
        """
        value, share = logsumexp(self.law.exponents(theta, self.X, self.arm))
        r = (value - self.y) / self.delta
        clipped = np.clip(r, -1, 1)
        S = (weights * clipped * (r - clipped / 2)).sum(1)  # r^2/2 inside, |r| - 1/2 outside
        share *= (weights * clipped / self.delta)[:, None]
        return S, self.law.gradient(theta, self.X, self.arm, share)

    def inverse_curvature(self, theta: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """[R, P, P]: inverse of J' W J with the weights of iteratively reweighted least squares."""
        value, share = logsumexp(self.law.exponents(theta, self.X, self.arm))
        J = self.law.jacobian(theta, self.X, self.arm, share)
        r = np.abs(value - self.y)
        w = weights / self.delta**2 * np.minimum(1, self.delta / np.maximum(r, 1e-300))
        H = np.einsum("rnp,rn,rnq->rpq", J, w, J)
        scale = np.sqrt(np.einsum("rpp->rp", H))
        scale = np.maximum(scale, BLIND * scale.max(1, keepdims=True))
        correlation = H / (scale[:, :, None] * scale[:, None, :])
        diagonal = np.arange(H.shape[1])
        correlation[:, diagonal, diagonal] = 1 + RIDGE
        return np.linalg.inv(correlation) / (scale[:, :, None] * scale[:, None, :])

    def minimize(self, starts: np.ndarray, weights: np.ndarray) -> Minima:
        """From each start [R, P], with its own weights [R, n]."""
        W = np.broadcast_to(weights, (len(starts), weights.shape[-1]))

        def part(theta: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return self.objective(theta, W[rows])

        return minimize(part, starts, self.inverse_curvature(starts, W))

    def starts(self, runs: Runs) -> np.ndarray:
        """[R, P] by variable projection over the grid of exponents."""
        from scipy.optimize import nnls

        law, found = self.law, []
        own = [name for name in ("a", "b", "e") if name in OFFSETS[law.form]]
        own += ["a"] if "h" in OFFSETS[law.form] else []
        groups = {name: self.arm if name in own else np.zeros_like(self.arm) for name in "abe"}
        n, d = np.log(runs.N), np.log(runs.D)
        for alpha in EXPONENTS:
            for beta in EXPONENTS:
                powers = {"a": np.exp(-alpha * (n - n.mean())),
                          "b": np.exp(-beta * (d - d.mean())), "e": np.ones_like(n)}  # fmt: skip
                columns = {
                    (name, k): powers[name] * (groups[name] == k)
                    for name in "abe" for k in range(groups[name].max() + 1)
                }  # fmt: skip
                matrix = np.stack(list(columns.values()), 1) / runs.loss[:, None]
                solved, _ = nnls(matrix, np.ones_like(n))
                floor = 1e-2 * runs.loss.mean() / len(columns)  # a term at 0 has no logarithm
                logs = dict(zip(columns, np.log(np.maximum(solved, floor)), strict=True))
                found.append(self._start(alpha, beta, logs, (n.mean(), d.mean())))
        return np.array(found)

    def _start(
        self, alpha: float, beta: float, logs: dict[tuple[str, int], float],
        mean: tuple[float, float],
    ) -> np.ndarray:  # fmt: skip
        shift = {"a": alpha * mean[0], "b": beta * mean[1], "e": 0.0}
        base = {name: logs[name, 0] + shift[name] for name in "abe"}
        base |= {"alpha": alpha, "beta": beta, "log gamma_w": 1.0}
        theta = []
        for name in self.law.names:
            plain, _, of = name.partition("[")
            if not of:
                theta.append(base[plain])
                continue
            k = self.law.arms.index(of[:-1])
            term = "a" if plain == "h" else plain
            theta.append(logs.get((term, k), logs.get((term, 0), 0.0)) - logs.get((term, 0), 0.0))
        return np.array(theta)


@dataclass(frozen=True)
class Fit:
    """A law at its best parameters.

    Attributes:
        theta: [P] fitted coordinates, named by `law.names`.
        objective: S at theta, the sum of Huber losses.
        problem: what was fitted.
        runs: to which.
        starts: how many of the starts ended within 1e-6 (relative) of the best.
    """

    law: Law
    theta: np.ndarray
    objective: float
    problem: Problem
    runs: Runs
    starts: tuple[int, int]

    @property
    def natural(self) -> dict[str, float]:
        """Parameters as `Law.natural` has them."""
        return {name: float(value[0]) for name, value in self.law.natural(self.theta).items()}

    @property
    def residuals(self) -> np.ndarray:
        """log L - log loss, [n]."""
        return self.problem.residuals(self.theta[None])[0]

    @property
    def jacobian(self) -> np.ndarray:
        """[n, P] derivatives of log L at theta."""
        return self.problem.jacobian(self.theta[None])[0]


def law_for(runs: Runs, form: Form, arms: tuple[str, ...]) -> Law:
    """The law of a form, if the runs can be fitted by it.

    Raises:
        ValueError: see `check_runs` and `Law`; an arm of fewer runs than it has parameters.
    """
    center = (float(np.log(runs.N).mean()), float(np.log(runs.D).mean()))
    law = Law(form, arms, center)
    check_runs(runs, len(law.names))
    for arm in law.arms[1:]:
        if (count := int((runs.arm == arm).sum())) <= (own := len(OFFSETS[form])):
            raise ValueError(
                f"{count} runs of arm {arm!r} are too few for the {own} parameters that the "
                f"{form} law gives it"
            )
    return law


def fit_law(
    runs: Runs, form: Form = "shared", arms: tuple[str, ...] | None = None,
    delta: float = DELTA, start: np.ndarray | None = None, simpler: Sequence[Fit] = (),
) -> Fit:  # fmt: skip
    """Fit one form to runs.

    Args:
        arms: those of the law, the reference first (default: those of the runs, float first).
        start: [P] one start in place of the grid.
        simpler: fits of other forms to the same runs, which are starts as well: a form that holds
            another never fits worse.

    Raises:
        ValueError: see `check_runs` and `Law`; no start converged.
    """
    law = law_for(runs, form, arms or runs.arms)
    problem = Problem.of(law, runs, delta)
    starts = problem.starts(runs) if start is None else start[None]
    inherited = [_inherited(law, fit) for fit in simpler if fit.law.arms == law.arms]
    starts = np.concatenate([starts, *(theta[None] for theta in inherited)])
    found = problem.minimize(starts, np.ones((1, len(runs))))
    value = np.where(np.isfinite(found.value), found.value, np.inf)
    best = int(value.argmin())
    if not np.isfinite(value[best]):
        raise ValueError(f"no start of the {form} law came to an end; are the losses of one kind?")
    near = int((value <= value[best] * (1 + 1e-6)).sum())
    return Fit(
        law, found.x[best], float(value[best]) * delta**2, problem, runs, (near, len(starts))
    )


def _inherited(law: Law, fit: Fit) -> np.ndarray:
    """The coordinates [P] at which a law says what a fit of another form says, if it can."""
    values = dict(zip(fit.law.names, fit.theta, strict=True))
    if law.form == "separate":  # a factor eta of N is one of A
        values |= {name.replace("h[", "a["): x for name, x in values.items() if name[:2] == "h["}
    neutral = {"log gamma_w": 1.0}
    return np.array([values.get(name, neutral.get(name, 0.0)) for name in law.names])
