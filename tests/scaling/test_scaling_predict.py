import math

import numpy as np
import pytest
import synthetic_runs as synthetic
from scipy.optimize import brentq
from synthetic_runs import ARMS, ETA, TRUTH, plain

from bitjax.config.prices import Prices
from bitjax.scaling.ensemble import Ensemble, Member, estimates
from bitjax.scaling.laws import Law
from bitjax.scaling.predict import _left, closing, costs, next_runs, predict
from bitjax.scaling.shapes import model_bytes

N, D = [1e9, 1e11], [2e10, 2e12]


def ensemble(form="eta", theta=TRUTH, sd=0.01, draws=400, center=(0.0, 0.0), noise=0.004):
    """A law with normal draws around it."""
    spread = sd * np.random.default_rng(0).standard_normal((draws, len(theta)))
    return Ensemble((Member(Law(form, ARMS, center), theta, theta + spread, 1.0, noise),))


def test_an_eta_law_in_closed_form():
    for made, n, d in zip(predict(ensemble(sd=0), "ternary", N, D), N, D, strict=True):
        assert made.reference.best == pytest.approx(plain(n, d))
        assert made.arm.best == pytest.approx(plain(n, d, ETA))
        assert made.gap == pytest.approx([plain(n, d, ETA) - plain(n, d)] * 3)
        assert made.relative.best == pytest.approx(math.log(plain(n, d, ETA) / plain(n, d)))
        assert made.parameters == pytest.approx([1 / ETA] * 3)
        for (rival, bits), found in made.memory.items():
            rival_bits = {"bf16": 16, "int4": 4.5}[rival]
            expected = model_bytes(n / ETA, bits) / model_bytes(n, rival_bits)
            assert found.best == pytest.approx(expected, rel=1e-3)
        assert set(made.memory) == {(r, b) for r in ("bf16", "int4") for b in (1.6, 2.0)}


@pytest.mark.parametrize("form", ["drift", "eta-e", "separate", "precision"])
def test_equal_loss_is_where_the_losses_meet(form):
    offsets = {
        "drift": [0.18, -0.01, 0.02], "eta-e": [0.15, -0.004], "precision": [1.0],
        "separate": [0.1, 0.01, -0.01, -0.002, 0.001],
    }  # fmt: skip
    theta = np.array([*TRUTH[:5], *offsets[form]])
    law = Law(form, ARMS, (14.0, 18.0))
    made = ensemble(form, theta, 0, center=(14.0, 18.0))
    for n, d, factor in zip(N, D, (p.parameters.best for p in predict(made, "ternary", N, D)),
                            strict=True):  # fmt: skip
        goal = law.loss(theta, [n], [d], "float")[0, 0]

        def off(x, d=d, goal=goal):
            return law.loss(theta, [math.exp(x)], [d], "ternary")[0, 0] - goal

        root = brentq(off, math.log(n) - 5, math.log(n) + 8, xtol=1e-12)
        assert factor == pytest.approx(math.exp(root) / n, rel=1e-6)


def test_a_floor_above_the_reference_has_no_equal():
    theta = np.array([*TRUTH[:5], 0.05])  # E of the arm 5 % higher
    found = predict(ensemble("own-e", theta, 0), "ternary", [1e12], [1e16])[0]
    assert found.parameters == (math.inf,) * 3
    assert found.memory["bf16", 1.6].best == math.inf
    assert found.closed == 0
    shrinking = np.array([*TRUTH[:5], 0.18, 0.4, 0.0])  # more parameters, more loss
    found = predict(ensemble("drift", shrinking, 0, center=(25.0, 25.0)), "ternary", N, D)
    assert found[0].parameters.best == math.inf


def test_int4_has_its_own_loss_where_it_was_run():
    law = Law("eta", ("float", "ternary", "ptq_int4"))
    theta = np.array([*TRUTH, -TRUTH[3] * math.log(0.8)])
    made = Ensemble((Member(law, theta, theta[None], 1.0, 0.004),))
    (found,) = predict(made, "ternary", N[:1], D[:1])
    own = model_bytes(0.8 * N[0] / ETA, 1.6) / model_bytes(N[0], 4.5)
    assert found.memory["int4", 1.6].best == pytest.approx(own, rel=1e-3)
    bf16 = model_bytes(N[0] / ETA, 1.6) / model_bytes(N[0], 16)
    assert found.memory["bf16", 1.6].best == pytest.approx(bf16, rel=1e-3)


def test_probability_counts_draws():
    eta = np.array([0.5, 0.7, 0.9, 0.99])
    draws = np.tile(TRUTH, (4, 1))
    draws[:, 5] = -TRUTH[3] * np.log(eta)
    made = Ensemble((Member(Law("eta", ARMS), TRUTH, draws, 1.0, 0.004),))
    for k, tolerance in enumerate([*(plain(1e9, 2e10, eta) - plain(1e9, 2e10))]):
        (found,) = predict(made, "ternary", [1e9], [2e10], tolerance + 1e-12)
        assert found.closed == (4 - k) / 4


def test_closing_gaps():
    """A law of a higher floor whose gap grows, and one of fewer effective parameters; 1 to 3."""
    draws = np.array([[*TRUTH[:5], 0.0, 0.02]] + [[*TRUTH, 0.0]] * 3 + [[*TRUTH[:5], 0.0, -0.01]])
    made = Ensemble((Member(Law("eta-e", ARMS), draws[0], draws, 1.0, 0.004),))
    assert closing(made, "ternary", N[::-1], D[::-1]) == (4 / 5, 1 / 5)


def test_laws_share_draws_by_weight():
    first, second = ensemble(sd=0.01).members[0], ensemble("own-e", sd=0.01).members[0]
    both = Ensemble((
        Member(first.law, first.theta, first.draws, 0.75, 0.004),
        Member(second.law, second.theta, second.draws, 0.25, 0.009),
    ))  # fmt: skip
    parts = both.parts()
    assert [len(thetas) for _, thetas in parts] == [1, 300, 100]
    losses = both.losses([1e8], 1e9, "ternary")
    assert losses[0, 0] == pytest.approx(plain(1e8, 1e9, ETA))
    np.testing.assert_allclose(
        losses[301:, 0], second.law.loss(second.draws[:100], [1e8], [1e9], "ternary")[:, 0]
    )
    with pytest.raises(ValueError, match="wants one set of arms, got 2"):
        Ensemble((first, Member(Law("eta", ("float", "x")), TRUTH, TRUTH[None], 1.0, 0.0)))


def test_estimates_know_infinity():
    values = np.array([[1.0], *([[2.0]] * 90), *([[math.inf]] * 10)])
    (found,) = estimates(values)
    assert found == (1.0, 2.0, math.inf)


def test_what_is_left_is_the_conditional_variance():
    draw = np.random.default_rng(0)
    both = draw.multivariate_normal([0, 0, 0], [[4, 1.5, 1], [1.5, 1, 0.2], [1, 0.2, 2]], 200_000)
    noise = np.array([0.5, 0.3])
    C = np.array([[1.5, 0.2], [0.2, 2.3]])
    expected = 4 - np.array([1.5, 1]) @ np.linalg.solve(C, [1.5, 1])
    assert _left(both[:, 0], both[:, 1:], noise) == pytest.approx(expected, rel=0.06)


def test_costs():
    prices = Prices(1e15, 3.0)
    today, found = costs(ensemble(), "ternary", N, D, (1e11, 2e12), prices, 0.01)
    assert found[0].flops == 2 * 6 * 1e9 * 2e10
    assert found[0].hours == pytest.approx(found[0].flops / 3.6e18)
    assert found[0].dollars == pytest.approx(3 * found[0].hours)
    assert found[1].memory == model_bytes(1e11, 1.6)
    # The pair at the target itself leaves no more than the noise of two runs, nor than today.
    noise = 2 * 1.96 * math.sqrt(2) * 0.004 * plain(1e11, 2e12)
    assert found[1].outcome.interval < min(noise, today.interval)
    assert all(c.outcome.interval < today.interval for c in found)
    gap = plain(1e11, 2e12, ETA) - plain(1e11, 2e12)
    near, _ = costs(ensemble(), "ternary", N, D, (1e11, 2e12), prices, gap)
    far, _ = costs(ensemble(), "ternary", N, D, (1e11, 2e12), prices, gap + today.interval)
    assert (near.settled, far.settled) == (False, True)


def test_the_next_run_measures_what_is_unknown():
    """All that varies is eta: the ternary arm tells it, the float arm nothing."""
    draws = np.tile(TRUTH, (500, 1))
    draws[:, 5] += 0.05 * np.random.default_rng(1).standard_normal(500)
    made = Ensemble((Member(Law("eta", ARMS), TRUTH, draws, 1.0, 0.004),))
    found = next_runs(made, "ternary", (1e9, 2e10), [1e5, 1e6], [20, 80], 1e15)
    assert found[0].arms == ("ternary",)
    assert found[0].N == 1e5  # where N counts most
    of_float = [c.interval for c in found if c.arms == ("float",)]
    assert of_float == pytest.approx([1.0] * 4)
    one = next(c for c in found if c.arms == ("ternary",) and (c.N, c.D) == (1e5, 8e6))
    logs = np.log(made.losses([1e5], 8e6, "ternary"))[1:, 0]
    left = 0.004**2 / (0.004**2 + logs.var())
    assert one.interval == pytest.approx(math.sqrt(left), rel=0.05)
    cheap = next_runs(made, "ternary", (1e9, 2e10), [1e5, 1e6], [20, 80], 2e12)
    assert {(c.arms, c.N, c.D) for c in cheap} == {
        (("float",), 1e5, 2e6), (("ternary",), 1e5, 2e6)
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"a budget of 10 FLOPs pays for none"):
        next_runs(made, "ternary", (1e9, 2e10), [1e5], [20], 10)


def test_errors():
    with pytest.raises(ValueError, match="arm 'float' is the reference"):
        predict(ensemble(), "float", N, D)
    with pytest.raises(ValueError, match="the fit has no arm 'binary'"):
        predict(ensemble(), "binary", N, D)
    with pytest.raises(ValueError, match="dollars_per_hour=0 is not a number above 0"):
        Prices(1e15, 0)
    assert synthetic.runs().arms == ARMS
