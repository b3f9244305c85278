"""The screened head against whole products in float64, and its bound against errors to cover."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitjax import ops
from bitjax.infer.convert import make_screen
from bitjax.ops import ffi, reference
from bitjax.quant import int4_dithered

KERNELS = ffi.kernels()
SHAPES = [(1, 1), (5, 3), (16, 31), (17, 32), (100, 33), (333, 65), (4099, 40), (9001, 24)]
# exp(-6 c^2) = 2^-60, written out apart from the code under test.
DEVIATIONS = 2.6327


@pytest.fixture(params=KERNELS)
def kernel(request):
    ffi.force_kernel(request.param)
    yield request.param
    ffi.force_kernel(None)


@functools.partial(jax.jit, static_argnames="impl")
def screened(x, table, screen, ranks, impl="ffi"):
    return ops.screened_logits(x, table, screen, ranks, impl)


def by_groups(size, x, table, screen, ranks, impl="ffi"):
    """So many rows in a call: up to two, each meets the screen in two parts, otherwise in one."""
    calls = [
        screened(x[i : i + size], table, screen, ranks[i : i + size], impl)
        for i in range(0, len(x), size)
    ]
    return tuple(np.concatenate(results) for results in zip(*calls, strict=True))


@functools.cache
def head(V, D, kind="normal", seed=0):
    """(bfloat16 table, its screen) on the device, and the table in float64."""
    rng = np.random.default_rng((V, D, seed))
    w = rng.standard_normal((V, D))
    if kind == "rows":  # scales of rows over 12 orders of magnitude
        w *= 10.0 ** rng.uniform(-9, 3, (V, 1))
    elif kind == "columns":
        w *= 10.0 ** rng.uniform(-4, 2, (1, D))
    elif kind == "outliers":
        w[rng.random((V, D)) < 0.01] *= 100
    elif kind == "same":  # rounded to nearest, all errors of a row have one sign
        w = np.full((V, D), 0.4) * rng.uniform(1, 2, (V, 1))
        w[:, ::31] *= 7 / 0.4
    elif kind == "ties":
        w = np.tile(w[: -(-V // 3)], (3, 1))[:V]
    elif kind == "zeros":
        w[rng.random(V) < 0.5] = 0
    table = jnp.asarray(w, jnp.bfloat16)
    screen = make_screen(np.asarray(table)[i : i + 4096] for i in range(0, V, 4096))
    return table, screen, np.asarray(table.astype(jnp.float32)).astype(np.float64)


KINDS = ["normal", "rows", "columns", "outliers", "same", "ties", "zeros"]


def steps(screen):
    """Size of a code of every row and column of the table, float64."""
    V, D = screen.shape
    m = np.asarray(screen.weights.multipliers).transpose(0, 2, 1)
    m = m.reshape(-1, m.shape[-1])[:V].astype(np.float64)
    scale = np.asarray(screen.weights.scale).astype(np.float64)
    return np.repeat(m * scale[:, None], 31, axis=1)[:, :D]


def dequantized(screen):
    """What the screen holds for the table's weights, float64: code by code as the format says."""
    V, D = screen.shape
    codes = np.asarray(screen.weights.codes)
    planes = np.stack([codes & 15, codes >> 4], -1).astype(int) - 8
    row_blocks, col_blocks = codes.shape[:2]
    w = planes.reshape(row_blocks, col_blocks, 16, 4, 2).transpose(0, 2, 1, 4, 3)
    w = w.reshape(row_blocks * 16, -1, 32)[:V]
    assert (w[..., 31] == 7).all()
    w = w[..., :31].reshape(V, -1)
    assert not w[:, D:].any()
    return (w[:, :D] - np.asarray(screen.dither).astype(np.float64)) * steps(screen)


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_is_within_half_a_step(kind):
    _, screen, w = head(100, 65, kind)
    assert (np.abs(dequantized(screen) - w) <= steps(screen) * 0.500001).all()


def test_errors_are_uniform_independent_and_without_bias():
    """Against the moments of a uniform distribution, over dithers."""
    w = np.float32(np.random.default_rng(0).standard_normal((7, 93)))
    errors = []
    for seed in range(2000):
        dither = np.random.default_rng(seed).random(93, np.float32) - np.float32(0.5)
        codes, m, scale = int4_dithered(w, 31, dither)
        step = np.repeat(m * scale[:, None].astype(np.float64), 31, axis=1)
        errors.append((codes - dither.astype(np.float64)) - w / step)
    errors = np.array(errors)
    # 651 means of 2000, whose standard error is sqrt(1/12/2000): 5 of them. Likewise variances
    # (of a uniform variable's square: 1/180) and products of neighbouring columns (1/144).
    assert np.abs(errors.mean(0)).max() < 5 * np.sqrt(1 / 12 / 2000)
    assert np.abs((errors**2).mean(0) - 1 / 12).max() < 5 * np.sqrt(1 / 180 / 2000)
    products = (errors[:, :, 1:] * errors[:, :, :-1]).mean(0)
    assert np.abs(products).max() < 5 * np.sqrt(1 / 144 / 2000)


def test_the_bound_holds_where_rounding_to_nearest_breaks_it():
    _, screen, w = head(200, 1024, "same")
    x = np.ones(1024)
    bound = DEVIATIONS * np.sqrt((steps(screen) ** 2).sum(1))
    assert (np.abs(dequantized(screen) @ x - w @ x) < bound).all()
    nearest = np.rint(w / steps(screen)) * steps(screen)
    assert (np.abs(nearest @ x - w @ x) > bound).all()


def exactly(x, w):
    """float64 logits, and how far float32 sums may be from them."""
    x = np.asarray(x).astype(np.float64)
    return x @ w.T, (x.shape[-1] + 8) * 2.0**-23 * (np.abs(x) @ np.abs(w).T) + 1e-30


def inputs(D, m, seed=0):
    """Rows of several natures: normal, one outlier, one group alone, tiny, huge."""
    rng = np.random.default_rng((D, seed))
    x = rng.standard_normal((m, D)).astype(np.float32)
    x[1::5] *= np.where(rng.random(D) < 0.05, 300, 1)
    x[2::5, 31:] = 0
    x[3::5] *= 1e-6
    x[4::5] *= 1e9
    return x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("together", [2, 10])
def test_the_largest_are_exact(kernel, together, shape, kind):
    V, D = shape
    table, screen, w = head(V, D, kind)
    x = inputs(D, 10)
    exact, slack = exactly(x, w)
    ranks = np.array([1, 2, 1, 50, 7, 1, V, V + 9, V // 2, 64], np.int32)
    logits, computed = by_groups(together, x, table, screen, ranks)
    for row, k in enumerate(np.clip(ranks, 1, V)):
        order = np.argsort(-exact[row])
        kth = exact[row, order[k - 1]]
        # Whatever is as large as the k-th is exact, and what is not stays below it.
        top = exact[row] >= kth - slack[row]
        difference = np.abs(logits[row] - exact[row])
        assert (difference <= slack[row])[top].all()
        assert (logits[row][~top] <= kth + slack[row][~top]).all()
        assert k <= computed[row] <= V
        assert (difference <= slack[row]).sum() >= computed[row]
        gap = kth - exact[row, order[1]] if V > 1 else 1
        if k == 1 and gap > 2 * slack[row].max():
            assert logits[row].argmax() == order[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("together", [2, 6])
def test_the_kernels_and_the_reference_bound_alike(kernel, together, kind):
    """What is computed is what the bound, in float64 and with no slack, asks for; little more."""
    V, D = 4099, 256
    table, screen, w = head(V, D, kind)
    x = np.random.default_rng(1).standard_normal((6, D)).astype(np.float32)
    x[3] *= np.where(np.arange(D) % 50 == 3, 100, 1)
    ranks = np.array([1, 50, 1, 3, 500, 10], np.int32)
    exact, slack = exactly(x, w)
    energy = np.square(np.pad(x.astype(np.float64), ((0, 0), (0, -D % 31)))).reshape(6, -1, 31)
    energy = energy.sum(-1)
    step = np.pad(steps(screen), ((0, 0), (0, -D % 31))).reshape(V, -1, 31)[..., 0]
    bound = DEVIATIONS * np.minimum(
        np.sqrt(energy.sum(1))[:, None] * step.max(1),
        (energy**2).sum(1)[:, None] ** 0.25 * (step**4).sum(1) ** 0.25,
    )
    approximate = x.astype(np.float64) @ dequantized(screen).T
    # int8 leaves |z - p| <= sqrt(E) max|z| / 127 / 2, two of it / 127^2 / 4; z up to 3 times x.
    left = 127**2 * 4 if together == 2 else 127 * 2
    rest = 3 * np.sqrt(288) * np.abs(x).max(1) / left + 1e-4 * np.sqrt(energy.sum(1))
    rest = rest[:, None] * np.asarray(screen.norms).astype(np.float64)
    for impl in ("ffi", "reference"):
        logits, computed = by_groups(together, x, table, screen, ranks, impl)
        for row, k in enumerate(ranks):
            kth = np.sort(exact[row])[-k]
            candidates = np.argsort(-approximate[row])[: 2 * k] if impl == "ffi" else slice(None)
            threshold = np.sort(exact[row][candidates])[-k]
            least = approximate[row] + bound[row] * 0.9999 - rest[row] > kth + slack[row].max()
            most = approximate[row] + bound[row] * 1.0001 + 2 * rest[row] >= threshold
            assert (np.abs(logits[row] - exact[row]) <= slack[row])[least].all()
            assert least.sum() <= computed[row] <= most.sum(), (impl, row)
        if kind == "normal" and together == 2:
            assert computed[0] < 0.2 * V


def test_all_kernels_give_the_same_bits():
    table, screen, _ = head(333, 65)
    x, ranks = inputs(65, 5), np.full(5, 3, np.int32)
    found = []
    for name in KERNELS:
        ffi.force_kernel(name)
        found.append(np.asarray(screened(x, table, screen, ranks)[0]).tobytes())
    ffi.force_kernel(None)
    assert len(set(found)) == 1


def test_equal_rows_have_equal_logits_and_the_first_wins(kernel):
    table, screen, w = head(4099, 40, "ties")
    x = inputs(40, 3)
    logits = np.asarray(screened(x, table, screen, np.full(3, 20, np.int32))[0])
    for row in range(3):
        best = logits[row].argmax()
        twins = (w == w[best]).all(1)
        assert twins.sum() > 1
        assert best == np.flatnonzero(twins)[0]
        assert len(set(logits[row][twins])) == 1


@pytest.mark.parametrize("impl", ["ffi", "reference", "auto"])
def test_shapes_and_rows_that_are_not_finite(impl):
    table, screen, _ = head(100, 33)
    x = inputs(33, 6).reshape(2, 3, 33)
    x[0, 1, 7], x[1, 2, 32] = np.nan, np.inf
    ranks = np.array([[1, 1, -5], [0, 100, 2]], np.int32)
    logits, computed = screened(x, table, screen, ranks, impl=impl)
    assert (logits.shape, logits.dtype) == ((2, 3, 100), jnp.float32)
    assert (computed.shape, computed.dtype) == ((2, 3), jnp.int32)
    lost = np.isnan(np.asarray(logits))
    assert lost[0, 1].all()
    assert lost[1, 2].all()
    assert lost.sum() == 200
    alone = screened(x[1, 1], table, screen, ranks[1, 1], impl=impl)[0]
    np.testing.assert_allclose(alone, logits[1, 1], rtol=1e-4, atol=1e5)
    none = screened(np.zeros((0, 33), np.float32), table, screen, np.zeros(0, np.int32), impl=impl)
    assert none[0].shape == (0, 100)


def test_bfloat16_rows_are_widened():
    table, screen, w = head(333, 65)
    x = jnp.asarray(inputs(65, 1), jnp.bfloat16)
    logits = np.asarray(screened(x, table, screen, np.array([333], np.int32))[0])
    exact, slack = exactly(x.astype(jnp.float32), w)
    assert (np.abs(logits - exact) <= slack).all()


def test_misfits_are_refused():
    table, screen, _ = head(100, 33)
    x, ranks = jnp.ones((2, 33)), jnp.ones(2, jnp.int32)
    with pytest.raises(ValueError, match=r"table is float32\[100, 33\]; its screen wants bfloat16"):
        ops.screened_logits(x, table.astype(jnp.float32), screen, ranks)
    with pytest.raises(ValueError, match=r"table is bfloat16\[99, 33\]"):
        ops.screened_logits(x, table[:99], screen, ranks)
    with pytest.raises(ValueError, match=r"x has shape \(2, 32\) and ranks \(2,\)"):
        ops.screened_logits(x[:, 1:], table, screen, ranks)
    with pytest.raises(ValueError, match=r"ranks \(3,\)"):
        ops.screened_logits(x, table, screen, jnp.ones(3, jnp.int32))
    with pytest.raises(ValueError, match="impl='fast'"):
        ops.screened_logits(x, table, screen, ranks, impl="fast")


F, B, S, U = jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint32
OPERANDS = {
    "x": ((2, 33), F), "parts": ((2, 2, 64), F), "approximate": ((2, 2, 100), F),
    "table": ((100, 33), B), "dither": ((33,), F), "scale": ((100,), F), "spreads": ((100,), F),
    "norms": ((100,), F), "ranks": ((2,), S), "allowed": ((2, 4), U),
}  # fmt: skip


@pytest.mark.parametrize(
    ("what", "shape", "dtype"),
    [(name, (*shape[:-1], shape[-1] + 1), dtype) for name, (shape, dtype) in OPERANDS.items()]
    + [(name, shape[:-1], dtype) for name, (shape, dtype) in OPERANDS.items()]
    + [(name, shape, B if dtype == F else F) for name, (shape, dtype) in OPERANDS.items()]
    + [("table", (0, 33), B), ("x", (2, 0), F), ("parts", (2, 3, 64), F)]
    + [("parts", (2, 1, 64), F)],
)
def test_the_custom_call_checks_every_operand(what, shape, dtype):
    ffi.kernels()  # registers
    operands = [
        jnp.ones(shape, dtype) if name == what else jnp.ones(*about)
        for name, about in OPERANDS.items()
    ]
    results = (jax.ShapeDtypeStruct((2, 100), F), jax.ShapeDtypeStruct((2,), S))
    # Of a wider x or table, it is the others that do not fit.
    with pytest.raises(
        jax.errors.JaxRuntimeError, match=r"bitjax_screened_logits: \w+: wanted .*, got"
    ):
        jax.ffi.ffi_call("bitjax_screened_logits", results)(*operands)


def test_int8_parts_survive_the_products_own_quantisation():
    """The product quantises its operand again: the parts must come through that as they are."""
    x = inputs(64, 40)
    parts = np.asarray(reference.int8_parts(x, 2))
    again = np.asarray(reference.int8_per_token(parts).dequantize())
    np.testing.assert_allclose(again, parts, rtol=1e-6, atol=0)
    rest = np.abs(parts.astype(np.float64).sum(1) - x)
    assert (rest <= np.abs(x).max(1, keepdims=True) / 127**2 / 4 * 1.01 + 5e-8).all()
