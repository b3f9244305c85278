import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from tiny import tiny_config

from bitjax.model.layers import BitLinear, RMSNorm, rotary
from bitjax.packing import pack


def linear(rows=24, cols=20, **changes):
    return BitLinear(cols, rows, tiny_config(init_std=0.5, **changes), rngs=nnx.Rngs(0))


def inputs(*shape):
    return jax.random.normal(jax.random.key(7), shape)


def test_ternary_forward_is_the_equation():
    layer, x = linear(), inputs(2, 3, 20)
    codes, scale = oracle.absmean_ternary(layer.weight[...])
    exact = oracle.ternary_product(x, codes, scale)
    # absmean within 2^-18 of the exact mean of 480 values; then three roundings.
    np.testing.assert_allclose(np.asarray(layer(x), np.float64), exact, rtol=2**-18)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("weights", ["ternary", "binary"])
def test_packed_layer_equals_the_trained_one_to_the_bit(weights, impl):
    from bitjax.quant import WEIGHT_QUANTIZERS

    layer, x = linear(weights=weights), inputs(2, 3, 20)
    trained = np.asarray(layer(x))
    codes, scale = WEIGHT_QUANTIZERS[weights](layer.weight[...])
    layer.weight.set_value(pack(np.asarray(codes), np.asarray(scale)))
    layer.impl = impl
    np.testing.assert_array_equal(np.asarray(layer(x)), trained)


def test_packed_weights_with_float_activations():
    layer, x = linear(activations="float"), inputs(5, 20)
    trained = np.asarray(layer(x))
    codes, scale = oracle.absmean_ternary(layer.weight[...])
    layer.weight.set_value(pack(codes, scale))
    # The same product with the scale inside or outside the sum of 20 terms.
    np.testing.assert_allclose(np.asarray(layer(x)), trained, rtol=1e-5, atol=1e-5)


def test_float_layer_is_a_plain_product():
    layer, x = linear(weights="float", activations="float"), inputs(4, 20)
    exact = np.asarray(x, np.float64) @ np.asarray(layer.weight[...], np.float64).T
    np.testing.assert_allclose(np.asarray(layer(x)), exact, rtol=1e-5, atol=1e-5)


def test_inner_norm_comes_before_quantisation():
    layer, x = linear(inner_norm=True), inputs(4, 20) * 50
    normed = RMSNorm(20, 1e-5)(x)
    plain = linear()
    plain.weight.set_value(layer.weight[...])
    np.testing.assert_array_equal(np.asarray(layer(x)), np.asarray(plain(normed)))


@pytest.mark.parametrize("weights", ["ternary", "binary", "float"])
@pytest.mark.parametrize("activations", ["int8", "float"])
def test_gradients_are_straight_through(weights, activations):
    """dL/dx = dy @ dequant(W) and dL/dW = dy.T @ dequant(x), as if the quantisers were identity."""
    from bitjax.quant import WEIGHT_QUANTIZERS, int8_per_token

    layer, x = linear(weights=weights, activations=activations), inputs(6, 20)
    graph, params = nnx.split(layer)
    upstream = jax.random.normal(jax.random.key(8), (6, 24))

    def loss(params, x):
        return jnp.sum(nnx.merge(graph, params)(x) * upstream)

    by_params, by_x = jax.grad(loss, argnums=(0, 1))(params, x)
    w = layer.weight[...]
    w_real = w if weights == "float" else WEIGHT_QUANTIZERS[weights](w).dequantize()
    x_real = x if activations == "float" else int8_per_token(x).dequantize()
    np.testing.assert_allclose(
        np.asarray(by_x), np.asarray(upstream @ w_real), rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(
        np.asarray(by_params["weight"][...]), np.asarray(upstream.T @ x_real), rtol=1e-4, atol=1e-4
    )


def test_bfloat16_products_of_codes_are_exact():
    """Codes up to 128 and their sums survive bfloat16 inputs: only the output is rounded."""
    layer, x = linear(), inputs(3, 20).astype(jnp.bfloat16)
    narrow, wide = layer(x), layer(x.astype(jnp.float32))
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        np.asarray(narrow.astype(jnp.float32)),
        np.asarray(wide.astype(jnp.bfloat16).astype(jnp.float32)),
    )


def test_rms_norm():
    norm = RMSNorm(8, 1e-5)
    norm.scale.set_value(jnp.arange(8.0))
    x = np.asarray(inputs(2, 3, 8), np.float64)
    exact = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * np.arange(8)
    np.testing.assert_allclose(np.asarray(norm(jnp.asarray(x, jnp.float32))), exact, rtol=1e-6)


def test_rotary_turns_pairs_and_keeps_relative_angles():
    x = inputs(1, 1, 1, 8)
    at = lambda p: rotary(x, jnp.array([[p]]), 10_000.0)[0, 0, 0]  # noqa: E731
    np.testing.assert_array_equal(np.asarray(at(0)), np.asarray(x[0, 0, 0]))
    pair = np.array([x[0, 0, 0, 1], x[0, 0, 0, 5]])  # elements i and i + h/2 for i = 1
    angle = 3 * 10_000.0 ** (-1 / 4)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    np.testing.assert_allclose(np.asarray(at(3))[[1, 5]], turn @ pair, rtol=1e-5)
    np.testing.assert_allclose(float(at(9) @ at(4)), float(at(105) @ at(100)), rtol=1e-4)
