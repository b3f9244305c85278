"""Every kernel this machine can run, through JAX, against the NumPy oracle.

Integer products must be equal; so must the scaled results, bit for bit: the contract fixes each
float32 rounding and NumPy performs the same ones.
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

pytestmark = pytest.mark.skipif(not ffi.available(), reason="the extension is not built")

KERNELS = ffi.kernels() if ffi.available() else ()
DTYPES = [np.float32, oracle.BF16]
SCALE = 0.37
# (M, N, K): M 0..12 and beyond a tile, N and K at multiples of 16 and off them, and one product
# beyond the 2^20 multiply-adds that the calling thread keeps to itself.
SHAPES = [(m, 5 + 3 * m, 17 + 7 * m) for m in range(13)]
SHAPES += [(1, 1, 1), (2, 16, 16), (1, 15, 31), (3, 17, 33), (9, 48, 160), (1, 40, 161)]
SHAPES += [(8, 31, 175), (17, 130, 176), (70, 260, 300), (1, 1040, 1100)]


@pytest.fixture(params=KERNELS)
def kernel(request):
    ffi.force_kernel(request.param)
    yield request.param
    ffi.force_kernel(None)


def make(seed, m, n, k, dtype=np.float32):
    """x [M, K], w [N, K] and packed codes."""
    rng = np.random.default_rng(seed)
    w_NxK = oracle.random_weights(rng, n, k)
    return rng.standard_normal((m, k)).astype(dtype), w_NxK, oracle.pack(w_NxK)


def matmul(x, codes, rows, scale=SCALE):
    return ffi.ternary_matmul(jnp.asarray(x), jnp.asarray(codes), jnp.float32(scale), rows=rows)


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


# ---- the product ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_equals_the_oracle(kernel, m, n, k, dtype):
    x, w_NxK, codes = make(m, m, n, k, dtype)
    assert_same_bits(matmul(x, codes, n), oracle.ternary_matmul(x, w_NxK, SCALE))


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_integer_product_equals_the_oracle(kernel, m, n, k):
    _, w_NxK, codes = make(m, m, n, k)
    q = np.random.default_rng(1).integers(-128, 128, size=(m, k)).astype(np.int8)
    got = ffi.ternary_matmul_i32(jnp.asarray(q), jnp.asarray(codes), rows=n)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, oracle.integer_product(q, w_NxK))


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("weight", [-1, 0, 1])
@pytest.mark.parametrize("value", [-128, -127, 0, 127])
def test_integer_extremes(kernel, value, weight, m):
    k = 16 * 23  # beyond the blocks that an int16 accumulator holds
    q = jnp.full((m, k), value, jnp.int8)
    codes = jnp.asarray(oracle.pack(np.full((20, k), weight)))
    got = ffi.ternary_matmul_i32(q, codes, rows=20)
    np.testing.assert_array_equal(got, np.full((m, 20), k * value * weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [0.0, 1e-30, 1e-6, 1.0, 1e30])
def test_magnitudes(kernel, factor, dtype):
    x, w_NxK, codes = make(5, 4, 21, 67)
    x = (x * np.float32(factor)).astype(dtype)
    assert_same_bits(matmul(x, codes, 21), oracle.ternary_matmul(x, w_NxK, SCALE))


def test_ties_round_to_even(kernel):
    # amax 127 makes the scale exactly 1: 0.5 -> 0, 1.5 -> 2, 2.5 -> 2, -0.5 -> 0, -1.5 -> -2.
    x = np.zeros((1, 16), np.float32)
    x[0, :6] = [127, 0.5, 1.5, 2.5, -0.5, -1.5]
    got = matmul(x, oracle.pack(np.eye(16, dtype=np.int64)), 16, scale=1.0)
    np.testing.assert_array_equal(got[0, :6], [127, 0, 2, 2, 0, -2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_nan(kernel, bad, dtype):
    x, w_NxK, codes = make(6, 11, 19, 37, dtype)
    x[3, 36] = bad
    x[10, 0] = bad
    got = np.asarray(matmul(x, codes, 19)).astype(np.float32)
    assert np.isnan(got[[3, 10]]).all()
    others = np.delete(np.arange(11), [3, 10])
    wanted = oracle.ternary_matmul(x[others], w_NxK, SCALE).astype(np.float32)
    np.testing.assert_array_equal(got[others], wanted)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 0)])
def test_leading_dimensions(kernel, lead):
    _, w_NxK, codes = make(7, 1, 21, 50)
    x = np.random.default_rng(7).standard_normal((*lead, 50)).astype(np.float32)
    wanted = oracle.ternary_matmul(x.reshape(-1, 50), w_NxK, SCALE).reshape(*lead, 21)
    assert_same_bits(matmul(x, codes, 21), wanted)


def test_scale_of_the_weights_that_is_nan_reaches_every_output(kernel):
    x, _, codes = make(8, 2, 5, 20)
    assert np.isnan(matmul(x, codes, 5, scale=np.nan)).all()


# ---- transformations -----------------------------------------------------------------------------


def test_jit_follows_the_forced_kernel():
    x, w_NxK, codes = make(9, 2, 18, 40)
    product = jax.jit(lambda x: matmul(x, codes, 18))
    wanted = oracle.ternary_matmul(x, w_NxK, SCALE)
    for name in KERNELS:
        ffi.force_kernel(name)
        before = ffi.kernel_calls()
        assert_same_bits(product(x), wanted)
        after = ffi.kernel_calls()
        ran = {other: after[other] - before[other] for other in after}
        assert ran == {other: int(other == name) for other in after}
    ffi.force_kernel(None)
    assert product._cache_size() == 1


BATCHES = [  # (axes of x, of codes, of scale), outermost vmap last
    [(0, None, None)],
    [(1, None, None)],
    [(None, 0, None)],
    [(None, None, 0)],
    [(0, 0, 0)],
    [(0, None, None), (None, 0, 0)],
    [(None, 0, None), (0, None, 0)],
    [(0, 0, None), (0, None, 0), (None, 0, None)],
]


@pytest.mark.parametrize("rows_of_x", [2, 200])  # on the calling thread, on the pool
@pytest.mark.parametrize("batch", BATCHES)
def test_vmap(kernel, batch, rows_of_x):
    n, k = 19, 36
    rng = np.random.default_rng(10)
    operands = [
        rng.standard_normal((rows_of_x, k)).astype(np.float32),
        oracle.random_weights(rng, n, k),
        np.float32(SCALE),
    ]
    sizes = [2, 3, 4]
    for level, axes in enumerate(batch):
        for i, axis in enumerate(axes):
            if axis is not None:
                stack = [
                    rng.permuted(operands[i]) if operands[i].ndim else operands[i] * (j + 1)
                    for j in range(sizes[level])
                ]
                operands[i] = np.stack(stack, axis=axis)
    x, w, scale = operands
    codes = np.stack([oracle.pack(m) for m in w.reshape(-1, n, k)])
    codes = codes.reshape(*w.shape[:-2], *codes.shape[1:])

    product = functools.partial(ffi.ternary_matmul, rows=n)
    for axes in batch:
        product = jax.vmap(product, in_axes=axes)
    wanted = _vmap_numpy(oracle.ternary_matmul, batch)
    assert_same_bits(product(x, codes, scale), wanted(x, w, scale))


def _vmap_numpy(function, batch):
    """jax.vmap in plain loops."""
    for axes in batch:
        function = functools.partial(_map_one, function, axes)
    return function


def _map_one(function, axes, *operands):
    size = next(o.shape[a] for o, a in zip(operands, axes, strict=True) if a is not None)
    calls = [
        [o if a is None else np.take(o, i, axis=a) for o, a in zip(operands, axes, strict=True)]
        for i in range(size)
    ]
    return np.stack([function(*call) for call in calls])


def test_vmap_of_the_integer_product(kernel):
    rng = np.random.default_rng(11)
    q = rng.integers(-128, 128, size=(3, 4, 35)).astype(np.int8)
    w = oracle.random_weights(rng, 3 * 18, 35).reshape(3, 18, 35)
    codes = jnp.stack([oracle.pack(m) for m in w])
    got = jax.vmap(functools.partial(ffi.ternary_matmul_i32, rows=18))(jnp.asarray(q), codes)
    np.testing.assert_array_equal(got, np.einsum("bmk,bnk->bmn", q.astype(np.int64), w))


def test_scan_and_while_loop(kernel):
    x, w_NxK, codes = make(12, 3, 24, 24)
    codes = jnp.asarray(codes)
    wanted = x
    for _ in range(4):
        wanted = oracle.ternary_matmul(wanted, w_NxK, SCALE)

    @jax.jit
    def scanned(x, codes):
        return jax.lax.scan(lambda x, _: (matmul(x, codes, 24), None), x, length=4)[0]

    @jax.jit
    def looped(x, codes):
        def body(state):
            return state[0] + 1, matmul(state[1], codes, 24)

        return jax.lax.while_loop(lambda state: state[0] < 4, body, (0, x))[1]

    assert_same_bits(scanned(x, codes), wanted)
    assert_same_bits(looped(x, codes), wanted)


def test_donated_input(kernel):
    x, w_NxK, codes = make(13, 4, 32, 32)  # N = K: the output may take the input's buffer
    product = jax.jit(lambda x, codes: matmul(x, codes, 32), donate_argnums=0)
    got = product(jnp.array(x), jnp.asarray(codes))
    assert_same_bits(got, oracle.ternary_matmul(x, w_NxK, SCALE))


# ---- threads -------------------------------------------------------------------------------------


def test_concurrent_calls(kernel):
    cases = [make(20 + i, m, 200 + i, 300) for i, m in enumerate([1, 2, 33, 40])]
    wanted = [oracle.ternary_matmul(x, w, SCALE) for x, w, _ in cases]
    product = jax.jit(matmul, static_argnums=2)

    def one(i):
        x, w, codes = cases[i % 4]
        assert_same_bits(product(x, codes, w.shape[0]), wanted[i % 4])

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        list(pool.map(one, range(120)))


PROGRAM = """
import numpy as np, jax.numpy as jnp, packing_oracle as oracle
from bitjax.ops import ffi
rng = np.random.default_rng(0)
w = oracle.random_weights(rng, 300, 200)
x = rng.standard_normal((40, 200)).astype(np.float32)
y = ffi.ternary_matmul(jnp.asarray(x), jnp.asarray(oracle.pack(w)), jnp.float32(0.5), rows=300)
np.testing.assert_array_equal(y, oracle.ternary_matmul(x, w, 0.5))
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


# ---- errors --------------------------------------------------------------------------------------

X = jnp.zeros((2, 40), jnp.float32)
CODES = jnp.zeros((2, 3, 64), jnp.uint8)  # 20 outputs, 40 inputs
ONE = jnp.float32(1)


@pytest.mark.parametrize(
    ("x", "codes", "scale", "rows", "message"),
    [
        (X.astype(jnp.float16), CODES, ONE, 20, r"x wanted float32 or bfloat16, got float16"),
        (X[0, 0], CODES, ONE, 20, r"x wanted shape \[\.\.\., K\], got \(\)"),
        (X, CODES.astype(jnp.int8), ONE, 20, r"codes wanted uint8, got int8"),
        (X, CODES, ONE, 33, r"codes wanted shape \(3, 3, 64\) for rows=33 .* got \(2, 3, 64\)"),
        (X[:, :32], CODES, ONE, 20, r"codes wanted shape \(2, 2, 64\) .*32 features"),
        (X, CODES[..., :32], ONE, 20, r"codes wanted shape .* got \(2, 3, 32\)"),
        (X, CODES, ONE, -1, r"rows wanted >= 0, got -1"),
        (X, CODES, ONE.reshape(1), 20, r"scale wanted float32 \(\), got float32 \(1,\)"),
        (X, CODES, jnp.bfloat16(1), 20, r"scale wanted float32 \(\), got bfloat16"),
    ],
)
def test_operands_are_checked_at_trace_time(x, codes, scale, rows, message):
    with pytest.raises(ValueError, match=r"ternary_matmul: " + message):
        jax.eval_shape(functools.partial(ffi.ternary_matmul, rows=rows), x, codes, scale)


@pytest.mark.parametrize(
    ("q", "codes", "message"),
    [
        (X, CODES, r"x_q wanted int8, got float32"),
        (X[0, 0].astype(jnp.int8), CODES, r"x_q wanted shape"),
        (X.astype(jnp.int8), CODES[:1], r"codes wanted shape \(2, 3, 64\)"),
    ],
)
def test_operands_of_the_integer_product_are_checked(q, codes, message):
    with pytest.raises(ValueError, match=r"ternary_matmul_i32: " + message):
        ffi.ternary_matmul_i32(q, codes, rows=20)


def test_too_many_inputs_are_refused():
    x = jax.ShapeDtypeStruct((1, 2**18 + 1), jnp.float32)
    codes = jax.ShapeDtypeStruct((1, 2**14 + 1, 64), jnp.uint8)
    with pytest.raises(ValueError, match="x wanted at most 262144 features, got 262145"):
        jax.eval_shape(functools.partial(ffi.ternary_matmul, rows=16), x, codes, ONE)


def raw(name, result, *operands):
    """The custom call without the Python checks."""
    call = jax.ffi.ffi_call(name, jax.ShapeDtypeStruct(*result), vmap_method="expand_dims")
    return jax.block_until_ready(call(*operands))


F32, I32 = "bitjax_ternary_matmul", "bitjax_ternary_matmul_i32"
Q = X.astype(jnp.int8)


@pytest.mark.parametrize(
    ("name", "result", "operands", "message"),
    [
        (F32, ((2, 20), np.float32), (Q, CODES, ONE), "x: wanted f32 or bf16, got s8"),
        (F32, ((2, 20), np.float32), (X, Q, ONE), "codes: wanted u8, got s8"),
        (F32, ((2, 20), np.float32), (X, CODES, jnp.int32(1)), "w_scale: wanted f32, got s32"),
        (F32, ((2, 20), np.int32), (X, CODES, ONE), "result: wanted f32, got s32"),
        (F32, ((20,), np.float32), (X[0], CODES, ONE), r"x: wanted \[..., M, K\], got \[40\]"),
        (F32, ((20,), np.float32), (X, CODES, ONE), r"result: wanted .* got \[20\]"),
        (F32, ((3, 20), np.float32), (X, CODES, ONE), r"result: wanted M = 2, got \[3, 20\]"),
        (F32, ((2, 20), np.float32), (X, CODES[0], ONE), r"codes: wanted .* got \[3, 64\]"),
        (F32, ((2, 20), np.float32), (X, CODES[:1], ONE), r"codes: wanted \[..., 2, 3, 64\]"),
        (F32, ((2, 20), np.float32), (X, CODES, ONE.reshape(1)), r"w_scale: wanted .*got \[1\]"),
        (
            F32,
            ((3, 2, 20), np.float32),
            (X[None].repeat(2, 0), CODES[None], ONE[None]),
            r"result: wanted the leading dimensions .* got \[3, 2, 20\]",
        ),
        (I32, ((2, 20), np.int32), (X, CODES), "x: wanted s8, got f32"),
        (I32, ((2, 20), np.float32), (Q, CODES), "result: wanted s32, got f32"),
        (I32, ((2, 20), np.int32), (Q, CODES[:, :1]), r"codes: wanted .* got \[2, 1, 64\]"),
    ],
)
def test_handlers_check_every_operand_again(name, result, operands, message):
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=f"{name}: {message}"):
        raw(name, result, *operands)


def test_an_empty_batch_is_fine():
    got = raw(F32, ((0, 2, 20), np.float32), X[None][:0], CODES[None], ONE[None])
    assert got.shape == (0, 2, 20)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and RLIMIT_AS")
def test_no_memory_is_an_error_and_not_a_crash():
    # 2^24 rows of one int8 each quantise to rows of 16 bytes: 256 MiB, of which 160 are allowed
    # (the result, which XLA allocates, takes 64).
    code = """
import resource
import jax, jax.numpy as jnp
from bitjax.ops import ffi
q = jnp.zeros((2**24, 1), jnp.int8)
codes = jnp.full((1, 1, 64), 0x55, jnp.uint8)
product = jax.jit(lambda q, codes: ffi.ternary_matmul_i32(q, codes, rows=1))
product = product.lower(q, codes).compile()
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 160 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    jax.block_until_ready(product(q, codes))
except Exception as error:
    print(error)
"""
    assert "bitjax_ternary_matmul_i32: no memory for the quantised activations" in run_python(code)


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
