"""The products of a training step: custom calls against the JAX twin, that against autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitjax.ops import ffi, ffi_training
from bitjax.ops.training import bit_product, bit_product_reference, require_available
from bitjax.quant import int8_per_token

needs_instructions = pytest.mark.skipif(
    not ffi.available() or not ffi.training_products(), reason="no AVX-512 BF16 and VNNI here"
)


def operands(M, K, N, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((M, K)).astype(np.float32)
    w = rng.integers(-1, 2, (N, K)).astype(np.float32)
    scale = rng.uniform(0.5, 2, N).astype(np.float32)
    return x, w, scale, rng.standard_normal((M, N)).astype(np.float32)


def bf16(x):
    """To nearest even, by the bits."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


# Remainders of tiles (6 x 64), strips (48), chunks (192 rows), passes (256 groups), odd depths.
SHAPES = [(1, 1, 1), (7, 64, 64), (5, 3, 65), (193, 130, 49), (0, 8, 4), (1, 1100, 3),
          (1030, 66, 5), (13, 6, 530)]  # fmt: skip


@needs_instructions
@pytest.mark.parametrize(("M", "K", "N"), SHAPES)
def test_custom_calls_are_numpys_products(M, K, N):
    x, w, w_scale, dy = operands(M, K, N)
    y, q, x_scale = map(np.asarray, ffi_training.train_forward(x, w, w_scale))
    codes, scales = int8_per_token(jnp.asarray(x)) if M else (np.zeros((0, K)), np.zeros((0, 1)))
    codes, scales = np.asarray(codes), np.asarray(scales)[:, 0]
    np.testing.assert_array_equal(q[:, :K], codes)
    assert not q[:, K:].any()
    np.testing.assert_array_equal(x_scale, scales)
    sums = codes.astype(np.int64) @ w.astype(np.int64).T
    np.testing.assert_array_equal(y, sums.astype(np.float32) * (scales[:, None] * w_scale))

    dx, dw = map(np.asarray, ffi_training.train_backward(dy, q, x_scale, w, w_scale))
    for found, a, b in (
        (dx, bf16(dy * w_scale), w),
        (dw, bf16(dy * scales[:, None]).T, codes),
    ):
        a, b = a.astype(np.float64), b.astype(np.float64)
        # A float32 sum of d products, in any order: at most d roundings of partial sums.
        bound = (len(b) + 2) * 2.0**-24 * (np.abs(a) @ np.abs(b))
        assert found.shape == bound.shape
        assert (np.abs(found - a @ b) <= bound).all()


@needs_instructions
def test_gradients_are_those_of_the_twin():
    x, w, scale, dy = operands(37, 40, 24)
    y, back = jax.vjp(bit_product, x, w, scale)
    wanted, twin = jax.vjp(bit_product_reference, x, w, scale)
    np.testing.assert_array_equal(y, wanted)
    for found, expected in zip(back(dy), twin(dy), strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_the_twins_gradients_are_straight_through_but_for_bfloat16():
    x, w, scale, dy = operands(12, 16, 8)

    def plain(x, w, scale):
        q, x_scale = int8_per_token(x)
        return (q @ w.T) * (x_scale * scale[None, :])

    y, twin = jax.vjp(bit_product_reference, x, w, scale)
    wanted, back = jax.vjp(plain, x, w, scale)
    np.testing.assert_array_equal(y, wanted)
    # Each term of a sum is off by 2^-8 of itself at most: 8 bits of a gradient, to nearest.
    size = np.abs(dy)
    q, x_scale = map(np.asarray, int8_per_token(x))
    bounds = (
        (size * scale) @ np.abs(w),
        (size * x_scale * scale).T @ np.abs(q),
        ((size * x_scale).T @ np.abs(q) * np.abs(w)).sum(1),
    )
    for found, expected, bound in zip(twin(dy), back(dy), bounds, strict=True):
        assert (np.abs(found - expected) <= 1.01 * 2.0**-8 * bound).all()
        assert not np.array_equal(found, expected)


@needs_instructions
def test_a_row_that_is_not_finite_makes_its_outputs_nan():
    x, w, scale, _ = operands(3, 20, 4)
    x[1, 7] = np.inf
    y = np.asarray(bit_product(x, w, scale))
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[[0, 2]]).all()


@needs_instructions
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w_scale": np.ones(3, np.float32)}, r"w_scale: wanted \[4\], got \[3\]"),
        ({"x": np.ones((2, 5), np.float32)}, r"x: wanted \[2, 8\], got \[2, 5\]"),
        ({"x": np.ones((2, 8), np.int32)}, "x: wanted f32, got s32"),
    ],
)
def test_wrong_operands_are_refused(change, message):
    given = {"x": np.ones((2, 8), np.float32), "w": np.ones((4, 8), np.float32),
             "w_scale": np.ones(4, np.float32)} | change  # fmt: skip
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=message):
        jax.block_until_ready(ffi_training.train_forward(*given.values()))


def test_machines_without_the_instructions_are_told(monkeypatch):
    monkeypatch.setattr(ffi, "available", lambda: True)
    monkeypatch.setattr(ffi, "training_products", lambda: False)
    with pytest.raises(ValueError, match="needs a processor with AVX-512 BF16"):
        require_available()
    monkeypatch.setattr(ffi, "available", lambda: False)
    with pytest.raises(ValueError, match=r"extension bitjax\._ffi, which is not installed"):
        require_available()
