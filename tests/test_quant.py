import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bitjax import quant

finite = st.floats(-1e6, 1e6, width=32)
matrices = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=finite
)
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


@settings(deadline=None, max_examples=60)
@given(matrices)
def test_ternary_follows_the_equation(w):
    codes, scale = quant.ternary(jnp.asarray(w))
    # The float32 mean of at most 81 values is within 81 roundings of the exact one.
    exact = max(np.abs(w.astype(np.float64)).mean(), 1e-5)
    np.testing.assert_allclose(float(scale[0, 0]), exact, rtol=81 * 2**-24)
    wanted = np.clip(np.rint(w * (np.float32(1) / np.float32(scale[0, 0]))), -1, 1)
    np.testing.assert_array_equal(np.asarray(codes), wanted)


@settings(deadline=None, max_examples=60)
@given(matrices)
def test_int8_follows_the_equation_and_its_error_bound(x):
    codes, scale = quant.int8_per_token(jnp.asarray(x))
    wanted, exact_scale = oracle.absmax_int8(x)
    np.testing.assert_array_equal(np.asarray(codes), wanted)
    np.testing.assert_allclose(np.asarray(scale), exact_scale, rtol=2**-22)
    # Half a step, and a few float32 roundings of values up to 127 steps.
    error = np.abs(np.asarray(codes * scale, np.float64) - x)
    assert (error <= np.asarray(scale, np.float64) * (0.5 + 127 * 2**-21)).all()


def test_binary_signs_are_about_the_mean_and_zero_is_negative():
    w = jnp.array([[1.0, 2.0, 3.0], [2.0, 2.0, 2.0]])  # mean 2
    codes, scale = quant.binary(w)
    np.testing.assert_array_equal(np.asarray(codes), [[-1, -1, 1], [-1, -1, -1]])
    assert float(scale[0, 0]) == 2.0


def test_ties_round_to_even():
    # scale 1: the absmean of these is exactly 1.
    w = jnp.array([[0.5, -0.5, 1.5, -1.5]])
    codes, scale = quant.ternary(w)
    assert float(scale[0, 0]) == 1.0
    np.testing.assert_array_equal(np.asarray(codes), [[0, 0, 1, -1]])
    x = jnp.array([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5]])
    np.testing.assert_array_equal(
        np.asarray(quant.int8_per_token(x).codes), [[127, 0, 2, 2, 0, -2, -126]]
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["ternary", "binary", "int8_per_token"])
def test_zeros_and_one_element_rows_stay_finite(name, dtype):
    for values in (np.zeros((3, 4)), np.zeros((1, 1)), np.array([[7.0]]), np.array([[-1e-8]])):
        codes, scale = getattr(quant, name)(jnp.asarray(values, dtype))
        assert codes.dtype == scale.dtype == jnp.float32
        assert np.isfinite(np.asarray(codes)).all()
        assert (np.asarray(scale) > 0).all()
    if name != "binary":
        codes, _ = getattr(quant, name)(jnp.zeros((3, 4), dtype))
        assert not np.asarray(codes).any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["ternary", "int8_per_token"])
def test_narrow_inputs_are_quantised_in_float32(name, dtype):
    x = jax.random.normal(jax.random.key(1), (5, 33)).astype(dtype)
    narrow, wide = getattr(quant, name)(x), getattr(quant, name)(x.astype(jnp.float32))
    np.testing.assert_array_equal(np.asarray(narrow.codes), np.asarray(wide.codes))
    np.testing.assert_array_equal(np.asarray(narrow.scale), np.asarray(wide.scale))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_activation_marks_its_own_token_only(bad):
    x = jnp.ones((3, 4)).at[1, 2].set(bad)
    real = np.asarray(quant.int8_per_token(x).dequantize())
    assert np.isnan(real[1]).all()
    np.testing.assert_allclose(real[[0, 2]], 1.0, rtol=2**-22)


def test_require_finite_names_the_array_and_the_place():
    quant.require_finite("w", np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"blocks.0 holds 2 values that are not finite.*\(0, 1\)"):
        quant.require_finite("blocks.0", np.array([[0, np.inf], [np.nan, 0]]))


@pytest.mark.parametrize("name", ["ternary", "binary", "int8_per_token"])
def test_gradient_is_straight_through(name):
    x = jax.random.normal(jax.random.key(0), (4, 6))
    upstream = jax.random.normal(jax.random.key(1), (4, 6))
    gradient = jax.grad(lambda x: jnp.sum(getattr(quant, name)(x).dequantize() * upstream))(x)
    # scale * (1 / scale) is 1 within three roundings.
    np.testing.assert_allclose(np.asarray(gradient), np.asarray(upstream), rtol=2**-21)


def test_straight_through_is_exact_in_the_forward_pass():
    value, target = jnp.array([1e8, 3e-8, -7.3]), jnp.array([1.0, -1.0, 0.0])
    np.testing.assert_array_equal(np.asarray(quant.straight_through(value, target)), target)
