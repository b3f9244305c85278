"""int4 activations and the Hadamard transform against their equations in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitjax import quant

X = np.random.default_rng(0).standard_normal((3, 4, 24)).astype(np.float32)
X[1, 2, 5] = 40  # beyond the clip


def test_int4_follows_the_equation_and_clips():
    codes, scale = quant.int4_per_token(jnp.asarray(X))
    absmean = np.abs(X.astype(np.float64)).mean(axis=-1, keepdims=True)
    wanted = np.clip(np.rint(X * np.sqrt(7) / absmean), -8, 7)
    np.testing.assert_array_equal(np.asarray(codes), wanted)
    assert codes[1, 2, 5] == 7
    np.testing.assert_allclose(np.asarray(scale), absmean / np.sqrt(7), rtol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(quant.int4_per_token(x).dequantize() * X))(jnp.asarray(X))
    np.testing.assert_allclose(np.asarray(gradient), X, rtol=1e-6)


def test_int4_of_zeros_is_zero_and_a_bad_token_marks_itself_only():
    assert not np.asarray(quant.int4_per_token(jnp.zeros((2, 4))).dequantize()).any()
    real = np.asarray(quant.int4_per_token(jnp.ones((3, 4)).at[1, 2].set(np.inf)).dequantize())
    assert np.isnan(real[1]).all()
    assert np.isfinite(real[[0, 2]]).all()


def sylvester(n):
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h / np.sqrt(n)


@pytest.mark.parametrize(("features", "block"), [(1, 1), (16, 16), (24, 8), (6, 2)])
def test_hadamard_is_the_matrix_block_by_block(features, block):
    x = X[..., :features]
    whole = np.kron(np.eye(features // block), sylvester(block))
    assert quant.hadamard_block(features) == block
    np.testing.assert_allclose(np.asarray(quant.hadamard(jnp.asarray(x))), x @ whole, atol=1e-5)
    twice = quant.hadamard(quant.hadamard(jnp.asarray(x)))
    np.testing.assert_allclose(np.asarray(twice), x, atol=1e-5)
    gradient = jax.grad(lambda x: jnp.sum(quant.hadamard(x) ** 2))(jnp.asarray(x))
    np.testing.assert_allclose(np.asarray(gradient), 2 * x, atol=1e-4)
