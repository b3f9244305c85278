"""IsoFLOP parabolas: at equal compute, which size has the lowest loss.

Runs whose FLOPs nearly agree are a budget. For each arm and budget of three or more sizes

    loss = c0 + c1 (log N - m) + c2 (log N - m)^2,    N_opt = exp(m - c1 / 2 c2)     if c2 > 0

by least squares; then N_opt = k C^s over the budgets (Hoffmann et al., arXiv 2203.15556, approach
2). A law predicts s = beta / (alpha + beta), so the two methods check one another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bitjax.scaling.runs import Runs

SAME_BUDGET = 0.15  # of log FLOPs, from the middle of a budget
MIN_SIZES = 3  # of a parabola


@dataclass(frozen=True)
class Parabola:
    """One budget of one arm.

    Attributes:
        flops: geometric mean of its runs'.
        N, loss: at the lowest point.
        coefficients: c0, c1, c2 around `middle`.
        middle: m.
        se: of log N at the lowest point; NaN where as many sizes as coefficients leave none.
        inside: whether the lowest point lies between the sizes; outside it is extrapolated.
    """

    arm: str
    flops: float
    N: float
    loss: float
    coefficients: tuple[float, float, float]
    middle: float
    se: float
    inside: bool


@dataclass(frozen=True)
class Frontier:
    """N_opt = k C^exponent of an arm; exponent's standard error NaN with two budgets."""

    arm: str
    k: float
    exponent: float
    se: float


def parabolas(runs: Runs, tolerance: float = SAME_BUDGET) -> list[Parabola]:
    """Of every arm and budget that has a lowest point.

    Raises:
        ValueError: no budget has three sizes.
    """
    found, tried = [], 0
    for arm in runs.arms:
        of = runs[runs.arm == arm]
        for group in budgets(6 * of.N * of.D, tolerance):
            if len(np.unique(of.N[group])) < MIN_SIZES:
                continue
            tried += 1
            if (parabola := _parabola(arm, of[group])) is not None:
                found.append(parabola)
    if not tried:
        raise ValueError(
            f"no arm has {MIN_SIZES} sizes at one budget (FLOPs that differ by {tolerance:.0%} "
            "or less), which a parabola needs"
        )
    return found


def budgets(flops: np.ndarray, tolerance: float = SAME_BUDGET) -> list[np.ndarray]:
    """Groups of runs [n], as positions, by ascending FLOPs: around the run that most others
    are near, then of the rest, until every run is in one."""
    x, found = np.log(flops), []
    left = np.ones(len(x), bool)
    while left.any():
        near = (np.abs(x[:, None] - x) <= tolerance) & left & left[:, None]
        group = near[near.sum(1).argmax()]
        found.append(np.flatnonzero(group))
        left &= ~group
    return sorted(found, key=lambda group: float(x[group].mean()))


def _parabola(arm: str, runs: Runs) -> Parabola | None:
    x = np.log(runs.N)
    m = float(x.mean())
    design = np.stack([np.ones_like(x), x - m, (x - m) ** 2], 1)
    c = np.linalg.lstsq(design, runs.loss)[0]
    if c[2] <= 0:
        return None
    best = -c[1] / (2 * c[2])
    se = math.nan
    if (free := len(x) - 3) > 0:
        variance = float(((runs.loss - design @ c) ** 2).sum() / free)
        slope = np.array([0, -1 / (2 * c[2]), c[1] / (2 * c[2] ** 2)])
        se = math.sqrt(variance * slope @ np.linalg.inv(design.T @ design) @ slope)
    flops = float(np.exp(np.log(6 * runs.N * runs.D).mean()))
    return Parabola(
        arm, flops, math.exp(m + best), float(c[0] - c[1] ** 2 / (4 * c[2])),
        (float(c[0]), float(c[1]), float(c[2])), m, se,
        bool(x.min() - m <= best <= x.max() - m),
    )  # fmt: skip


def frontiers(found: list[Parabola]) -> list[Frontier]:
    """Of every arm with two budgets or more whose lowest point lies between its sizes."""
    result = []
    for arm in dict.fromkeys(p.arm for p in found):
        of = [p for p in found if p.arm == arm and p.inside]
        if len(of) < 2:
            continue
        x, y = np.log([p.flops for p in of]), np.log([p.N for p in of])
        slope, intercept = np.polyfit(x, y, 1)
        se = math.nan
        if len(of) > 2:
            left = y - slope * x - intercept
            se = math.sqrt(float(left @ left) / (len(of) - 2) / float(((x - x.mean()) ** 2).sum()))
        result.append(Frontier(arm, math.exp(intercept), float(slope), se))
    return result
