"""Weight quantisers against their equations in NumPy, for every way to share a scale."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitjax import quant
from bitjax.quant import Sharing

SEGMENTS = (3, 2, 5)
SHARINGS = [Sharing(), Sharing("row"), Sharing("group", 4)]
W = np.random.default_rng(0).standard_normal((10, 12)).astype(np.float32)
W *= np.repeat([1, 4, 0.25], SEGMENTS)[:, None].astype(np.float32)


def shares(sharing, segments):
    """The index of every set of weights that has one scale."""
    ends = np.cumsum((0, *(segments or (10,))))
    if sharing.per == "tensor":
        return [np.s_[a:b, :] for a, b in itertools.pairwise(ends)]
    if sharing.per == "row":
        return [np.s_[n : n + 1, :] for n in range(10)]
    return [np.s_[n : n + 1, k : k + 4] for n in range(10) for k in range(0, 12, 4)]


def codes_and_scale(kind, w):
    w = w.astype(np.float64)
    size = np.median(np.abs(w)) if kind == "ternary_median" else np.abs(w).mean()
    if kind == "binary":
        return np.where(w > w.mean(), 1, -1), size
    return np.clip(np.rint(w / size), -1, 1), size


@pytest.mark.parametrize("segments", [(), SEGMENTS])
@pytest.mark.parametrize("sharing", SHARINGS, ids=lambda s: s.per)
@pytest.mark.parametrize("kind", quant.WEIGHT_QUANTIZERS)
def test_codes_scales_and_gradient_follow_the_equation(kind, sharing, segments):
    quantizer = quant.WEIGHT_QUANTIZERS[kind]
    found = quantizer(jnp.asarray(W), segments, sharing)
    assert found.codes.shape == W.shape
    real = np.asarray(found.dequantize())
    scale = np.broadcast_to(found.scale, W.shape)
    upstream = np.random.default_rng(1).standard_normal(W.shape).astype(np.float32)
    gradient = jax.grad(lambda w: jnp.sum(quantizer(w, segments, sharing).dequantize() * upstream))(
        jnp.asarray(W)
    )
    inside = np.ones(W.shape)
    for share in shares(sharing, segments):
        codes, size = codes_and_scale(kind, W[share])
        np.testing.assert_array_equal(np.asarray(found.codes)[share], codes)
        # A float32 mean of at most 120 values, summed pairwise or not.
        np.testing.assert_allclose(scale[share], size, rtol=120 * 2**-24)
        np.testing.assert_allclose(real[share], codes * size, rtol=121 * 2**-24)
        if kind == "ternary_learned":
            inside[share] = np.abs(W[share]) < size
    if kind == "ternary_learned":  # its scale starts at the absmean, which has gradients
        learned = quant.initial_scale(jnp.asarray(W), segments, sharing)
        gradient = jax.grad(
            lambda w: jnp.sum(quantizer(w, segments, sharing, learned).dequantize() * upstream)
        )(jnp.asarray(W))
    np.testing.assert_allclose(np.asarray(gradient), upstream * inside, rtol=2**-20)


@pytest.mark.parametrize("segments", [(), SEGMENTS])
@pytest.mark.parametrize("sharing", SHARINGS, ids=lambda s: s.per)
def test_a_learned_scale_descends_the_equation_of_lsq(sharing, segments):
    w, upstream = jnp.asarray(W), np.random.default_rng(2).standard_normal(W.shape)
    learned = 1.3 * quant.initial_scale(w, segments, sharing)
    gradient = jax.grad(
        lambda s: jnp.sum(quant.ternary_learned(w, segments, sharing, s).dequantize() * upstream)
    )(learned)
    wanted = []
    for share, s in zip(shares(sharing, segments), np.ravel(learned).tolist(), strict=True):
        v = W[share].astype(np.float64) / s
        by_scale = np.where(np.abs(v) < 1, np.rint(v) - v, np.sign(v))
        wanted.append((by_scale * upstream[share]).sum() / np.sqrt(v.size))
    assert gradient.shape == learned.shape
    np.testing.assert_allclose(np.ravel(gradient), wanted, rtol=1e-4, atol=1e-5)


def test_a_learned_scale_stays_positive_and_can_come_back():
    s = jnp.array([-1.0])
    found = quant.ternary_learned(jnp.ones((2, 4)), (), Sharing(), s)
    assert np.asarray(found.scale).min() == np.float32(1e-5)
    by_scale = jax.grad(
        lambda s: jnp.sum(quant.ternary_learned(jnp.ones((2, 4)), (), Sharing(), s).dequantize())
    )(s)
    np.testing.assert_allclose(np.asarray(by_scale), [8 / np.sqrt(8)], rtol=1e-5)


@pytest.mark.parametrize("per", ["tensor", "row"])
@pytest.mark.parametrize("kind", quant.WEIGHT_QUANTIZERS)
def test_a_matrix_in_parts_is_the_same_to_the_bit(kind, per):
    w = np.random.default_rng(3).standard_normal((1030, 5)).astype(np.float32)
    codes, scale = quant.quantize_matrix(kind, w, per)
    whole = quant.WEIGHT_QUANTIZERS[kind](jnp.asarray(w), (), Sharing(per))
    np.testing.assert_array_equal(codes, np.asarray(whole.codes))
    assert scale.shape == (() if per == "tensor" else (1030,))
    np.testing.assert_array_equal(np.ravel(scale), np.ravel(whole.scale))


def test_groups_have_no_codes_outside_training():
    with pytest.raises(ValueError, match="groups of columns have no form outside training"):
        quant.quantize_matrix("ternary", W, "group")


@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0])
def test_softened_is_the_equation_with_the_identity_for_gradient(strength):
    w = jnp.asarray(W)

    def soft(w):
        return quant.ternary(w, SEGMENTS).softened(w, jnp.float32(strength)).dequantize()

    real = np.asarray(quant.ternary(w, SEGMENTS).dequantize())
    np.testing.assert_allclose(soft(w), W + strength * (real - W), rtol=1e-5, atol=1e-6)
    if strength == 1:
        np.testing.assert_array_equal(soft(w), real)
    gradient = jax.grad(lambda w: jnp.sum(soft(w) * W))(w)
    np.testing.assert_allclose(np.asarray(gradient), W, rtol=1e-5)
