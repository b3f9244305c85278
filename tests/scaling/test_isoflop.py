import dataclasses
import math

import numpy as np
import pytest

from bitjax.scaling.isoflop import budgets as budgets_of
from bitjax.scaling.isoflop import frontiers, parabolas
from bitjax.scaling.runs import Runs


def budgets(noise=0.0, flops=(1e15, 1e16, 1e17), power=0.45, steps=5):
    """Parabolas in log N whose lowest point is at 0.1 C^power, at loss 3 - log10(C) / 20."""
    N, D, loss = [], [], []
    for c in flops:
        best = math.log(0.1 * c**power)
        for x in best + (np.linspace(-1.3, 1.0, steps) if isinstance(steps, int) else steps):
            N.append(math.exp(x))
            D.append(c / 6 / N[-1])
            loss.append(3 - math.log10(c) / 20 + 0.05 * (x - best) ** 2)
    loss = np.array(loss) + noise * np.random.default_rng(0).standard_normal(len(loss))
    return Runs.of(N, D, loss, "float")


def test_exact_parabolas_come_back():
    found = parabolas(budgets())
    assert [p.flops for p in found] == pytest.approx([1e15, 1e16, 1e17])
    for p in found:
        assert pytest.approx(0.1 * p.flops**0.45, rel=1e-6) == p.N
        assert p.loss == pytest.approx(3 - math.log10(p.flops) / 20, rel=1e-9)
        assert p.inside
        assert p.se < 1e-6
    (frontier,) = frontiers(found)
    assert frontier.exponent == pytest.approx(0.45, rel=1e-6)
    assert frontier.k == pytest.approx(0.1, rel=1e-4)
    beyond = dataclasses.replace(found[0], flops=1e18, N=1.0, inside=False)
    assert frontiers([*found, beyond]) == [frontier]


def test_budgets_are_where_runs_gather():
    """Runs between two budgets do not chain them together."""
    flops = np.exp([0.0, 0.1, -0.1, 0.02, 0.24, 0.3, 0.5, 0.58, 0.6, 0.62])
    assert [group.tolist() for group in budgets_of(flops)] == [[0, 1, 2, 3], [4, 5], [6, 7, 8, 9]]


def test_they_are_those_of_polyfit():
    runs = budgets(0.01)
    for p, rows in zip(parabolas(runs), np.split(np.arange(15), 3), strict=True):
        x = np.log(runs.N[rows])
        c2, c1, c0 = np.polyfit(x, runs.loss[rows], 2)
        assert math.log(p.N) == pytest.approx(-c1 / 2 / c2, rel=1e-6)
        assert p.loss == pytest.approx(c0 - c1**2 / 4 / c2, rel=1e-8)


def test_error_of_the_lowest_point():
    """Its standard error against the spread over many noises, of sizes that are not symmetric."""
    sizes = [-3.0, -2.9, -2.8, -2.5, -2.0, -1.0, 0.0, 0.2, 0.4]
    r, draw = budgets(flops=(1e16,), steps=np.array(sizes)), np.random.default_rng(1)
    found = [
        parabolas(Runs.of(r.N, r.D, r.loss + 0.001 * draw.standard_normal(9)))[0]
        for _ in range(400)
    ]
    spread = np.std([math.log(p.N) for p in found])
    assert np.median([p.se for p in found]) == pytest.approx(spread, rel=0.12)


def test_what_has_no_lowest_point():
    runs = budgets(flops=(1e15,))
    assert parabolas(Runs.of(runs.N, runs.D, 5 - runs.loss)) == []
    outside = runs[np.median(runs.N) > runs.N]
    with pytest.raises(ValueError, match="no arm has 3 sizes at one budget"):
        parabolas(outside)
    left = runs[np.argsort(runs.N)[:3]]
    (found,) = parabolas(Runs.of(left.N, left.D, left.loss))
    assert not found.inside
    assert frontiers([found]) == []
