"""Stochastic rounding against its equation: means and variances over many draws.

A mean of n draws of variance v lies within 5 sqrt(v / n) of its expectation but for one case in
1.7 million; a sample variance, whose own variance is at most that of the fourth power of values in
a range of 1, within 5 sqrt(1 / (16 n)). The keys are fixed, so a test that passes always does.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitjax import quant
from bitjax.quant import Sharing

DRAWS = 1000
KEYS = jax.random.split(jax.random.key(0), DRAWS)
W = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
X = np.random.default_rng(1).standard_normal((3, 8)).astype(np.float32)


def require_mean_and_variance(draws, mean, variance, least):
    """`draws` [n, ...]; `least` is the smaller of the two values between which each is drawn."""
    n = len(draws)
    np.testing.assert_array_less(
        np.abs(draws.mean(axis=0) - mean), 5 * np.sqrt(variance / n) + 1e-6
    )
    np.testing.assert_array_less(np.abs(draws.var(axis=0) - variance), 5 / np.sqrt(16 * n) + 1e-6)
    assert ((draws == least) | (draws == least + 1)).all()


def test_rounded_has_the_mean_and_variance_of_the_equation():
    x = np.array([-3.75, -1.5, -0.25, 0.0, 0.1, 0.5, 2.0, 126.9], np.float32)
    draws = np.asarray(jax.vmap(lambda key: quant.rounded(jnp.asarray(x), key))(KEYS))
    f = x - np.floor(x)
    require_mean_and_variance(draws, x, f * (1 - f), np.floor(x))
    assert np.corrcoef(draws[:, 1], draws[:, 5])[0, 1] == pytest.approx(0, abs=5 / DRAWS**0.5)


def test_without_a_key_ties_go_to_even():
    found = quant.rounded(jnp.array([0.5, 1.5, -0.5, 2.4]))
    np.testing.assert_array_equal(np.asarray(found), [0, 2, 0, 2])


@pytest.mark.parametrize(
    ("kind", "sharing"),
    [(kind, Sharing()) for kind in quant.WEIGHT_QUANTIZERS]
    + [
        ("ternary", Sharing("group", 3)),
        ("binary", Sharing("row")),
        ("binary", Sharing("group", 3)),
    ],
)
def test_drawn_weights_are_unbiased_within_their_scale(kind, sharing):
    quantizer = quant.WEIGHT_QUANTIZERS[kind]

    @jax.vmap
    def drawn(key):
        return quantizer(jnp.asarray(W), (), sharing, None, key).codes

    nearest = quantizer(jnp.asarray(W), (), sharing)
    scale = np.broadcast_to(nearest.scale, W.shape).astype(np.float64)
    draws = np.asarray(drawn(KEYS), np.float64)
    if kind == "binary":
        axis = {"tensor": None, "row": 1}.get(sharing.per)
        groups = W.reshape(4, 2, 3).mean(axis=2).repeat(3, axis=1)
        centre = groups if sharing.per == "group" else W.mean(axis=axis, keepdims=True)
        mean = np.clip((W - centre) / scale, -1, 1)
        # Halves of codes shifted to 0 and 1: the draw of the equation.
        p = (mean + 1) / 2
        require_mean_and_variance((draws + 1) / 2, p, p * (1 - p), 0)
    else:
        mean = np.clip(W / scale, -1, 1)
        f = np.abs(mean) % 1
        require_mean_and_variance(draws, mean, f * (1 - f), np.minimum(np.floor(mean), 0))
    again = quantizer(jnp.asarray(W), (), sharing, None, KEYS[0])
    np.testing.assert_array_equal(np.asarray(again.scale), np.asarray(nearest.scale))
    np.testing.assert_array_equal(np.asarray(again.codes), draws[0])


@pytest.mark.parametrize(("kind", "low", "high"), [("int8", -128, 127), ("int4", -8, 7)])
def test_drawn_activations_are_unbiased_and_clipped(kind, low, high):
    x = X.copy()
    x[1, 2] = 30  # int4 clips it
    quantizer = quant.ACTIVATION_QUANTIZERS[kind]
    nearest = quantizer(jnp.asarray(x))
    real = np.clip(x / np.asarray(nearest.scale, np.float64), low, high)
    draws = np.asarray(jax.vmap(lambda key: quantizer(jnp.asarray(x), key).codes)(KEYS), np.float64)
    # The largest of a token is 127 up to the rounding of two float32 products: 127 * 2^-23 each.
    whole = np.abs(real - np.rint(real)) < 127 * 2**-22
    mean = np.where(whole, np.rint(real), real)
    f = mean - np.floor(mean)
    np.testing.assert_array_less(
        np.abs(draws.mean(axis=0) - mean), 5 * np.sqrt(f * (1 - f) / DRAWS) + 1e-4
    )
    np.testing.assert_array_less(np.abs(draws.var(axis=0) - f * (1 - f)), 5 / np.sqrt(16 * DRAWS))
    assert draws.min() >= low
    assert draws.max() <= high
    if kind == "int4":
        assert (draws[:, 1, 2] == 7).all()


def test_gradients_are_straight_through():
    upstream = np.random.default_rng(2).standard_normal(W.shape).astype(np.float32)
    for kind in ("ternary", "binary"):
        quantizer = quant.WEIGHT_QUANTIZERS[kind]
        gradient = jax.grad(
            lambda w, q=quantizer: jnp.sum(q(w, key=KEYS[0]).dequantize() * upstream)
        )(jnp.asarray(W))
        np.testing.assert_allclose(np.asarray(gradient), upstream, rtol=2**-20)
    for quantizer in quant.ACTIVATION_QUANTIZERS.values():
        gradient = jax.grad(lambda x, q=quantizer: jnp.sum(q(x, KEYS[0]).dequantize() * X))(
            jnp.asarray(X)
        )
        np.testing.assert_allclose(np.asarray(gradient), X, rtol=2**-20)


def test_a_token_that_is_not_finite_stays_so():
    x = jnp.ones((2, 4)).at[1, 2].set(jnp.nan)
    for quantizer in quant.ACTIVATION_QUANTIZERS.values():
        real = np.asarray(quantizer(x, KEYS[0]).dequantize())
        assert np.isfinite(real[0]).all()
        assert np.isnan(real[1]).all()
