"""The public product: oracle, reference and custom call on the same inputs; lowering for a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from bitjax import ops
from bitjax.ops import ffi, reference
from bitjax.packing import pack

KERNELS = ffi.kernels()


@pytest.fixture(params=KERNELS)
def kernel(request):
    ffi.force_kernel(request.param)
    yield request.param
    ffi.force_kernel(None)


def make(rows, cols, seed=0):
    w = np.random.default_rng(seed).integers(-1, 2, (rows, cols))
    return w, pack(w, np.float32(0.037))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(1, 16), (3, 33), (2, 3, 40), (5, 300), (40,), (0, 8)])
def test_three_ways_agree(kernel, shape, dtype):
    w, packed = make(23, shape[-1])
    x = (jax.random.normal(jax.random.key(1), shape) * 10).astype(dtype)
    by_reference = ops.ternary_matmul(x, packed, "reference")
    by_call = ops.ternary_matmul(x, packed, "ffi")
    assert by_call.dtype == by_reference.dtype == dtype
    assert by_call.shape == (*shape[:-1], 23)
    np.testing.assert_array_equal(
        np.asarray(by_call.astype(jnp.float32)), np.asarray(by_reference.astype(jnp.float32))
    )
    exact = oracle.ternary_product(np.asarray(x.astype(jnp.float32)), w, packed.scale)
    # Three float32 roundings (scale, product of scales, product); bfloat16 keeps 8 bits.
    tolerance = 3 * 2**-24 if dtype == jnp.float32 else 2**-8
    np.testing.assert_allclose(np.asarray(by_call, np.float64), exact, rtol=tolerance, atol=0)


@pytest.mark.parametrize("extreme", [1e-30, 1e-6, 1e30, 3e38])
@pytest.mark.parametrize("impl", ["ffi", "reference"])
def test_extreme_magnitudes(extreme, impl):
    w, packed = make(17, 50)
    x = np.random.default_rng(2).standard_normal((3, 50)).clip(-1, 1) * extreme
    y = np.asarray(ops.ternary_matmul(jnp.asarray(x, jnp.float32), packed, impl), np.float64)
    exact = oracle.ternary_product(np.asarray(x, np.float32), w, packed.scale)
    np.testing.assert_allclose(y, exact, rtol=2**-22, atol=1e-45)


def test_bad_tokens_give_nan_and_only_theirs(kernel):
    _, packed = make(5, 20)
    x = jnp.ones((4, 20)).at[1, 3].set(jnp.nan).at[2, 19].set(-jnp.inf)
    for impl in ("ffi", "reference"):
        y = np.asarray(ops.ternary_matmul(x, packed, impl))
        assert np.isnan(y[1:3]).all()
        assert np.isfinite(y[[0, 3]]).all()


def test_long_rows_use_the_integer_path(monkeypatch):
    """Beyond the exact range of float32 sums the reference sums in int32; shown at a small size."""
    _, packed = make(4, 60)
    x = jax.random.normal(jax.random.key(3), (2, 60))
    expected = reference.ternary_matmul(x, packed)
    monkeypatch.setattr(reference, "EXACT_FLOAT32_TERMS", 59)
    called = []
    integer = reference.ternary_matmul_i32
    monkeypatch.setattr(reference, "ternary_matmul_i32", lambda *a: called.append(1) or integer(*a))
    np.testing.assert_array_equal(np.asarray(reference.ternary_matmul(x, packed)), expected)
    assert called


def test_dequantized_matmul_leaves_activations_alone():
    w, packed = make(9, 31)
    x = np.random.default_rng(4).standard_normal((3, 31)).astype(np.float32)
    y = np.asarray(reference.dequantized_matmul(jnp.asarray(x), packed), np.float64)
    exact = x.astype(np.float64) @ (w * np.float64(packed.scale)).T
    np.testing.assert_allclose(y, exact, atol=31 * 2**-23)


def test_auto_runs_the_custom_call_on_cpu():
    _, packed = make(8, 24)
    name = ffi.active_kernel()
    before = ffi.kernel_calls()[name]
    jax.jit(ops.ternary_matmul)(jnp.ones((2, 24)), packed).block_until_ready()
    assert ffi.kernel_calls()[name] == before + 1


def test_auto_without_the_extension_is_the_reference(monkeypatch):
    _, packed = make(8, 24)
    monkeypatch.setattr(ffi, "available", lambda: False)
    fresh = jax.jit(lambda x, w: ops.ternary_matmul(x, w))  # not the trace of another test
    assert "bitjax" not in fresh.lower(jnp.ones((2, 24)), packed).as_text()


def test_lowers_for_cuda_without_a_cpu_custom_call():
    _, packed = make(8, 24)
    traced = jax.jit(ops.ternary_matmul).trace(jnp.ones((2, 24)), packed)
    assert "bitjax_ternary_matmul" in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "bitjax" not in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_vmap_scan_and_while_loop():
    _, packed = make(20, 20)
    x = jax.random.normal(jax.random.key(5), (3, 4, 20))
    expected = np.asarray(ops.ternary_matmul(x, packed, "reference"))
    np.testing.assert_array_equal(
        np.asarray(jax.vmap(lambda x: ops.ternary_matmul(x, packed))(x)), expected
    )
    _, scanned = jax.lax.scan(lambda c, x: (c, ops.ternary_matmul(x, packed)), 0, x)
    np.testing.assert_array_equal(np.asarray(scanned), expected)

    def body(carry):
        i, y = carry
        return i + 1, ops.ternary_matmul(y, packed)

    _, looped = jax.jit(lambda y: jax.lax.while_loop(lambda c: c[0] < 3, body, (0, y)))(x[0])
    by_hand = x[0]
    for _ in range(3):
        by_hand = ops.ternary_matmul(by_hand, packed, "reference")
    np.testing.assert_array_equal(np.asarray(looped), np.asarray(by_hand))


def test_errors():
    _, packed = make(8, 24)
    with pytest.raises(ValueError, match=r"x has shape \(2, 25\); its last axis must be the 24"):
        ops.ternary_matmul(jnp.ones((2, 25)), packed)
    with pytest.raises(ValueError, match="impl='fast' is not auto, ffi or reference"):
        ops.ternary_matmul(jnp.ones((2, 24)), packed, "fast")
    with pytest.raises(ValueError, match="wanted float32 or bfloat16, got float16"):
        ops.ternary_matmul(jnp.ones((2, 24), jnp.float16), packed, "ffi")
