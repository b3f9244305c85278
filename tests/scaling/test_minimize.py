import numpy as np
import pytest

from bitjax.scaling.minimize import minimize


def rosenbrock(x):
    a, b = x[:, 0], x[:, 1]
    value = (1 - a) ** 2 + 100 * (b - a**2) ** 2
    return value, np.stack([-2 * (1 - a) - 400 * a * (b - a**2), 200 * (b - a**2)], 1)


def test_a_stack_of_valleys():
    starts = np.random.default_rng(0).uniform(-2, 2, (50, 2))
    found = minimize(lambda x, rows: rosenbrock(x), starts, np.tile(1e-3 * np.eye(2), (50, 1, 1)))
    assert found.converged.all()
    np.testing.assert_allclose(found.x, 1, atol=1e-4)


def test_each_problem_has_its_own_objective():
    """Medians of weighted points, by a Huber loss that is nearly |x|."""
    draw = np.random.default_rng(1)
    y, weights = draw.standard_normal(31), draw.integers(0, 4, (20, 31)).astype(float)

    def objective(x, rows):
        r = (x - y) / 1e-6
        clipped = np.clip(r, -1, 1)
        w = weights[rows]
        value = (w * clipped * (r - clipped / 2)).sum(1)
        return value * 1e-6, (w * clipped).sum(1, keepdims=True)

    found = minimize(objective, np.zeros((20, 1)), np.full((20, 1, 1), 0.1), 1e-12)
    for x, w, value in zip(found.x[:, 0], weights, found.value, strict=True):
        lowest = min((w * abs(c - y)).sum() for c in y)
        assert value == pytest.approx(lowest, abs=1e-3 * lowest)
        assert abs((w * np.sign(x - y)).sum()) <= w.max()


def test_a_lowest_point_at_infinity():
    """exp(-x) falls for ever; its value comes to an end."""
    found = minimize(
        lambda x, rows: (1 + np.exp(-x[:, 0]), -np.exp(-x)), np.zeros((3, 1)), np.ones((3, 1, 1))
    )
    assert found.converged.all()
    np.testing.assert_allclose(found.value, 1, atol=1e-6)


def test_infinite_values_are_stepped_back_from():
    def objective(x, rows):
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(x[:, 0] > 0, x[:, 0] - np.log(x[:, 0]), np.nan), 1 - 1 / x

    found = minimize(objective, np.array([[0.01], [30.0]]), np.full((2, 1, 1), 50.0))
    np.testing.assert_allclose(found.x, 1, atol=1e-4)
