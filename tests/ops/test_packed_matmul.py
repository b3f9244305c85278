"""The public product: oracle, reference and custom call on the same inputs; lowering for a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import packing_oracle
import pytest

from bitjax import ops
from bitjax.ops import ffi, reference
from bitjax.packing import LAYOUTS, pack

KERNELS = ffi.kernels()


@pytest.fixture(params=KERNELS)
def kernel(request):
    ffi.force_kernel(request.param)
    yield request.param
    ffi.force_kernel(None)


@functools.cache
def make(rows, cols, layout="ternary2", per_row=False):
    """(weights with multipliers applied, packed)."""
    rng = np.random.default_rng(rows + cols)
    w, m = packing_oracle.random_weights(rng, layout, rows, cols)
    scale = 0.05 * rng.standard_normal(rows).astype(np.float32) if per_row else np.float32(0.037)
    return packing_oracle.multiplied(w, m), pack(w, scale, layout, m)


@functools.partial(jax.jit, static_argnames=("gate", "eps", "impl"))
def product(x, packed, **arguments):
    return ops.packed_matmul(x, packed, **arguments)


def wide(y):
    return np.asarray(y).astype(np.float64)


# A reference to the bit runs op by op: compiled as a whole, XLA multiplies scales in another order.
by_the_letter = functools.partial(ops.packed_matmul, impl="reference")


SHAPES = [(1, 16), (3, 33), (2, 3, 40), (5, 300), (40,), (0, 8)]


@functools.cache  # kernels meet the same operands
def plain_case(layout, shape):
    """x, its packed weights, the reference's product, and that of the oracle in float64."""
    number = tuple(LAYOUTS).index(layout) + SHAPES.index(shape)
    dtype = (jnp.float32, jnp.bfloat16)[number % 2]
    w, packed = make(23, shape[-1], layout, per_row=number % 4 < 2)
    x = (jax.random.normal(jax.random.key(1), shape) * 10).astype(dtype)
    exact = oracle.ternary_product(np.asarray(x.astype(jnp.float32)), w, np.float32(1))
    return x, packed, by_the_letter(x, packed), exact * np.asarray(packed.scale, np.float64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_ways_agree(kernel, shape, layout):
    x, packed, by_reference, exact = plain_case(layout, shape)
    by_call = product(x, packed, impl="ffi")
    assert by_call.dtype == by_reference.dtype == x.dtype
    assert by_call.shape == (*shape[:-1], 23)
    np.testing.assert_array_equal(wide(by_call), wide(by_reference))
    # Three float32 roundings (scale, product of scales, product); bfloat16 keeps 8 bits.
    tolerance = 3 * 2**-24 if x.dtype == jnp.float32 else 2**-8
    np.testing.assert_allclose(wide(by_call), exact, rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", [np.float32, packing_oracle.BF16])
@pytest.mark.parametrize("gate", ["none", "relu2", "silu"])
@pytest.mark.parametrize(
    ("layout", "norm", "residual"),
    [
        ("ternary2", True, True),
        ("ternary1.6", True, False),
        ("int4", False, True),
        ("int8", False, False),
    ],
)
def test_three_ways_agree_on_what_is_fused(layout, gate, norm, residual, dtype):
    n, k = 37, 70
    w, packed = make(n, k, layout, per_row=norm)
    rng = np.random.default_rng(2)
    x = rng.standard_normal((2, 3, k if gate == "none" else 2 * k)).astype(dtype)
    arguments = {"gate": gate}
    if norm:
        arguments |= {"norm": rng.standard_normal(k).astype(np.float32), "eps": 0.01}
    if residual:
        arguments["residual"] = (10 * rng.standard_normal((2, 3, n))).astype(dtype)
    flat = arguments | ({"residual": arguments["residual"].reshape(6, n)} if residual else {})

    # A sigmoid, two products and a norm round some 16 times, and a mean at most once a term.
    units = (16 if gate != "none" else 0) + (k / 2 + 16 + 16 if norm else 0)
    exact, error = packing_oracle.bounded(x.reshape(6, -1), w, packed.scale, units, **flat)
    for impl in ("reference", "ffi", "auto"):
        y = product(x, packed, impl=impl, **arguments)
        assert (y.shape, y.dtype) == ((2, 3, n), dtype)
        assert (np.abs(wide(y).reshape(6, n) - exact) <= error).all(), impl


def test_the_bound_is_tight_and_each_part_matters():
    """The bound above would not let any part of the operation be forgotten."""
    w, packed = make(37, 70, "ternary2", True)
    rng = np.random.default_rng(3)
    x = rng.standard_normal((6, 140)).astype(np.float32)
    everything = {
        "gate": "silu",
        "norm": rng.standard_normal(70).astype(np.float32),
        "eps": 0.01,
        "residual": rng.standard_normal((6, 37)).astype(np.float32),
    }
    exact, error = packing_oracle.bounded(x, w, packed.scale, 83, **everything)
    assert np.median(error / np.abs(exact)) < 1e-4
    forgotten = [{"gate": "relu2"}, {"norm": None}, {"eps": 0.0}, {"residual": None}]
    for part in forgotten:
        for impl in ("reference", "ffi"):
            y = wide(product(x, packed, impl=impl, **(everything | part)))
            assert (np.abs(y - exact) > error).mean() > 0.5, part


@pytest.mark.parametrize("extreme", [1e-30, 1e-6, 1e30, 3e38])
@pytest.mark.parametrize("impl", ["ffi", "reference"])
def test_extreme_magnitudes(extreme, impl):
    w, packed = make(17, 50)
    x = np.random.default_rng(2).standard_normal((3, 50)).clip(-1, 1) * extreme
    y = wide(product(jnp.asarray(x, jnp.float32), packed, impl=impl))
    exact = oracle.ternary_product(np.asarray(x, np.float32), w, packed.scale)
    np.testing.assert_allclose(y, exact, rtol=2**-22, atol=1e-45)


def test_bad_tokens_give_nan_and_only_theirs(kernel):
    _, packed = make(5, 20)
    x = jnp.ones((4, 20)).at[1, 3].set(jnp.nan).at[2, 19].set(-jnp.inf)
    gated = jnp.concatenate([jnp.abs(x), x], axis=1)
    norm = jnp.ones(20)
    for impl in ("ffi", "reference"):
        for y in (
            product(x, packed, impl=impl),
            product(x, packed, norm=norm, impl=impl),
            product(gated, packed, gate="silu", impl=impl),
            product(gated, packed, gate="relu2", norm=norm, impl=impl),
            product(x, packed, residual=jnp.ones((4, 5)), impl=impl),
        ):
            assert np.isnan(y[1:3]).all()
            assert np.isfinite(y[jnp.array([0, 3])]).all()


@pytest.mark.parametrize(("gate", "left"), [("relu2", 0.0), ("silu", np.nan)])
@pytest.mark.parametrize("impl", ["ffi", "reference"])
def test_a_gate_of_minus_infinity(impl, gate, left):
    _, packed = make(5, 20)
    x = jnp.ones((1, 40)).at[0, :20].set(-jnp.inf)
    np.testing.assert_array_equal(product(x, packed, gate=gate, impl=impl), np.full((1, 5), left))


@pytest.mark.parametrize("layout", ["ternary2", "ternary1.6"])
def test_long_rows_use_the_integer_path(monkeypatch, layout):
    """Beyond the exact range of float32 sums the reference sums in int32; shown at a small size."""
    _, packed = make(4, 60, layout)
    x = jax.random.normal(jax.random.key(3), (2, 60))
    expected = reference.packed_matmul(x, packed)
    called = []
    integer = reference.packed_matmul_i32
    monkeypatch.setattr(reference, "packed_matmul_i32", lambda *a: called.append(1) or integer(*a))
    reference.packed_matmul(x, packed)
    assert not called
    monkeypatch.setattr(reference, "EXACT_FLOAT32_TERMS", 59)
    np.testing.assert_array_equal(np.asarray(reference.packed_matmul(x, packed)), expected)
    assert called


def test_wider_weights_use_the_integer_path():
    """Sums beyond 2^24, which float32 does not hold: 2^11 products of 127 and 127."""
    packed = pack(np.full((3, 2**11), 127), 1.0, "int8")
    x = jnp.full((2, 2**11), 127.0).at[:, 0].set(126.0)
    for impl in ("ffi", "reference"):
        y = product(x, packed, impl=impl)
        np.testing.assert_array_equal(y, np.full((2, 3), np.float32(127 * (127 * 2**11 - 1))))


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dequantized_matmul_leaves_activations_alone(layout, per_row):
    w, packed = make(9, 31, layout, per_row)
    x = np.random.default_rng(4).standard_normal((3, 31)).astype(np.float32)
    y = wide(jax.jit(reference.dequantized_matmul)(jnp.asarray(x), packed))
    scaled = w * np.asarray(packed.scale, np.float64).reshape(-1, 1)
    exact = x.astype(np.float64) @ scaled.T
    # 31 products and their sums, each relative to the sum of magnitudes, and the scale.
    error = 32 * 2**-24 * (np.abs(x).astype(np.float64) @ np.abs(scaled).T)
    assert (np.abs(y - exact) <= error).all()


@functools.partial(jax.jit, static_argnames="impl")
def float_product(x, packed, impl):
    return ops.dequantized_matmul(x, packed, impl)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1, 1e30])
@pytest.mark.parametrize("layout", ["ternary2", "ternary1.6"])
def test_activations_in_int8_parts_lose_nothing(layout, size, dtype):
    w, packed = make(23, 300, layout, per_row=True)
    x = jax.random.normal(jax.random.key(4), (2, 3, 300)).at[0, 0, 5].set(1000.0)
    x = (x.at[1, 1].set(0) * size).astype(dtype)
    wide_x, scaled = wide(x), w * np.asarray(packed.scale, np.float64)[:, None]
    exact = wide_x @ scaled.T
    for impl in ("ffi", "auto", "reference"):
        y = float_product(x, packed, impl)
        assert (y.dtype, y.shape) == (dtype, (2, 3, 23))
        # Every element errs by 254^-parts of its row's largest at most, and each of the parts'
        # products, as large as that largest times the row's weights, by three roundings.
        parts = 3 if dtype == jnp.float32 else 2
        unit = np.abs(wide_x).max(-1, keepdims=True) * np.abs(scaled).sum(-1)
        limit = (1.01 * 254.0**-parts + 6 * 2.0**-24) * unit
        if impl == "reference":  # sums of 300 products, of bfloat16 without loss
            limit = 300 * 2.0**-24 * unit
        rounding = 0 if dtype == jnp.float32 else 2.0**-8 * np.abs(exact)
        assert (np.abs(wide(y) - exact) <= limit + rounding).all(), impl
        assert not wide(y)[1, 1].any()


def test_rows_that_are_not_finite_in_parts():
    _, packed = make(23, 33)
    x = jnp.ones((3, 33)).at[0, 3].set(jnp.nan).at[1, 4].set(jnp.inf)
    y = wide(float_product(x, packed, "ffi"))
    assert np.isnan(y[:2]).all()
    assert np.isfinite(y[2]).all()


@pytest.mark.parametrize(
    ("x", "impl", "message"),
    [
        (
            jnp.ones((2, 32)),
            "auto",
            r"x is float32\[2, 32\]; wanted float32 or bfloat16 \[\.\.\., 33",
        ),
        (jnp.ones((2, 33), jnp.float16), "auto", r"x is float16\[2, 33\]; wanted"),
        (jnp.ones((2, 33)), "fast", "impl='fast' is not auto, ffi or reference"),
    ],
)
def test_errors_of_dequantized_matmul(x, impl, message):
    with pytest.raises(ValueError, match=message):
        ops.dequantized_matmul(x, make(23, 33)[1], impl)


def test_auto_runs_the_custom_call_on_cpu():
    _, packed = make(8, 24)
    name = ffi.active_kernel()
    before = ffi.kernel_calls()[name]
    jax.jit(ops.packed_matmul)(jnp.ones((2, 24)), packed).block_until_ready()
    assert ffi.kernel_calls()[name] == before + 1


def test_auto_without_the_extension_is_the_reference(monkeypatch):
    _, packed = make(8, 24)
    monkeypatch.setattr(ffi, "available", lambda: False)
    fresh = jax.jit(lambda x, w: ops.packed_matmul(x, w))  # not the trace of another test
    assert "bitjax" not in fresh.lower(jnp.ones((2, 24)), packed).as_text()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lowers_for_cuda_without_a_cpu_custom_call(layout):
    _, packed = make(8, 24, layout)
    x, norm, residual = jnp.ones((2, 48)), jnp.ones(24), jnp.ones((2, 8))
    for arguments in ({"gate": "silu", "norm": norm, "eps": 1e-5, "residual": residual}, {}):
        operand = x if arguments else x[:, :24]
        traced = product.trace(operand, packed, **arguments)
        assert "bitjax_packed_matmul" in traced.lower(lowering_platforms=("cpu",)).as_text()
        on_cuda = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert "bitjax" not in on_cuda
        assert "dot_general" in on_cuda


@pytest.mark.parametrize("layout", ["ternary1.6", "int4"])
def test_vmap_scan_and_while_loop(layout):
    _, packed = make(20, 20, layout)
    x = jax.random.normal(jax.random.key(5), (3, 4, 20))
    expected = np.asarray(by_the_letter(x, packed))
    mapped = jax.jit(jax.vmap(lambda x: ops.packed_matmul(x, packed)))
    np.testing.assert_array_equal(mapped(x), expected)
    _, scanned = jax.lax.scan(lambda c, x: (c, ops.packed_matmul(x, packed)), 0, x)
    np.testing.assert_array_equal(scanned, expected)

    def body(carry):
        i, y = carry
        return i + 1, ops.packed_matmul(y, packed)

    _, looped = jax.jit(lambda y: jax.lax.while_loop(lambda c: c[0] < 3, body, (0, y)))(x[0])
    by_hand = x[0]
    for _ in range(3):
        by_hand = by_the_letter(by_hand, packed)
    np.testing.assert_array_equal(looped, by_hand)


X = jnp.ones((2, 24))


@pytest.mark.parametrize(
    ("x", "arguments", "message"),
    [
        (jnp.ones((2, 25)), {}, r"x has shape \(2, 25\); its last axis must be 24 for the 8 x 24"),
        (jnp.ones(()), {}, r"x has shape \(\); its last axis must be 24"),
        (X, {"gate": "relu2"}, r"x has shape \(2, 24\); .* must be 48 .* gate='relu2'"),
        (X, {"gate": "gelu"}, "gate='gelu' is not none, relu2 or silu"),
        (X, {"norm": jnp.ones(1)}, r"norm has shape \(1,\); wanted \(24,\)"),
        (jnp.ones((2, 48)), {"gate": "silu", "norm": jnp.ones(48)}, r"norm .* wanted \(24,\)"),
        (X, {"norm": jnp.ones((1, 24))}, r"norm has shape \(1, 24\); wanted \(24,\)"),
        (X, {"residual": jnp.ones(8)}, r"residual has shape \(8,\); wanted \(2, 8\)"),
        (X, {"residual": jnp.ones((2, 24))}, r"residual has shape \(2, 24\); wanted \(2, 8\)"),
        (X, {"residual": jnp.ones((1, 8))}, r"residual has shape \(1, 8\); wanted \(2, 8\)"),
    ],
)
@pytest.mark.parametrize("impl", ["auto", "ffi", "reference"])
def test_operands_are_checked(x, arguments, message, impl):
    _, packed = make(8, 24)
    with pytest.raises(ValueError, match=message):
        ops.packed_matmul(x, packed, impl=impl, **arguments)


def test_errors():
    _, packed = make(8, 24)
    with pytest.raises(ValueError, match="impl='fast' is not auto, ffi or reference"):
        ops.packed_matmul(X, packed, impl="fast")
    for impl in ("auto", "ffi"):
        with pytest.raises(ValueError, match="wanted float32 or bfloat16, got float16"):
            ops.packed_matmul(X.astype(jnp.float16), packed, impl=impl)
