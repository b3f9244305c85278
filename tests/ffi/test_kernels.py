"""Every kernel this machine can run, through JAX, against the NumPy oracle.

Integer products must be equal; so must the scaled results, bit for bit: the contract fixes each
float32 rounding and NumPy performs the same ones. The SiLU gate alone is compared within bounds.
"""

import concurrent.futures
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import packing_oracle as oracle
import pytest

from bitjax.ops import ffi
from bitjax.packing import FORMAT_VERSION, LAYOUTS, PackedWeights, pack

pytestmark = pytest.mark.skipif(not ffi.available(), reason="the extension is not built")

KERNELS = ffi.kernels() if ffi.available() else ()
DTYPES = [np.float32, oracle.BF16]
SCALE = np.float32(0.37)
# (M, N, K): M 0..12, then beyond tiles of 3, 4 and 6 rows and chunks of 128; N and K off and on the
# 16 rows and the 16, 20, 8 and 4 inputs of a block; panels of up to 4 row blocks and 512 inputs;
# and products beyond the 2^20 multiply-adds that the calling thread keeps to itself.
SHAPES = [(m, 5 + 3 * m, 17 + 7 * m) for m in range(13)]
SHAPES += [(1, 1, 1), (2, 16, 16), (1, 15, 31), (3, 17, 33), (4, 48, 160), (9, 64, 64)]
SHAPES += [(6, 65, 20), (5, 31, 513), (13, 80, 1025), (19, 33, 500), (128, 19, 41), (129, 50, 65)]
SHAPES += [(300, 130, 77), (70, 260, 300), (2, 1040, 1100), (1, 2100, 551)]
SHAPES += [(65, 18, 40), (127, 33, 65), (257, 17, 82)]  # around powers of two


@pytest.fixture(params=KERNELS)
def kernel(request):
    ffi.force_kernel(request.param)
    yield request.param
    ffi.force_kernel(None)


@pytest.fixture
def unforced():
    """For tests that force kernels themselves."""
    yield
    ffi.force_kernel(None)


def packed(layout, w_NxK, m_NxG, scale=SCALE):
    """Packed by the oracle."""
    multipliers = None if m_NxG is None else jnp.asarray(oracle.pack_multipliers(m_NxG))
    codes, scale = jnp.asarray(oracle.pack(layout, w_NxK)), jnp.asarray(scale)
    return PackedWeights(codes, scale, multipliers, *w_NxK.shape, layout)


@functools.cache  # kernels meet the same operands
def make(seed, layout, m, n, k, dtype=np.float32, per_row=False):
    """x [M, K], w [N, K] with its multipliers applied, and the packed weights."""
    rng = np.random.default_rng(seed)
    w_NxK, m_NxG = oracle.random_weights(rng, layout, n, k)
    scale = rng.standard_normal(n).astype(np.float32) if per_row else SCALE
    x = rng.standard_normal((m, k)).astype(dtype)
    return x, oracle.multiplied(w_NxK, m_NxG), packed(layout, w_NxK, m_NxG, scale)


@functools.partial(jax.jit, static_argnames=("gate", "eps"))
def matmul(x, weights, gate="none", norm=None, eps=0.0, residual=None):
    return ffi.packed_matmul(x, weights, gate, norm, eps, residual)


integer_matmul = jax.jit(ffi.packed_matmul_i32)


def assert_same_bits(got, wanted):
    got = np.asarray(got)
    assert got.dtype == wanted.dtype
    assert got.shape == wanted.shape
    bits = np.uint32 if wanted.dtype == np.float32 else np.uint16
    np.testing.assert_array_equal(got.view(bits), wanted.view(bits))


def run_python(code, **environment):
    """Runs code in a fresh interpreter and returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[1],  # for its oracle
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_format_is_that_of_python():
    import bitjax._ffi as extension

    assert extension.FORMAT_VERSION == FORMAT_VERSION
    twins = {
        name: (layout.number, layout.planes, layout.offset, layout.group_blocks)
        for name, layout in LAYOUTS.items()
    }
    assert {name: about[:4] for name, about in extension.LAYOUTS.items()} == twins


# ---- the product ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_equals_the_oracle(kernel, m, n, k, layout):
    dtype = DTYPES[(n + k) % 2]
    x, w_NxK, weights = make(m, layout, m, n, k, dtype, per_row=(n + k) % 3 > 0)
    wanted = oracle.packed_matmul(x, w_NxK, weights.scale)
    assert_same_bits(matmul(x, weights), wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("m", "n", "k"), [*SHAPES[:7], (129, 50, 65), (2, 1040, 1100)])
def test_integer_product_equals_the_oracle(kernel, m, n, k, layout):
    _, w_NxK, weights = make(m, layout, m, n, k)
    q = np.random.default_rng(1).integers(-128, 128, size=(m, k)).astype(np.int8)
    got = integer_matmul(q, weights)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, oracle.integer_product(q, w_NxK))


@functools.cache  # kernels meet the same operands
def extremes(layout, k):
    """Three rows of the lowest, no, and the highest weight; their values, and packed."""
    low, high = oracle.RANGE[layout]
    w = np.array([[low], [0], [high]]).repeat(k, axis=1)
    m = np.full((3, -(-k // 32)), 15) if layout == "int4" else None
    return oracle.multiplied(w, m)[:, 0], packed(layout, w, m)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("m", [1, 3, 65])
@pytest.mark.parametrize("value", [-128, -127, 0, 127])
def test_integer_extremes(kernel, value, layout, m):
    k = 16 * 23  # beyond the blocks that an int16 accumulator holds
    w, weights = extremes(layout, k)
    got = integer_matmul(np.full((m, k), value, np.int8), weights)
    np.testing.assert_array_equal(got, (k * value * w)[None].repeat(m, axis=0))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("m", [1, 5])
def test_largest_number_of_inputs(kernel, layout, m):
    import bitjax._ffi as extension

    k = extension.LAYOUTS[layout][-1]
    w, weights = extremes(layout, k)
    q = np.where(np.arange(m)[:, None] % 2 == 0, -128, 127).astype(np.int8).repeat(k, axis=1)
    got = integer_matmul(q, weights)
    np.testing.assert_array_equal(got, np.outer(q[:, 0].astype(np.int64), w) * k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [0.0, 1e-30, 1e-6, 1.0, 1e30])
@pytest.mark.parametrize("m", [4, 9])
def test_magnitudes(kernel, factor, dtype, m):
    x, w_NxK, weights = make(5, "ternary1.6", m, 21, 67)
    x = (x * np.float32(factor)).astype(dtype)
    assert_same_bits(matmul(x, weights), oracle.packed_matmul(x, w_NxK, SCALE))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ties_round_to_even(kernel, layout):
    # amax 127 makes the scale exactly 1: 0.5 -> 0, 1.5 -> 2, 2.5 -> 2, -0.5 -> 0, -1.5 -> -2.
    x = np.zeros((1, 16), np.float32)
    x[0, :6] = [127, 0.5, 1.5, 2.5, -0.5, -1.5]
    ones = np.ones((16, 1), int) if layout == "int4" else None
    got = matmul(x, packed(layout, np.eye(16, dtype=int), ones, np.float32(1)))
    np.testing.assert_array_equal(got[0, :6], [127, 0, 2, 2, 0, -2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rows", [4, 11])
def test_rows_that_are_not_finite_are_nan(kernel, bad, dtype, rows):
    x, w_NxK, weights = make(6, "int4", rows, 19, 37, dtype)
    x = x.copy()
    x[1, 36] = bad
    x[rows - 1, 0] = bad
    got = np.asarray(matmul(x, weights)).astype(np.float32)
    assert np.isnan(got[[1, rows - 1]]).all()
    others = np.delete(np.arange(rows), [1, rows - 1])
    wanted = oracle.packed_matmul(x[others], w_NxK, SCALE).astype(np.float32)
    np.testing.assert_array_equal(got[others], wanted)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 0)])
def test_leading_dimensions(kernel, lead):
    _, w_NxK, weights = make(7, "ternary2", 1, 21, 50)
    rng = np.random.default_rng(7)
    x = rng.standard_normal((*lead, 50)).astype(np.float32)
    residual = rng.standard_normal((*lead, 21)).astype(np.float32)
    wanted = oracle.packed_matmul(
        x.reshape(-1, 50), w_NxK, SCALE, residual=residual.reshape(-1, 21)
    )
    assert_same_bits(matmul(x, weights, residual=residual), wanted.reshape(*lead, 21))


def test_scale_of_the_weights_that_is_nan_reaches_its_outputs(kernel):
    x, _, weights = make(8, "int8", 2, 5, 20)
    with_scale = functools.partial(PackedWeights, multipliers=None, rows=5, cols=20, layout="int8")
    assert np.isnan(matmul(x, with_scale(weights.codes, jnp.float32(np.nan)))).all()
    scales = jnp.ones(5).at[3].set(jnp.nan)
    got = np.isnan(matmul(x, with_scale(weights.codes, scales)))
    np.testing.assert_array_equal(got, np.broadcast_to(np.arange(5) == 3, (2, 5)))


# ---- what is fused -------------------------------------------------------------------------------

FUSED = [
    {"residual": True},
    {"norm": True},
    {"gate": "relu2"},
    {"gate": "silu"},
    {"gate": "relu2", "norm": True},
    {"gate": "silu", "norm": True, "residual": True},
    {"gate": "relu2", "norm": True, "residual": True},
]


@functools.cache
def fused_operands(m, n, k, dtype, gate="none", norm=False, residual=False):
    """x and the keyword arguments."""
    rng = np.random.default_rng(m + n)
    x = rng.standard_normal((m, k if gate == "none" else 2 * k)).astype(dtype)
    arguments = {"gate": gate}
    if norm:
        arguments |= {"norm": rng.standard_normal(k).astype(np.float32), "eps": 1e-5}
    if residual:
        arguments["residual"] = (10 * rng.standard_normal((m, n))).astype(dtype)
    return x, arguments


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fused", FUSED, ids=lambda fused: "-".join(map(str, fused.values())))
@pytest.mark.parametrize(("m", "n", "k"), [(1, 140, 33), (4, 19, 17), (7, 70, 300)])
def test_fused(kernel, m, n, k, fused, dtype):
    x, arguments = fused_operands(m, n, k, dtype, **fused)
    layout = oracle.LAYOUTS[(m + FUSED.index(fused)) % 4]  # all of them share this code
    _, w_NxK, weights = make(3, layout, m, n, k, per_row=n % 2 == 0)
    got = matmul(x, weights, **arguments)
    if fused.get("gate") != "silu":
        assert_same_bits(got, oracle.packed_matmul(x, w_NxK, weights.scale, **arguments))

    # A gate's error is 7 units (kernel_test.cc); a norm that follows sees it twice, in the value
    # and in the mean, and adds its own, which kernel_test.cc counts.
    units = 0 if arguments["gate"] == "none" else 7
    if "norm" in arguments:
        units += units + (k / 16 + 8) / 2 + 4
    exact, error = oracle.bounded(x, w_NxK, weights.scale, units, **arguments)
    assert (np.abs(np.asarray(got).astype(np.float64) - exact) <= error).all()


@pytest.mark.parametrize(("layout", "m"), [*zip(LAYOUTS, [2, 4, 9, 130], strict=True)])
def test_silu_has_the_same_bits_with_every_kernel(unforced, layout, m):
    x, arguments = fused_operands(m, 35, 101, np.float32, gate="silu", norm=True, residual=True)
    weights = make(4, layout, m, 35, 101)[2]
    results = []
    for name in KERNELS:
        ffi.force_kernel(name)
        results.append(np.asarray(matmul(x, weights, **arguments)))
    for result in results:
        assert_same_bits(result, results[-1])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("fused", [f for f in FUSED if len(f) > 1 or "residual" not in f])
def test_fused_rows_that_are_not_finite_are_nan(kernel, fused, bad):
    x, arguments = fused_operands(6, 19, 37, np.float32, **fused)
    weights = make(3, "ternary1.6", 6, 19, 37)[2]
    clean = np.asarray(matmul(x, weights, **arguments))
    for column in (5, x.shape[1] - 1):
        spoilt = x.copy()
        spoilt[4, column] = bad
        got = np.asarray(matmul(spoilt, weights, **arguments))
        assert np.isnan(got[4]).all()
        np.testing.assert_array_equal(np.delete(got, 4, axis=0), np.delete(clean, 4, axis=0))


# ---- transformations -----------------------------------------------------------------------------


def test_jit_follows_the_forced_kernel(unforced):
    x, w_NxK, weights = make(9, "int4", 2, 18, 40)
    product = jax.jit(ffi.packed_matmul)
    wanted = oracle.packed_matmul(x, w_NxK, SCALE)
    for name in KERNELS:
        ffi.force_kernel(name)
        before = ffi.kernel_calls()
        assert_same_bits(product(x, weights), wanted)
        after = ffi.kernel_calls()
        ran = {other: after[other] - before[other] for other in after}
        assert ran == {other: int(other == name) for other in after}
    assert product._cache_size() == 1


# Axes of x, weights, multipliers, scale, norm, residual; the outermost vmap is last.
BATCHES = [
    [(0, None, None, None, None, None)],
    [(0, None, None, None, None, 0)],
    [(1, None, None, None, None, 1)],
    [(None, 0, None, None, None, None)],
    [(None, None, 0, None, None, None)],
    [(None, None, None, 0, None, None)],
    [(None, None, None, None, 0, None)],
    [(None, None, None, None, None, 0)],
    [(0, 0, 0, 0, 0, 0)],
    [(0, None, None, None, None, 0), (None, 0, 0, 0, 0, None)],
    [(None, 0, None, None, 0, None), (0, None, 0, 0, None, None)],
    [(0, 0, None, 0, None, 0), (0, None, 0, None, 0, None), (None, 0, None, 0, None, 0)],
]


@pytest.mark.parametrize("m", [2, 300])  # few rows on the calling thread, many on the pool
@pytest.mark.parametrize("batch", BATCHES)
def test_vmap(kernel, batch, m):
    x, w, multipliers, scale, norm, residual = vmap_operands(str(batch), m)
    n, k = w.shape[-2:]
    codes = lead_map(functools.partial(oracle.pack, "int4"), w)
    packed_multipliers = lead_map(oracle.pack_multipliers, multipliers)

    def one(x, codes, multipliers, scale, norm, residual):
        weights = PackedWeights(codes, scale, multipliers, n, k, "int4")
        return ffi.packed_matmul(x, weights, "relu2", norm, 1e-3, residual)

    for axes in batch:
        one = jax.vmap(one, in_axes=axes)
    got = jax.jit(one)(x, codes, packed_multipliers, scale, norm, residual)
    assert_same_bits(got, vmap_wanted(str(batch), m))


SIZES = [2, 3, 2]  # of a batch, innermost first


@functools.cache  # kernels meet the same operands
def vmap_operands(batch, m):
    n, k = 19, 36
    rng = np.random.default_rng(10)
    w, multipliers = oracle.random_weights(rng, "int4", n, k)
    operands = [
        rng.standard_normal((m, 2 * k)).astype(np.float32), w, multipliers,
        np.float32(SCALE), rng.standard_normal(k).astype(np.float32),
        rng.standard_normal((m, n)).astype(np.float32),
    ]  # fmt: skip
    for size, axes in zip(SIZES, eval(batch), strict=False):
        for i, axis in enumerate(axes):
            if axis is not None:
                stack = [
                    rng.permuted(operands[i]) if operands[i].ndim else operands[i] * (j + 1)
                    for j in range(size)
                ]
                operands[i] = np.stack(stack, axis=axis)
    return operands


@functools.cache
def vmap_wanted(batch, m):
    def one(x, w, multipliers, scale, norm, residual):
        w = oracle.multiplied(w, multipliers)
        return oracle.packed_matmul(
            x, w, scale, gate="relu2", norm=norm, eps=1e-3, residual=residual
        )

    for axes in eval(batch):
        one = functools.partial(_map_one, one, axes)
    return one(*vmap_operands(batch, m))


def _map_one(function, axes, *operands):
    """jax.vmap in a plain loop."""
    size = next(o.shape[a] for o, a in zip(operands, axes, strict=True) if a is not None)
    calls = [
        [o if a is None else np.take(o, i, axis=a) for o, a in zip(operands, axes, strict=True)]
        for i in range(size)
    ]
    return np.stack([function(*call) for call in calls])


def lead_map(function, array):
    """Over the leading dimensions of matrices."""
    results = [function(matrix) for matrix in array.reshape(-1, *array.shape[-2:])]
    return np.stack(results).reshape(*array.shape[:-2], *results[0].shape)


@pytest.mark.parametrize("layout", ["ternary1.6", "int8"])
@pytest.mark.parametrize("m", [4, 6])
def test_vmap_of_the_integer_product(kernel, layout, m):
    rng = np.random.default_rng(11)
    q = rng.integers(-128, 128, size=(3, m, 35)).astype(np.int8)
    w = np.stack([oracle.random_weights(rng, layout, 18, 35)[0] for _ in range(3)])
    codes = lead_map(functools.partial(oracle.pack, layout), w)

    def one(q, codes):
        weights = PackedWeights(codes, jnp.float32(1), None, 18, 35, layout)
        return ffi.packed_matmul_i32(q, weights)

    wanted = np.einsum("bmk,bnk->bmn", q.astype(np.int64), w)
    np.testing.assert_array_equal(jax.jit(jax.vmap(one))(q, codes), wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scan_and_while_loop(kernel, layout):
    x, w_NxK, weights = make(12, layout, 3, 24, 24)
    wanted = x
    for _ in range(4):
        wanted = oracle.packed_matmul(wanted, w_NxK, SCALE, residual=wanted)

    def step(x, weights):
        return ffi.packed_matmul(x, weights, residual=x)

    @jax.jit
    def scanned(x, weights):
        return jax.lax.scan(lambda x, _: (step(x, weights), None), x, length=4)[0]

    @jax.jit
    def looped(x, weights):
        def body(state):
            return state[0] + 1, step(state[1], weights)

        return jax.lax.while_loop(lambda state: state[0] < 4, body, (0, x))[1]

    assert_same_bits(scanned(x, weights), wanted)
    assert_same_bits(looped(x, weights), wanted)


@pytest.mark.parametrize("m", [4, 8])
def test_donated_inputs(kernel, m):
    x, w_NxK, weights = make(13, "ternary2", m, 32, 32)  # N = K: y may take either's buffer
    residual = np.random.default_rng(13).standard_normal((m, 32)).astype(np.float32)
    product = jax.jit(
        lambda x, residual, w: ffi.packed_matmul(x, w, residual=residual), donate_argnums=(0, 1)
    )
    wanted = oracle.packed_matmul(x, w_NxK, SCALE, residual=residual)
    with pytest.warns(UserWarning, match="donated buffers were not usable"):  # one y for the two
        assert_same_bits(product(jnp.array(x), jnp.array(residual), weights), wanted)


# ---- threads -------------------------------------------------------------------------------------


def test_concurrent_calls(kernel):
    cases = [
        make(20 + i, layout, m, 200 + i, 300)
        for i, (layout, m) in enumerate(zip(LAYOUTS, [1, 2, 33, 40], strict=True))
    ]
    wanted = [oracle.packed_matmul(x, w, SCALE) for x, w, _ in cases]

    def one(i):
        x, _, weights = cases[i % 4]
        assert_same_bits(matmul(x, weights), wanted[i % 4])

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        list(pool.map(one, range(120)))


PROGRAM = """
import numpy as np, jax.numpy as jnp, packing_oracle as oracle
from bitjax.ops import ffi
from bitjax.packing import PackedWeights
rng = np.random.default_rng(0)
w, _ = oracle.random_weights(rng, "ternary1.6", 300, 200)
x = rng.standard_normal((40, 200)).astype(np.float32)
codes = jnp.asarray(oracle.pack("ternary1.6", w))
weights = PackedWeights(codes, jnp.float32(0.5), None, 300, 200, "ternary1.6")
y = ffi.packed_matmul(jnp.asarray(x), weights)
np.testing.assert_array_equal(y, oracle.packed_matmul(x, w, 0.5))
print(ffi.active_kernel(), ffi.kernel_calls()[ffi.active_kernel()])
"""


def test_pool_of_one_thread():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
    assert run_python(PROGRAM, XLA_FLAGS=flags, NPROC="1").endswith(" 1")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs CPU affinity")
def test_one_processor():
    one = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    assert run_python(one + PROGRAM).endswith(" 1")


# ---- choice of kernel ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", KERNELS)
def test_environment_variable_forces_a_kernel(name):
    assert run_python(PROGRAM, BITJAX_KERNEL=name) == f"{name} 1"


def test_environment_variable_that_names_no_kernel_is_an_error():
    program = PROGRAM.strip().replace("\n", "\n    ")
    code = f"try:\n    {program}\nexcept Exception as error:\n    print(error)"
    message = run_python(code, BITJAX_KERNEL="nonesuch")
    assert "BITJAX_KERNEL: unknown kernel 'nonesuch'; compiled: " in message


def test_default_is_the_first_available_kernel():
    if not os.environ.get("BITJAX_KERNEL"):
        assert ffi.active_kernel() == ffi.kernels()[0]
    assert ffi.kernels()[-1] == "scalar"
    assert set(ffi.kernels()) <= set(ffi.kernel_calls())


def test_unknown_and_unsupported_kernels_are_refused():
    before = ffi.active_kernel()
    with pytest.raises(ValueError, match=r"unknown kernel 'sse9'; compiled: .*scalar"):
        ffi.force_kernel("sse9")
    with pytest.raises(ValueError, match="empty name"):
        ffi.force_kernel("")
    for name in set(ffi.kernel_calls()) - set(ffi.kernels()):
        with pytest.raises(ValueError, match=f"this machine cannot run kernel '{name}'; available"):
            ffi.force_kernel(name)
    assert ffi.active_kernel() == before


@pytest.mark.parametrize("threads", [1, 2, 3, None])
def test_results_do_not_depend_on_the_number_of_threads(threads):
    rng = np.random.default_rng(0)
    weights = pack(rng.integers(-1, 2, (700, 2000)), 1.0)
    q = jnp.asarray(rng.integers(-128, 128, (9, 2000)), jnp.int8)
    expected = ffi.packed_matmul_i32(q, weights)
    try:
        ffi.set_threads(threads)
        assert (ffi.packed_matmul_i32(q, weights) == expected).all()
    finally:
        ffi.set_threads(None)


def test_less_than_one_thread_is_refused():
    with pytest.raises(ValueError, match="wanted 1 or more"):
        ffi.set_threads(0)


# ---- errors --------------------------------------------------------------------------------------

X = jnp.zeros((2, 40), jnp.float32)
Q = X.astype(jnp.int8)
CODES = jnp.zeros((2, 3, 64), jnp.uint8)  # 20 outputs, 40 inputs, ternary2


@pytest.mark.parametrize(
    ("function", "x", "message"),
    [
        (ffi.packed_matmul, X.astype(jnp.float16), "x wanted float32 or bfloat16, got float16"),
        (ffi.packed_matmul, Q, "x wanted float32 or bfloat16, got int8"),
        (ffi.packed_matmul_i32, X, "q wanted int8, got float32"),
    ],
)
def test_dtypes_are_checked_at_trace_time(function, x, message):
    weights = PackedWeights(CODES, jnp.float32(1), None, 20, 40, "ternary2")
    with pytest.raises(ValueError, match=f"{function.__name__}: {message}"):
        jax.eval_shape(function, x, weights)


def raw(name, result, *operands, **attributes):
    """The custom call without the Python checks."""
    call = jax.ffi.ffi_call(name, jax.ShapeDtypeStruct(*result), vmap_method="expand_dims")
    return jax.block_until_ready(call(*operands, **attributes))


F32, I32 = "bitjax_packed_matmul", "bitjax_packed_matmul_i32"
ALL = {
    "x": X,
    "codes": CODES,
    "multipliers": jnp.zeros((0, 0, 0), jnp.uint8),
    "w_scale": jnp.ones(1),
    "norm": jnp.zeros(0),
    "residual": jnp.zeros((2, 0)),
    "columns": jnp.zeros((0, 0, 0), jnp.uint8),
    "rows": jnp.zeros(0, jnp.int32),
    "y": ((2, 20), np.float32),
    "layout": np.int64(0),
    "gate": np.int64(0),
    "eps": np.float32(0),
}
INT4 = {
    "layout": np.int64(2),
    "codes": jnp.zeros((2, 8, 64), jnp.uint8),
    "multipliers": jnp.ones((2, 2, 16), jnp.uint8),
}
BATCH = {
    "x": X[None].repeat(2, 0), "codes": CODES[None], "w_scale": jnp.ones((1, 1)),
    "norm": jnp.zeros((1, 0)), "residual": jnp.zeros((1, 2, 0)),
}  # fmt: skip


def call_with(changes, integer=False):
    operands = ALL | ({"x": Q, "y": ((2, 20), np.int32)} if integer else {}) | changes
    y, layout, gate, eps = (operands.pop(name) for name in ("y", "layout", "gate", "eps"))
    attributes = {"layout": layout} if integer else {"layout": layout, "gate": gate, "eps": eps}
    return raw(I32 if integer else F32, y, *operands.values(), **attributes)


def test_the_operands_of_the_error_tests_are_valid():
    assert call_with({}).shape == (2, 20)
    assert call_with(INT4).shape == (2, 20)
    assert call_with(BATCH | {"y": ((2, 2, 20), np.float32)}).shape == (2, 2, 20)
    assert call_with({}, integer=True).shape == (2, 20)
    full = {"w_scale": jnp.ones(20), "norm": jnp.ones(40), "residual": jnp.ones((2, 20))}
    assert call_with(full | {"x": jnp.ones((2, 80)), "gate": np.int64(2)}).shape == (2, 20)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # dtypes
        ({"x": Q}, "x: wanted f32 or bf16, got s8"),
        ({"codes": CODES.astype(jnp.int8)}, "codes: wanted u8, got s8"),
        ({"multipliers": jnp.zeros((0, 0, 0), jnp.int8)}, "multipliers: wanted u8, got s8"),
        ({"w_scale": jnp.ones(1, jnp.bfloat16)}, "w_scale: wanted f32, got bf16"),
        ({"norm": jnp.ones(40, jnp.bfloat16)}, "norm: wanted f32, got bf16"),
        ({"residual": jnp.ones((2, 20), jnp.bfloat16)}, "residual: wanted f32, got bf16"),
        ({"x": X.astype(jnp.bfloat16)}, "residual: wanted bf16, got f32"),
        ({"y": ((2, 20), np.int32)}, "result: wanted f32, got s32"),
        # x and y
        ({"x": X[0]}, r"x: wanted \[..., M, K\], got \[40\]"),
        ({"y": ((20,), np.float32)}, r"result: wanted .* got \[20\]"),
        ({"y": ((3, 20), np.float32)}, r"result: wanted \[..., M, N\] with the M .* got \[3, 20\]"),
        ({"y": ((2, 2, 20), np.float32)}, r"result: wanted .* got \[2, 2, 20\]"),
        ({"x": jnp.zeros((2, 41)), "gate": np.int64(1)}, r"x: wanted an even last .*\[2, 41\]"),
        ({"x": jnp.zeros((1, 2**18 + 1)), "y": ((1, 20), np.float32),
          "residual": jnp.zeros((1, 0))}, r"x: wanted K <= 262144, got \[1, 262145\]"),
        ({"x": jnp.zeros((2, 2**16 + 1)), "layout": np.int64(3)}, "x: wanted K <= 65536"),
        ({"x": jnp.zeros((2, 2**16 + 1)), "layout": np.int64(2)}, "x: wanted K <= 65536"),
        # weights
        ({"codes": CODES[0]}, r"codes: wanted \[2, 3, 64\] with 0 leading .* got \[3, 64\]"),
        ({"codes": CODES[:1]}, r"codes: wanted \[2, 3, 64\] .* got \[1, 3, 64\]"),
        ({"codes": CODES[:, :2]}, r"codes: wanted .* got \[2, 2, 64\]"),
        ({"codes": CODES[..., :32]}, r"codes: wanted .* got \[2, 3, 32\]"),
        ({"codes": CODES[None]}, r"codes: wanted .* got \[1, 2, 3, 64\]"),
        ({"layout": np.int64(1)}, r"codes: wanted \[2, 2, 64\]"),
        ({"layout": np.int64(2)}, r"codes: wanted \[2, 8, 64\]"),
        ({"layout": np.int64(3)}, r"codes: wanted \[2, 10, 64\]"),
        (INT4 | {"multipliers": ALL["multipliers"]}, r"multipliers: wanted \[2, 2, 16\] .*0, 0\]"),
        (INT4 | {"multipliers": jnp.ones((1, 2, 16), jnp.uint8)}, r"multipliers: .*\[1, 2, 16\]"),
        (INT4 | {"multipliers": jnp.ones((2, 1, 16), jnp.uint8)}, r"multipliers: .*\[2, 1, 16\]"),
        (INT4 | {"multipliers": jnp.ones((2, 2, 8), jnp.uint8)}, r"multipliers: .*\[2, 2, 8\]"),
        (INT4 | {"multipliers": jnp.ones((2, 32), jnp.uint8)}, r"multipliers: .*\[2, 32\]"),
        ({"w_scale": jnp.float32(1)}, r"w_scale: wanted \[1\] .* got \[\]"),
        ({"w_scale": jnp.ones(2)}, r"w_scale: wanted \[20\] .* got \[2\]"),
        ({"w_scale": jnp.ones((1, 20))}, r"w_scale: wanted .* got \[1, 20\]"),
        # norm and residual
        ({"norm": jnp.ones(1)}, r"norm: wanted \[40\] .* got \[1\]"),
        ({"norm": jnp.ones(80)}, r"norm: wanted \[40\] .* got \[80\]"),
        ({"norm": jnp.ones((1, 40))}, r"norm: wanted .* got \[1, 40\]"),
        ({"norm": jnp.ones(40), "x": jnp.ones((2, 78)), "gate": np.int64(2)}, "norm: wanted"),
        ({"residual": jnp.ones((2, 1))}, r"residual: wanted \[2, 20\] .* got \[2, 1\]"),
        ({"residual": jnp.ones((1, 20))}, r"residual: wanted \[2, 20\] .* got \[1, 20\]"),
        ({"residual": jnp.ones((1, 0))}, r"residual: wanted \[2, 0\] .* got \[1, 0\]"),
        ({"residual": jnp.ones(20)}, r"residual: wanted .* got \[20\]"),
        # rows
        ({"rows": jnp.zeros(1)}, "rows: wanted s32, got f32"),
        ({"rows": jnp.zeros(2, jnp.int32)}, r"rows: wanted one number, .*, got \[2\]"),
        # columns
        ({"columns": jnp.zeros((0, 0, 0), jnp.int8)}, "columns: wanted u8, got s8"),
        ({"columns": jnp.zeros((1, 39, 64), jnp.uint8)}, r"columns: wanted \[1, 40, 64\]"),
        (INT4 | {"columns": jnp.zeros((1, 40, 64), jnp.uint8)}, "columns: wanted none for this"),
        # leading dimensions
        (BATCH | {"y": ((3, 2, 20), np.float32)}, r"result: wanted the leading .*\[3, 2, 20\]"),
        (BATCH | {"y": ((1, 2, 20), np.float32)}, r"result: wanted the leading .*\[1, 2, 20\]"),
        (BATCH | {"y": ((2, 2, 20), np.float32), "norm": jnp.ones((3, 40))}, "wanted the leading"),
        (BATCH | {"y": ((2, 2, 20), np.float32), "w_scale": jnp.ones(1)},
         r"w_scale: wanted \[..., 1\] with 1 leading dimensions, as x has, got \[1\]"),
        # attributes
        ({"layout": np.int64(4)}, r"layout: wanted 0\.\.3, got 4"),
        ({"layout": np.int64(-1)}, r"layout: wanted 0\.\.3, got -1"),
        ({"gate": np.int64(3)}, r"gate: wanted 0\.\.2, got 3"),
        ({"gate": np.int64(-1)}, r"gate: wanted 0\.\.2, got -1"),
    ],
)  # fmt: skip
def test_handlers_check_every_operand(changes, message):
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=f"{F32}: .*{message}"):
        call_with(changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": X}, "x: wanted s8, got f32"),
        ({"codes": CODES.astype(jnp.int32)}, "codes: wanted u8, got s32"),
        ({"multipliers": jnp.zeros((0, 0, 0), jnp.int8)}, "multipliers: wanted u8, got s8"),
        ({"y": ((2, 20), np.float32)}, "result: wanted s32, got f32"),
        ({"codes": CODES[:, :1]}, r"codes: wanted .* got \[2, 1, 64\]"),
        (INT4 | {"multipliers": jnp.ones((2, 1, 16), jnp.uint8)}, r"multipliers: .*\[2, 1, 16\]"),
        ({"layout": np.int64(9)}, r"layout: wanted 0\.\.3, got 9"),
    ],
)
def test_the_integer_handler_checks_its_operands(changes, message):
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=f"{I32}: .*{message}"):
        call_with(changes, integer=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": np.int32(17)}, "expected S64 but got S32"),
        ({"gate": np.float32(17)}, "expected S64 but got F32"),
        ({"eps": np.float64(17)}, "expected F32 but got F64"),
    ],
)
def test_attributes_of_other_types_are_refused(changes, message):
    # Values that no other test uses: to JAX's cache np.int32(0) is np.int64(0).
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=message):
        call_with(changes)


def test_an_empty_batch_is_fine():
    got = call_with(BATCH | {"x": X[None][:0], "y": ((0, 2, 20), np.float32)})
    assert got.shape == (0, 2, 20)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and RLIMIT_AS")
def test_no_memory_is_an_error_and_not_a_crash():
    # 2^22 rows of one int8 each quantise to rows of 64 bytes: 256 MiB, of which 160 are allowed
    # (the result, which XLA allocates, takes 16).
    code = """
import resource
import jax, jax.numpy as jnp
from bitjax.ops import ffi
from bitjax.packing import PackedWeights
q = jnp.zeros((2**22, 1), jnp.int8)
codes = jnp.full((1, 1, 64), 0x55, jnp.uint8)
weights = PackedWeights(codes, jnp.float32(1), None, 1, 1, "ternary2")
product = jax.jit(ffi.packed_matmul_i32).lower(q, weights).compile()
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 160 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    jax.block_until_ready(product(q, weights))
except Exception as error:
    print(error)
"""
    assert "bitjax_packed_matmul_i32: no memory for temporary values" in run_python(code)


# ---- a missing and a broken build ----------------------------------------------------------------


def test_a_missing_extension_is_reported_as_missing():
    code = """
import sys
sys.modules["bitjax._ffi"] = None
from bitjax.ops import ffi
print(ffi.available())
try:
    ffi.active_kernel()
except ModuleNotFoundError as error:
    print(error)
"""
    assert run_python(code).startswith("False\nbitjax._ffi is not installed")


def test_a_broken_extension_raises_its_own_error():
    code = """
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "bitjax._ffi":
            raise ImportError("undefined symbol: nonesuch")
sys.meta_path.insert(0, Broken())
from bitjax.ops import ffi
try:
    ffi.available()
except ImportError as error:
    print("broken:", error)
"""
    assert run_python(code) == "broken: undefined symbol: nonesuch"
