import numpy as np
import pytest
from synthetic_runs import ALPHA, BETA, ETA, A, B, E, plain

from bitjax.scaling.laws import BITS, FORMS, GAMMA_A, Law, logsumexp

N, D = np.array([1e5, 1e6, 2e6, 5e7]), np.array([3e6, 2e7, 4e8, 1e9])
BASE = [np.log(A), np.log(B), np.log(E), ALPHA, BETA]


def losses(form, theta, arm, center=(0.0, 0.0)):
    return Law(form, ("float", "ternary"), center).loss(np.array(theta), N, D, arm)[0]


@pytest.mark.parametrize("form", FORMS)
def test_the_reference_is_chinchilla_in_every_form(form):
    offsets = len(Law(form, ("float", "ternary")).names) - 5
    found = losses(form, [*BASE, *([0.3] * offsets)], "float")
    np.testing.assert_allclose(found, plain(N, D), rtol=1e-13)


def test_the_other_arm_is_what_the_form_says():
    center = (13.0, 17.0)
    h = -ALPHA * np.log(ETA)
    p, q = -ALPHA * 0.04, -ALPHA * -0.03
    n_eff = ETA * N * (N / np.exp(13.0)) ** 0.04 * (D / np.exp(17.0)) ** -0.03
    gamma = 2.5
    factor = (1 - np.exp(-np.log2(3) / gamma)) * (1 - np.exp(-8 / GAMMA_A))
    expected = {
        "shared": ([], plain(N, D)),
        "eta": ([h], plain(N, D, ETA)),
        "drift": ([h, p, q], plain(n_eff, D)),
        "own-e": ([0.2], plain(N, D, e=E * np.exp(0.2))),
        "eta-e": ([h, 0.2], plain(N, D, ETA, e=E * np.exp(0.2))),
        "separate": (
            [0.1, 0.2, -0.1, 0.02, -0.03],
            plain(
                N, D, 1, E * np.exp(-0.1), A * np.exp(0.1), B * np.exp(0.2), ALPHA + 0.02,
                BETA - 0.03,
            ),
        ),
        "precision": ([np.log(gamma)], plain(N, D, factor)),
    }  # fmt: skip
    assert set(expected) == set(FORMS)
    for form, (offsets, loss) in expected.items():
        found = losses(form, [*BASE, *offsets], "ternary", center)
        np.testing.assert_allclose(found, loss, rtol=1e-12, err_msg=form)


@pytest.mark.parametrize("form", FORMS)
def test_derivatives(form):
    law = Law(form, ("float", "ternary", "binary"), (13.0, 17.0))
    arm = np.array([0, 1, 2, 1])
    X = law.design(N, D, arm)
    draw = np.random.default_rng(0)
    offsets = 0.1 * draw.standard_normal((3, len(law.names) - 5))
    theta = np.concatenate([np.tile(BASE, (3, 1)), offsets], 1)

    def log_loss(t):
        return logsumexp(law.exponents(t, X, arm))[0]

    share = logsumexp(law.exponents(theta, X, arm))[1]
    found = law.jacobian(theta, X, arm, share)
    weight = draw.standard_normal((3, 3, 4))
    sums = law.gradient(theta, X, arm, weight)
    for k in range(len(law.names)):
        step = 1e-6 * np.eye(len(law.names))[k]
        numeric = (log_loss(theta + step) - log_loss(theta - step)) / 2e-6
        np.testing.assert_allclose(found[:, :, k], numeric, rtol=1e-6, atol=1e-8)
        terms = law.exponents(theta + step, X, arm) - law.exponents(theta - step, X, arm)
        np.testing.assert_allclose(sums[:, k], (weight * terms).sum((1, 2)) / 2e-6, rtol=1e-6)


def test_natural_parameters():
    law = Law("drift", ("float", "ternary"), (13.0, 17.0))
    shown = law.natural(np.array([*BASE, -ALPHA * np.log(ETA), -ALPHA * 0.04, ALPHA * 0.03]))
    expected = {
        "A": A, "B": B, "E": E, "alpha": ALPHA, "beta": BETA, "eta[ternary]": ETA,
        "N power[ternary]": 0.04, "D power[ternary]": -0.03,
    }  # fmt: skip
    assert list(shown) == list(expected)
    for name, value in expected.items():
        assert shown[name][0] == pytest.approx(value, rel=1e-12)
    own = Law("separate", ("float", "ternary")).natural(np.array([*BASE, 0.1, 0, 0.2, 0.02, 0]))
    assert own["A[ternary]"][0] == pytest.approx(A * np.exp(0.1))
    assert own["E[ternary]"][0] == pytest.approx(E * np.exp(0.2))
    assert own["alpha[ternary]"][0] == pytest.approx(ALPHA + 0.02)


def test_kumars_extrapolation_to_ternary_weights():
    """1 - exp(-1.585 / 2.6745) is 0.447; the report's 0.446 takes 1.58 bits."""
    law = Law("precision", ("float", "ternary_float_activations"))
    theta = np.array([*BASE, np.log(2.6745)])
    assert law.natural(theta)["eta[ternary_float_activations]"][0] == pytest.approx(0.446, abs=2e-3)
    assert BITS["float"] == (np.inf, np.inf)


def test_errors():
    for arguments, message in (
        (("lots", ("float",)), "no law 'lots'; there are shared, eta"),
        (("eta", ()), "arms none: want one or more"),
        (("eta", ("a", "a")), "arms a, a: want one or more, each once"),
        (("precision", ("float", "odd")), "arm 'odd' has none"),
    ):
        with pytest.raises(ValueError, match=message):
            Law(*arguments)
    with pytest.raises(ValueError, match="the fit has no arm 'binary'; it has float, ternary"):
        losses("eta", [*BASE, 0.1], "binary")
