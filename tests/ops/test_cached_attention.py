"""Attention over the cache: oracle, reference and every kernel on the same inputs; in place.

What is stored is equal to the bit; what is mixed lies within the bound that the oracle derives.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitjax import ops
from bitjax.ops import ffi

pytestmark = pytest.mark.skipif(not ffi.available(), reason="the extension is not built")

KERNELS = ffi.kernels() if ffi.available() else ()
F32, BF16, INT8 = np.float32, oracle.BF16, np.int8


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


attention = jax.jit(ops.cached_attention, static_argnames="impl")
by_call = functools.partial(attention, impl="ffi")
# A reference to the bit is compiled without optimisation, which contracts the rotation.
by_the_letter = jax.jit(
    functools.partial(ops.cached_attention, impl="reference"),
    compiler_options={"xla_backend_optimization_level": 0},
)


def make(starts, T, H, G, h, S, dtype=F32, cache_dtype=F32, seed=0):
    """qkv, turn, positions, *cache; sequence b has its tokens from position starts[b] on."""
    rng = np.random.default_rng(seed)
    B = len(starts)
    qkv = 1.2 * rng.standard_normal((B, T, H + 2 * G, h))  # scores vary by 1.2 and 1.4
    angles = rng.uniform(0, 7, (B, T, h // 2))
    turn = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1).astype(F32)
    positions = (np.array(starts)[:, None] + np.arange(T)).astype(np.int32)
    keys, values = rng.standard_normal((2, B, G, S, h))
    return qkv.astype(dtype), turn, positions, *cache_of(keys, values, cache_dtype)


def cache_of(keys, values, dtype):
    """A cache of this dtype, as attention takes it, of keys and values [B, G, S, h]."""
    if dtype != INT8:
        return oracle.blocks_of(keys.astype(dtype)), values.astype(dtype)
    # Of other sizes slot by slot, so that each scale matters.
    sizes = np.exp(np.random.default_rng(1).uniform(-1, 1, (2, *keys.shape[:3], 1)))
    (keys, key_scale), (values, value_scale) = map(
        oracle.quantize, (keys * sizes[0], values * sizes[1])
    )
    scales = np.stack([key_scale, value_scale], axis=2)
    return oracle.blocks_of(keys), oracle.in_pairs(values), scales


def wide(x):
    return np.asarray(x).astype(np.float64)


def assert_same_bits(got, wanted):
    got, wanted = np.asarray(got), np.asarray(wanted)
    assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
    assert got.tobytes() == wanted.tobytes()


def assert_agrees(got, exact, context=""):
    """A result with the oracle's."""
    mixed, error, *cache = exact
    assert (np.abs(wide(got[0]) - mixed) <= error).all(), context  # a NaN is not <= anything
    for part, wanted in zip(got[1:], cache, strict=True):
        assert_same_bits(part, wanted)


# ---- results -------------------------------------------------------------------------------------

# (starts, T, H, G, h, S). Positions at both ends of a key block, of a step of 64 slots and of a
# split of 1024; rows (T * H/G) that leave 0 to 5 in the last tile of 6; up to 8 tiles, whose splits
# are shared out, and more; fewer and more than the 8 tokens that one thread stores.
SHAPES = [
    ([0], 1, 1, 1, 16, 64),
    ([0, 63, 64], 1, 8, 2, 80, 128),
    ([1023, 1024, 1025], 1, 6, 1, 128, 1088),
    ([2047, 1024], 1, 6, 1, 512, 2112),
    ([59], 5, 4, 1, 16, 64),
    ([62, 1021], 5, 4, 2, 128, 1088),
    ([2045, 0, 15], 5, 1, 1, 80, 2112),
    ([7, 1020], 4, 12, 2, 16, 1088),
    ([25], 40, 4, 1, 16, 128),
    ([1000, 63], 40, 6, 1, 80, 1152),
    ([0, 63, 150], 40, 2, 2, 128, 192),
    ([1010], 40, 1, 1, 512, 1088),
    ([0], 130, 4, 1, 128, 192),
    ([1983, 0], 130, 6, 1, 16, 2176),
]
DTYPES = [(F32, F32), (BF16, BF16), (F32, BF16), (BF16, F32), (F32, INT8), (BF16, INT8)]


@functools.cache  # kernels meet the same operands
def case(starts, *about):
    operands = make(starts, *about, seed=len(starts) + about[0])
    return operands, oracle.cached_attention(*operands)


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(np.dtype(x).name for x in d))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_oracle(kernel, shape, dtypes):
    operands, exact = case(tuple(shape[0]), *shape[1:], *dtypes)
    got = by_call(*operands)
    assert got[0].dtype == dtypes[0]
    assert_agrees(got, exact)


@pytest.mark.parametrize(
    ("shape", "dtypes"),
    [
        *((SHAPES[1], dtypes) for dtypes in DTYPES),
        (SHAPES[2], DTYPES[0]),
        *((SHAPES[6], dtypes) for dtypes in (DTYPES[2], DTYPES[4])),
    ],
)
def test_the_reference_equals_the_oracle_and_the_kernels(unforced, shape, dtypes):
    operands, exact = case(tuple(shape[0]), *shape[1:], *dtypes)
    wanted = by_the_letter(*operands)
    assert_agrees(wanted, exact)
    for name in KERNELS:
        ffi.force_kernel(name)
        got = by_call(*operands)
        assert (np.abs(wide(got[0]) - wide(wanted[0])) <= 2 * exact[1]).all()  # each within one
        for part, same in zip(got[1:], wanted[1:], strict=True):
            assert_same_bits(part, same)


@pytest.mark.parametrize("cache_dtype", [BF16, INT8])
@pytest.mark.parametrize("T", range(1, 14))
def test_rows_beyond_whole_tiles(kernel, T, cache_dtype):
    """1 to 13 rows: each number of rows in a tile; 48 dimensions fill no 4 vectors."""
    operands, exact = case((1024 - T // 2,), T, 1, 1, 48, 1088, F32, cache_dtype)
    assert_agrees(by_call(*operands), exact)


@pytest.mark.parametrize("cache_dtype", [F32, INT8])
@pytest.mark.parametrize("h", range(16, 145, 16))
def test_head_dimensions_beyond_whole_tiles(kernel, h, cache_dtype):
    operands, exact = case((70, 3), 2, 4, 2, h, 128, BF16, cache_dtype)
    assert_agrees(by_call(*operands), exact)


def test_the_bound_is_tight_and_each_part_matters():
    """The bound would not let a slot, a turn or a head's group be forgotten."""
    qkv, turn, positions, keys, values = operands = make([0, 63, 1030], 2, 4, 2, 80, 1088)
    mixed, error, *_ = oracle.cached_attention(*operands)
    assert (np.median(error, axis=-1) < 5e-3 * np.abs(mixed).mean(axis=-1)).all()
    swapped = np.concatenate([qkv[:, :, [1, 0, 3, 2]], qkv[:, :, 4:]], axis=2)
    wrong = {
        "a slot too many": (qkv, turn, positions + 1, keys, values),
        "no turn": (qkv, np.repeat([1, 0], 40).astype(F32) + 0 * turn, positions, keys, values),
        "turned the other way": (qkv, turn * np.repeat([1, -1], 40), positions, keys, values),
        "another head": (swapped, turn, positions, keys, values),
        "keys of another group": (qkv, turn, positions, keys[:, ::-1], values),
        "values of another group": (qkv, turn, positions, keys, values[:, ::-1]),
        "another scale": (qkv * F32(1.01), turn, positions, keys, values),
    }
    for what, changed in wrong.items():
        got = by_call(*(np.asarray(x, o.dtype) for x, o in zip(changed, operands, strict=True)))
        off = (np.abs(wide(got[0]) - mixed) > error).mean(axis=-1)
        assert (off[1:] > 0.5).all(), what  # the first token of sequence 0 sees only itself


def test_kernels_differ_so_forcing_one_has_an_effect(unforced):
    """Fused multiply-adds round once: what scalar code rounds twice differs in some bits."""
    operands = make([900], 3, 4, 1, 64, 960)
    bits = {}
    for name in KERNELS:
        ffi.force_kernel(name)
        bits[name] = np.asarray(by_call(*operands)[0]).tobytes()
    if "avx2" in bits:  # the scalar build for x86-64 has no such instruction
        assert bits["avx2"] != bits["scalar"]


def test_jit_follows_the_forced_kernel(unforced):
    operands, exact = case((70, 3), 2, 4, 2, 16, 128, BF16, F32)
    fresh = jax.jit(ffi.cached_attention)
    for name in KERNELS:
        ffi.force_kernel(name)
        assert_agrees(fresh(*operands), exact, name)
    assert fresh._cache_size() == 1


# ---- scores of every size ------------------------------------------------------------------------


def along_one_axis(scores, h=32):
    """Operands of one query whose slots s have these scores, all but the rounding of them."""
    S = -(-len(scores) // 64) * 64
    qkv, _, _, _, values = make([0], 1, 1, 1, h, S, seed=3)
    turn = np.repeat([1, 0], h // 2).astype(F32).reshape(1, 1, h)
    qkv[0, 0, :2] = 0
    qkv[0, 0, 0, 0] = np.sqrt(h)
    slots = np.zeros((1, 1, S, h), F32)
    slots[0, 0, : len(scores), 0] = scores
    qkv[0, 0, 1, 0] = scores[-1]
    return qkv, turn, np.array([[len(scores) - 1]], np.int32), oracle.blocks_of(slots), values


RUNS = np.arange(1300) // 64
SCORES = {
    "equal": np.zeros(1300),
    "rising step by step": 100.0 * RUNS,
    "falling step by step": -100.0 * RUNS,
    "rising by a little": 0.01 * np.arange(1300),
    "falling from slot to slot": -3.0 * np.arange(1300),
    "far below zero": np.full(1300, -1e30),
    "far above zero": np.full(1300, 1e30),
    "one large, first": np.where(np.arange(1300) == 0, 500, 0),
    "one large, last": np.where(np.arange(1300) == 1299, 500, 0),
    "one large, at the end of a split": np.where(np.arange(1300) == 1023, 500, 0),
}


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_scores_of_every_size(kernel, scores):
    operands = along_one_axis(scores)
    assert_agrees(by_call(*operands), oracle.cached_attention(*operands))


# ---- a row depends on its query, its position and the cache, and on nothing else -----------------


def in_chunks(operands, sizes):
    """The tokens, a chunk after the other: mixed, and the last cache."""
    qkv, turn, positions, *cache = operands
    mixed, first = [], 0
    for size in sizes:
        part = slice(first, first + size)
        rows, *cache = by_call(qkv[:, part], turn[:, part], positions[:, part], *cache)
        mixed.append(np.asarray(rows))
        first += size
    assert first == qkv.shape[1]
    return np.concatenate(mixed, axis=1), *cache


@pytest.mark.parametrize("dtypes", [*DTYPES[:2], DTYPES[4]], ids=["float32", "bfloat16", "int8"])
def test_prefill_in_chunks_has_the_same_bits(kernel, dtypes):
    operands = make([1000, 0, 60], 40, 6, 2, 80, 1088, *dtypes)
    whole = in_chunks(operands, [40])
    for sizes in ([1] * 40, [7, 24, 9], [39, 1]):
        for got, wanted in zip(in_chunks(operands, sizes), whole, strict=True):
            assert_same_bits(got, wanted)


@pytest.mark.parametrize("cache_dtype", [BF16, INT8])
def test_a_sequence_alone_has_the_same_bits(kernel, cache_dtype):
    """Alone it is also less work, which stays on the calling thread."""
    operands = make([1000, 0, 60], 5, 4, 1, 128, 1088, F32, cache_dtype)
    whole = by_call(*operands)
    for b in range(3):
        for got, wanted in zip(by_call(*(x[b : b + 1] for x in operands)), whole, strict=True):
            assert_same_bits(got, wanted[b : b + 1])


def test_a_longer_cache_has_the_same_bits(kernel):
    *tokens, keys, values = make([60, 3], 5, 4, 2, 48, 128)
    more = np.full((2, 2, 1024, 48), 9, F32)
    longer = (
        np.concatenate([keys, oracle.blocks_of(more)], axis=2),
        np.concatenate([values, more], axis=2),
    )
    assert_same_bits(by_call(*tokens, *longer)[0], by_call(*tokens, keys, values)[0])


@pytest.mark.parametrize("cache_dtype", [BF16, INT8])
def test_positions_in_any_order_have_the_same_bits(kernel, cache_dtype):
    """Rows of a tile whose splits are of another number."""
    qkv, turn, positions, *cache = make([1020], 12, 2, 1, 32, 2112, F32, cache_dtype)
    order = np.random.default_rng(0).permutation(12)
    straight = by_call(qkv, turn, positions, *cache)
    shuffled = by_call(qkv[:, order], turn[:, order], positions[:, order], *cache)
    assert_same_bits(shuffled[0], straight[0][:, order])
    for got, wanted in zip(shuffled[1:], straight[1:], strict=True):
        assert_same_bits(got, wanted)


PROGRAM = """
import hashlib, sys
import numpy as np
sys.path.insert(0, "ops")
from test_cached_attention import F32, INT8, KERNELS, by_call, ffi, make
def digests():
    for name in KERNELS:
        ffi.force_kernel(name)
        for about in (
            ([1000, 0, 60], 1, 6, 2, 80, 1088), ([1015], 40, 6, 1, 64, 1088),
            ([1000, 0, 60], 1, 6, 2, 80, 1088, F32, INT8),
        ):
            digest = hashlib.sha256()
            for result in by_call(*make(*about)):
                digest.update(np.asarray(result).tobytes())
            yield digest.hexdigest()
    ffi.force_kernel(None)
digests = list(digests())
"""


@pytest.mark.parametrize("threads", [1, 5])
def test_any_number_of_threads_gives_the_same_bits(unforced, threads):
    flags = os.environ.get("XLA_FLAGS", "")
    if threads == 1:
        flags += " --xla_cpu_multi_thread_eigen=false"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + "print(*digests)"],
        env={**os.environ, "XLA_FLAGS": flags, "NPROC": str(threads)},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    here = {}
    exec(PROGRAM, here)
    assert done.stdout.split() == here["digests"]


# ---- what is stored, and what is read ------------------------------------------------------------


@pytest.mark.parametrize("cache_dtype", [F32, BF16, INT8])
def test_positions_outside_the_cache_are_not_stored_and_see_all_of_it(kernel, cache_dtype):
    operands = make([60], 8, 4, 2, 32, 128, F32, cache_dtype)
    operands[2][0] = [-1, 5, 128, 129, 2**31 - 1, -(2**31), 127, -64]
    got = by_call(*operands)
    assert_agrees(got, oracle.cached_attention(*operands))
    untouched = np.delete(np.arange(128), [5, 127])
    before, after = oracle.numbers(*operands[3:]), oracle.numbers(*map(np.asarray, got[1:]))
    for old, new in zip(before, after, strict=True):
        assert_same_bits(new[:, :, untouched], old[:, :, untouched])
        assert (new[:, :, [5, 127]] != old[:, :, [5, 127]]).mean() > 0.9


@pytest.mark.parametrize("cache_dtype", [F32, INT8])
def test_the_reference_treats_positions_outside_the_cache_alike(cache_dtype):
    operands = make([0], 6, 2, 1, 16, 64, F32, cache_dtype)
    operands[2][0] = [-1, 5, 64, 2**31 - 1, -(2**31), 63]
    wanted = oracle.cached_attention(*operands)
    assert_agrees(by_the_letter(*operands), wanted)


def test_rounding_to_the_cache_is_to_nearest_even(kernel):
    """The first bits that bfloat16 drops: below, at and above a tie, on both sides of even."""
    qkv, turn, positions, keys, values = make([3], 1, 1, 1, 16, 64, F32, BF16)
    turn[...] = np.repeat([1, 0], 8)
    tie = np.uint32(0x3F800000) + np.arange(0, 0x30000, 0x4000, dtype=np.uint32)
    qkv[0, 0, 1:, :12] = tie.view(F32)
    _, got_keys, got_values = by_call(qkv, turn, positions, keys, values)
    wanted = (0x3F80 + np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 3])).astype(np.uint16)
    np.testing.assert_array_equal(
        np.asarray(got_keys)[0, 0, 0, :12, 3].copy().view(np.uint16), wanted
    )
    np.testing.assert_array_equal(np.asarray(got_values)[0, 0, 3, :12].view(np.uint16), wanted)


@pytest.mark.parametrize("garbage", [7.0, -1e30, 3e38, np.inf, np.nan])
@pytest.mark.parametrize("starts", [[0, 62], [1022, 5]])
def test_slots_that_no_token_reached_have_no_influence(kernel, starts, garbage):
    qkv, turn, positions, keys, values = make(starts, 4, 6, 2, 32, 1088, F32, BF16)
    clean = by_call(qkv, turn, positions, keys, values)
    slots, values = oracle.slots_of(keys), values.copy()
    for b, start in enumerate(starts):
        slots[b, :, start + 4 :] = garbage
        values[b, :, start + 4 :] = garbage
    got = by_call(qkv, turn, positions, oracle.blocks_of(slots), values)
    assert_same_bits(got[0], clean[0])


@pytest.mark.parametrize("garbage", [7.0, 2.0**127, np.inf, np.nan])
@pytest.mark.parametrize("starts", [[0, 62], [1022, 5]])
def test_int8_slots_that_no_token_reached_have_no_influence(kernel, starts, garbage):
    *tokens, keys, values, scales = make(starts, 4, 6, 2, 32, 1088, F32, INT8)
    clean = by_call(*tokens, keys, values, scales)
    slots = oracle.slots_of(keys)
    values = values.swapaxes(3, 4).reshape(slots.shape).copy()
    for b, start in enumerate(starts):
        slots[b, :, start + 4 :] = -128
        values[b, :, start + 4 :] = -128
        scales[b, :, :, start + 4 :] = garbage
    got = by_call(*tokens, oracle.blocks_of(slots), oracle.in_pairs(values), scales)
    assert_same_bits(got[0], clean[0])


def test_tokens_do_not_see_later_ones(kernel):
    """Not even times e^-87, which would make 5 of the largest value."""
    qkv, *rest = make([1020], 7, 6, 2, 48, 1088)
    clean = np.asarray(by_call(qkv, *rest)[0])
    for t in range(6, 0, -1):
        qkv[:, t:] = 3e38
        got = np.asarray(by_call(qkv, *rest)[0])
        assert_same_bits(got[:, :t], clean[:, :t])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_bad_query_gives_nan_and_only_there(kernel, dtype, bad):
    qkv, turn, *rest = make([1020, 9], 7, 6, 2, 48, 1088, dtype, F32)
    clean = np.asarray(by_call(qkv, turn, *rest)[0]).reshape(2, 7, 6, 48)
    qkv[1, 3, 4, 17] = bad
    qkv[0, 6, 0, 47] = bad
    got = np.array(by_call(qkv, turn, *rest)[0]).reshape(2, 7, 6, 48)
    for b, t, head in ((1, 3, 4), (0, 6, 0)):
        assert np.isnan(got[b, t, head].astype(F32)).all()
        got[b, t, head] = clean[b, t, head]
    assert_same_bits(got, clean)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("slot", [0, 1019, 1022, 1024])
@pytest.mark.parametrize("cache_dtype", [F32, BF16, INT8])
def test_a_bad_key_gives_nan_where_it_is_seen(kernel, cache_dtype, slot, bad):
    """In slots of the cache (0, 1019) and in new tokens; seen from its position on."""
    qkv, turn, positions, *cache = make([1020, 1020], 7, 6, 2, 48, 1088, F32, cache_dtype)
    clean = np.asarray(by_call(qkv, turn, positions, *cache)[0]).reshape(2, 7, 2, 3, 48)
    if slot >= 1020:
        qkv[1, slot - 1020, 6 + 0, 5] = bad
    elif cache_dtype == INT8:
        cache[2][1, 0, 0, slot] = bad
    else:
        cache[0][1, 0, slot // 64, 5, slot % 64] = bad
    got = by_call(qkv, turn, positions, *cache)[0]
    got = np.array(got).reshape(2, 7, 2, 3, 48)
    seen = got[1, max(0, slot - 1020) :, 0]
    assert np.isnan(seen).all()
    seen[...] = clean[1, max(0, slot - 1020) :, 0]
    assert_same_bits(got, clean)


def test_a_nan_value_gives_nan_in_its_dimension(kernel):
    qkv, turn, positions, keys, values = make([1020, 1020], 7, 6, 2, 48, 1088)
    clean = np.asarray(by_call(qkv, turn, positions, keys, values)[0]).reshape(2, 7, 2, 3, 48)
    values[1, 0, 1000, 5] = np.nan
    got = np.array(by_call(qkv, turn, positions, keys, values)[0]).reshape(2, 7, 2, 3, 48)
    assert np.isnan(got[1, :, 0, :, 5]).all()
    got[1, :, 0, :, 5] = clean[1, :, 0, :, 5]
    assert_same_bits(got, clean)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("slot", [1000, 1022])
def test_a_bad_value_gives_nan_in_all_dimensions_of_an_int8_cache(kernel, bad, slot):
    qkv, turn, positions, *cache = make([1020, 1020], 7, 6, 2, 48, 1088, F32, INT8)
    clean = np.asarray(by_call(qkv, turn, positions, *cache)[0]).reshape(2, 7, 2, 3, 48)
    if slot < 1020:
        cache[2][1, 0, 1, slot] = bad
    else:
        qkv[1, slot - 1020, 6 + 2 + 0, 5] = bad
    got = np.array(by_call(qkv, turn, positions, *cache)[0]).reshape(2, 7, 2, 3, 48)
    seen = slice(max(0, slot - 1020), None)
    assert np.isnan(got[1, seen, 0]).all()
    got[1, seen, 0] = clean[1, seen, 0]
    assert_same_bits(got, clean)


# ---- what an int8 cache loses --------------------------------------------------------------------

# Keys and values of every size, ties of rounding, zeros, and what is too small for a scale.
SLOTS = {
    "normal": np.random.default_rng(0).standard_normal(32),
    "ties": np.arange(-16, 16) / 2 + 0.5 * np.eye(32)[0] * 95,
    "one of 32": np.eye(32)[7] * 3e38,
    "zero": np.zeros(32),
    "tiny": np.full(32, 1e-38),
    "around the smallest scale": 2.0**-94 * np.linspace(-1, 1, 32),
    "absmax is a power of two": np.linspace(-1, 1, 32),
    "127 exactly": np.arange(96, 128),
    "just above 127": np.arange(96, 128) * (1 + 2.0**-20),
    "NaN": np.where(np.arange(32) == 5, np.nan, 1),
    "infinite": np.where(np.arange(32) == 31, -np.inf, 1),
}


@pytest.mark.parametrize("x", SLOTS.values(), ids=SLOTS)
def test_codes_and_scales(kernel, x):
    """Of the call and of the reference, to the bit; half a step off, and no step too wide."""
    qkv, turn, positions, *cache = make([70], 1, 1, 1, 32, 128, F32, INT8)
    turn[...] = np.repeat([1, 0], 16)
    x = qkv[0, 0, 1:] = x.astype(F32)
    with np.errstate(invalid="ignore"):  # 0 times an infinity
        exact = oracle.store(qkv, turn, positions, *cache)
    for run in (by_call, by_the_letter):
        got = run(qkv, turn, positions, *cache)[1:]
        for part, wanted in zip(got, exact, strict=True):
            assert_same_bits(part, wanted)
    if np.isfinite(x).all():
        most = np.abs(x.astype(np.float64)).max()
        scale = np.asarray(got[2]).astype(np.float64)[0, 0, :, 70]
        assert (scale <= max(most / 127 * (1 + 2.0**-7), 2.0**-100)).all()
        for part in oracle.numbers(*map(np.asarray, got)):
            assert (np.abs(part[0, 0, 70] - x) <= scale.max() / 2 * (1 + 2.0**-14)).all()


def test_the_error_of_an_int8_cache_is_within_its_bound(kernel):
    """Against attention over what was not rounded: d scores off by sum |q| s_k / 2, hence weights
    by e^(2d) - 1 of themselves, and mixed by half a step of values besides."""
    T, H, G, h, S = 100, 4, 2, 64, 128
    qkv, turn, positions, *cache = make([0], T, H, G, h, S, F32, INT8)
    _, own_error, *cache = oracle.cached_attention(qkv, turn, positions, *cache)
    turned = oracle.rotate(qkv[:, :, : H + G], turn).astype(np.float64)[0]
    scale = cache[2].astype(np.float64)[0]
    got = wide(by_call(qkv, turn, positions, *cache)[0])[0].reshape(T, H, h)
    own_error = own_error.reshape(T, H, h)
    seen = np.tril(np.ones((T, T), bool))
    for head in range(H):
        g = head // (H // G)
        q, k, v = turned[:, head] / np.sqrt(h), turned[:, H + g], qkv[0, :, H + G + g].astype(float)
        scores = np.where(seen, q @ k.T, -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        off = np.abs(q).sum(axis=1, keepdims=True) * scale[g, 0, :T] / 2  # of each score
        most = np.where(seen, off, 0).max(axis=1, keepdims=True)
        # sum |w' - w| |v - mixed| and the values' own half steps, by weights of up to e^(2 most) w
        grown = weights * np.exp(2 * most)
        exact = weights @ v
        spread = np.einsum("ts,tsd->td", weights, np.abs(v - exact[:, None]))
        bound = np.expm1(2 * most) * spread + (grown @ scale[g, 1, :T] / 2)[:, None]
        error = np.abs(got[:, head] - exact)
        assert (error <= bound + own_error[:, head]).all()
        assert error[1:].mean() > bound[1:].mean() / 300  # a bound, but of this very error


# ---- in place, and under transformations ---------------------------------------------------------


@pytest.mark.parametrize("cache_dtype", [F32, BF16, INT8])
def test_a_donated_cache_is_updated_in_place(cache_dtype):
    operands, exact = case((3, 60), 2, 4, 2, 32, 128, F32, cache_dtype)
    donating = jax.jit(ffi.cached_attention, donate_argnums=(3, 4, 5)[: len(operands) - 3])
    cache = [jnp.array(x) for x in operands[3:]]
    pointers = [x.unsafe_buffer_pointer() for x in cache]
    got = donating(*operands[:3], *cache)
    assert [x.unsafe_buffer_pointer() for x in got[1:]] == pointers
    assert all(x.is_deleted() for x in cache)
    assert_agrees(got, exact)
    # Nor was it copied between: nothing is allocated but arguments and results.
    compiled = donating.lower(*operands).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < operands[3].nbytes
    assert " copy(" not in compiled.as_text()


@pytest.mark.parametrize("cache_dtype", [BF16, INT8])
@pytest.mark.parametrize("jit", [jax.jit, lambda function: function], ids=["jit", "op by op"])
def test_a_cache_that_is_not_donated_is_left_alone(jit, cache_dtype):
    operands, exact = case((3, 60), 2, 4, 2, 32, 128, F32, cache_dtype)
    operands = [jnp.array(x) for x in operands]
    before = [np.array(x) for x in operands]
    got = jit(ffi.cached_attention)(*operands)
    assert_agrees(got, exact)
    for operand, old in zip(operands, before, strict=True):
        assert_same_bits(operand, old)
    for new, old in zip(got[1:], operands[3:], strict=True):
        assert new.unsafe_buffer_pointer() != old.unsafe_buffer_pointer()


@pytest.mark.parametrize("cache_dtype", [BF16, INT8])
def test_scan_and_while_loop(cache_dtype):
    """One token a step, the cache carried; the bits of all tokens at once."""
    operands = make([61, 0], 6, 4, 2, 32, 128, F32, cache_dtype)
    whole = by_call(*operands)
    tokens = [np.moveaxis(x, 1, 0)[:, :, None] for x in operands[:3]]
    cache = operands[3:]

    def step(cache, token):
        mixed, *cache = ops.cached_attention(*token, *cache)
        return tuple(cache), mixed[:, 0]

    carried, mixed = jax.jit(functools.partial(jax.lax.scan, step))(cache, tokens)
    for got, wanted in zip((mixed.swapaxes(0, 1), *carried), whole, strict=True):
        assert_same_bits(got, wanted)

    @jax.jit
    def loop(tokens, cache):
        def body(carry):
            t, cache, all_mixed = carry
            cache, mixed = step(cache, [x[t] for x in tokens])
            return t + 1, cache, all_mixed.at[:, t].set(mixed)

        start = 0, cache, jnp.zeros(whole[0].shape)
        return jax.lax.while_loop(lambda carry: carry[0] < 6, body, start)

    _, carried, mixed = loop(jax.tree.map(jnp.asarray, tokens), cache)
    for got, wanted in zip((mixed, *carried), whole, strict=True):
        assert_same_bits(got, wanted)


@pytest.mark.parametrize("axes", [(0, 0, 0, 0, 0), (0, None, 0, None, None), (1, 0, None, 2, 0)])
def test_vmap(axes):
    many = [make([3, 60], 2, 4, 2, 16, 128, F32, BF16, seed=seed) for seed in range(3)]
    one_by_one = [
        [case[i] if axis is not None else many[0][i] for i, axis in enumerate(axes)]
        for case in many
    ]
    stacked = [
        np.stack([case[i] for case in many], axis) if axis is not None else many[0][i]
        for i, axis in enumerate(axes)
    ]
    got = jax.jit(jax.vmap(ops.cached_attention, in_axes=axes))(*stacked)
    for n, operands in enumerate(one_by_one):
        for part, wanted in zip(got, by_call(*operands), strict=True):
            assert_same_bits(part[n], wanted)


def test_no_sequences_and_no_tokens(kernel):
    operands = make([0, 5], 2, 4, 2, 16, 64)
    for mixed, keys, values in (
        by_call(*(x[:0] for x in operands)),
        by_call(*(x[:, :0] for x in operands[:3]), *operands[3:]),
    ):
        assert mixed.size == 0
        assert_same_bits(keys, operands[3][: len(keys)])
        assert_same_bits(values, operands[4][: len(values)])


# ---- choice of implementation --------------------------------------------------------------------

CUSTOM_CALL = "custom_call @bitjax_attention("


def lowered(impl, h=16, platform="cpu"):
    traced = attention.trace(*make([0], 1, 2, 1, h, 64), impl=impl)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def test_auto_is_the_custom_call_on_cpu_and_none_on_cuda():
    assert CUSTOM_CALL in lowered("auto")
    assert CUSTOM_CALL in lowered("ffi")
    assert "bitjax" not in lowered("reference")
    on_cuda = lowered("auto", platform="cuda")
    assert "bitjax" not in on_cuda
    assert "dot_general" in on_cuda


@pytest.mark.parametrize("h", [6, 24, 528])
def test_auto_is_the_reference_for_other_head_dimensions(h):
    assert "bitjax" not in lowered("auto", h)
    operands = make([3], 2, 2, 1, h, 64)
    for got, wanted in zip(
        attention(*operands), attention(*operands, impl="reference"), strict=True
    ):
        assert_same_bits(got, wanted)
    with pytest.raises(ValueError, match=r"heads of 16\.\.512 dimensions"):
        by_call(*operands)


def test_auto_without_the_extension_is_the_reference(monkeypatch):
    monkeypatch.setattr(ffi, "available", lambda: False)
    fresh = jax.jit(lambda *operands: ops.cached_attention(*operands))
    assert "bitjax" not in fresh.lower(*make([0], 1, 2, 1, 16, 64)).as_text()


@pytest.mark.parametrize("cache_dtype", [F32, BF16, INT8])
def test_the_forced_kernel_runs_and_is_counted(kernel, cache_dtype):
    operands = make([3], 2, 2, 1, 16, 64, F32, cache_dtype)
    before, products = ffi.attention_calls(), ffi.kernel_calls()
    jax.block_until_ready(by_call(*operands))
    after = ffi.attention_calls()
    assert {name: after[name] - before[name] for name in after if after[name] != before[name]} == {
        kernel: 1
    }
    assert ffi.kernel_calls() == products


# ---- errors --------------------------------------------------------------------------------------

# Two sequences of three tokens, 4 query and 2 key heads of 16 dimensions, 64 slots.
ALL = {
    "qkv": np.ones((2, 3, 8, 16), F32),
    "turn": np.ones((2, 3, 16), F32),
    "positions": np.zeros((2, 3), np.int32),
    "keys": np.ones((2, 2, 1, 16, 64), F32),
    "values": np.ones((2, 2, 64, 16), F32),
    "mixed": ((2, 3, 64), F32),
    "new_keys": ((2, 2, 1, 16, 64), F32),
    "new_values": ((2, 2, 64, 16), F32),
}


def call_with(changes):
    """The custom call without the Python around it; results are apart from operands."""
    operands = ALL | changes
    results = [jax.ShapeDtypeStruct(*operands.pop(name)) for name in list(ALL)[5:]]
    call = jax.ffi.ffi_call("bitjax_attention", results, vmap_method="sequential")
    return jax.block_until_ready(call(*map(jnp.asarray, operands.values())))


def ones(*shape, dtype=F32):
    return np.ones(shape, dtype)


def with_cache(keys, values):
    """A cache of these shapes, and results of the same."""
    return {
        "keys": ones(*keys), "values": ones(*values),
        "new_keys": (keys, F32), "new_values": (values, F32),
    }  # fmt: skip


def test_the_operands_of_the_error_tests_are_valid():
    mixed, keys, values = call_with({})
    assert_same_bits(mixed, np.ones((2, 3, 64), F32))  # of values that are all 1
    assert_same_bits(values, ALL["values"])
    assert np.asarray(keys)[:, :, 0, :8, 0].max() == 0  # turned: 1 * 1 - 1 * 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # dtypes
        ({"qkv": ones(2, 3, 8, 16, dtype=np.float16)}, "qkv: wanted f32 or bf16, got type"),
        ({"qkv": ones(2, 3, 8, 16, dtype=np.int8)}, "qkv: wanted f32 or bf16, got s8"),
        ({"turn": ones(2, 3, 16, dtype=BF16)}, "turn: wanted f32, got bf16"),
        ({"positions": np.zeros((2, 3), np.uint8)}, "positions: wanted s32, got u8"),
        ({"keys": ones(2, 2, 1, 16, 64, dtype=np.int8)}, "keys: wanted f32 or bf16, got s8"),
        ({"values": ones(2, 2, 64, 16, dtype=BF16)}, "values: wanted f32, got bf16"),
        ({"keys": ones(2, 2, 1, 16, 64, dtype=BF16)}, "values: wanted bf16, got f32"),
        ({"mixed": ((2, 3, 64), BF16)}, "result: wanted f32, got bf16"),
        ({"qkv": ones(2, 3, 8, 16, dtype=BF16)}, "result: wanted bf16, got f32"),
        ({"new_keys": ((2, 2, 1, 16, 64), BF16)}, "new keys: wanted f32, got bf16"),
        ({"new_values": ((2, 2, 64, 16), BF16)}, "new values: wanted f32, got bf16"),
        # the cache
        ({"keys": ones(2, 2, 64, 16)}, r"keys: wanted \[B, G, S/64, h, 64\], got \[2, 2, 64, 16\]"),
        ({"keys": ones(2, 2, 4, 16, 16)}, r"keys: wanted .* got \[2, 2, 4, 16, 16\]"),
        (with_cache((2, 2, 0, 16, 64), (2, 2, 0, 16)), "keys: wanted at least one block of slots"),
        ({"keys": ones(2, 1, 1, 16, 64)}, r"values: wanted \[2, 1, 64, 16\], got \[2, 2, 64, 16\]"),
        ({"keys": ones(1, 2, 1, 16, 64)}, r"keys: wanted \[2, 2, 1, 16, 64\], got \[1, 2, 1"),
        ({"keys": ones(2, 2, 1, 32, 64)}, r"keys: wanted \[2, 2, 1, 16, 64\], got \[2, 2, 1, 32"),
        ({"values": ones(2, 2, 128, 16)}, r"values: wanted \[2, 2, 64, 16\], got \[2, 2, 128"),
        ({"values": ones(2, 64, 2, 16)}, r"values: wanted \[2, 2, 64, 16\], got \[2, 64, 2"),
        ({"values": ones(2, 2, 1024)}, r"values: wanted \[2, 2, 64, 16\], got \[2, 2, 1024\]"),
        ({"new_keys": ((2, 2, 2, 16, 64), F32)}, r"result: .* cache's shape, got \[2, 2, 2"),
        ({"new_values": ((2, 2, 128, 16), F32)}, "result: wanted the cache's shape"),
        # tokens
        ({"qkv": ones(2, 3, 128)}, r"qkv: wanted \[B, T, H \+ 2G, h\], got \[2, 3, 128\]"),
        ({"qkv": ones(2, 3, 4, 16)}, r"qkv: wanted a multiple of the cache's 2 heads .*\[2, 3, 4"),
        ({"qkv": ones(2, 3, 7, 16)}, r"qkv: wanted a multiple of the cache's 2 heads .*\[2, 3, 7"),
        ({"qkv": ones(2, 3, 2, 16)}, r"qkv: wanted a multiple of the cache's 2 heads .*\[2, 3, 2"),
        (with_cache((2, 0, 1, 16, 64), (2, 0, 64, 16)), r"qkv: wanted a multiple of the cache's 0"),
        ({"qkv": ones(2, 3, 8, 24)}, r"qkv: wanted heads of 16\.\.512 .*got \[2, 3, 8, 24\]"),
        ({"qkv": ones(2, 3, 8, 528)}, r"qkv: wanted heads of 16\.\.512 .*got \[2, 3, 8, 528\]"),
        ({"qkv": ones(2, 3, 8, 0)}, r"qkv: wanted heads of 16\.\.512 .*got \[2, 3, 8, 0\]"),
        ({"turn": ones(2, 3, 8)}, r"turn: wanted \[2, 3, 16\], got \[2, 3, 8\]"),
        ({"turn": ones(1, 3, 16)}, r"turn: wanted \[2, 3, 16\], got \[1, 3, 16\]"),
        ({"turn": ones(3, 16)}, r"turn: wanted \[2, 3, 16\], got \[3, 16\]"),
        ({"positions": np.zeros((2, 2), np.int32)}, r"positions: wanted \[2, 3\], got \[2, 2\]"),
        ({"positions": np.zeros(3, np.int32)}, r"positions: wanted \[2, 3\], got \[3\]"),
        ({"mixed": ((2, 3, 32), F32)}, r"result: wanted \[2, 3, 64\], got \[2, 3, 32\]"),
        ({"mixed": ((2, 3, 4, 16), F32)}, r"result: wanted \[2, 3, 64\], got \[2, 3, 4, 16\]"),
    ],
)  # fmt: skip
def test_the_handler_checks_every_operand(changes, message):
    with pytest.raises(
        (ValueError, jax.errors.JaxRuntimeError), match=f"bitjax_attention: {message}"
    ):
        call_with(changes)


# An int8 cache of the same sizes.
INT8_CACHE = {
    "keys": np.ones((2, 2, 1, 8, 64, 2), INT8),
    "values": np.ones((2, 2, 32, 16, 2), INT8),
    "scales": np.ones((2, 2, 2, 64), BF16),
}


def call_int8_with(changes):
    operands = {name: ALL[name] for name in ("qkv", "turn", "positions")} | INT8_CACHE | changes
    results = [((2, 3, 64), F32), *((x.shape, x.dtype) for x in INT8_CACHE.values())]
    for i, name in enumerate(("mixed", "new_keys", "new_values", "new_scales")):
        results[i] = jax.ShapeDtypeStruct(*operands.pop(name, results[i]))
    call = jax.ffi.ffi_call("bitjax_attention_int8", results, vmap_method="sequential")
    return jax.block_until_ready(call(*map(jnp.asarray, operands.values())))


def test_the_int8_operands_of_the_error_tests_are_valid():
    mixed, *cache = call_int8_with({})
    np.testing.assert_allclose(mixed, np.ones((2, 3, 64)), rtol=2.0**-7)
    assert [(x.shape, x.dtype) for x in cache] == [(x.shape, x.dtype) for x in INT8_CACHE.values()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": ones(2, 2, 1, 8, 64, 2)}, "keys: wanted s8, got f32"),
        ({"values": ones(2, 2, 32, 16, 2)}, "values: wanted s8, got f32"),
        ({"scales": ones(2, 2, 2, 64)}, "scales: wanted bf16, got f32"),
        ({"qkv": ones(2, 3, 8, 16, dtype=INT8)}, "qkv: wanted f32 or bf16, got s8"),
        ({"keys": ones(2, 2, 1, 16, 64, dtype=INT8)},
         r"keys: wanted \[B, G, S/64, h/2, 64, 2\], got \[2, 2, 1, 16, 64\]"),
        ({"keys": ones(2, 2, 1, 16, 64, 1, dtype=INT8)}, r"keys: wanted .* got .*64, 1\]"),
        ({"keys": ones(2, 2, 1, 16, 64, 2, dtype=INT8)}, r"keys: wanted \[2, 2, 1, 8, 64, 2\]"),
        ({"values": ones(2, 2, 64, 16, dtype=INT8)}, r"values: wanted \[2, 2, 32, 16, 2\], got"),
        ({"scales": ones(2, 2, 64, 2, dtype=BF16)}, r"scales: wanted \[2, 2, 2, 64\], got"),
        ({"new_scales": ((2, 2, 2, 64), F32)}, "new scales: wanted bf16, got f32"),
        ({"new_scales": ((2, 2, 2, 128), BF16)}, "result: wanted the cache's shape"),
    ],
)  # fmt: skip
def test_the_int8_handler_checks_every_operand(changes, message):
    with pytest.raises(
        (ValueError, jax.errors.JaxRuntimeError), match=f"bitjax_attention_int8: {message}"
    ):
        call_int8_with(changes)


@pytest.mark.parametrize("impl", ["auto", "ffi", "reference"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv": ones(2, 3, 128)}, r"qkv wanted \[B, T, H \+ 2G, h\], got \[2, 3, 128\]"),
        ({"qkv": ones(2, 3, 8, 16, dtype=INT8)}, r"qkv wanted float32 or bfloat16\[2, 3, 8, 16\]"),
        ({"qkv": ones(2, 3, 4, 16)}, "qkv has 4 heads; wanted a multiple of the cache's 2 key"),
        ({"qkv": ones(2, 3, 7, 16)}, "qkv has 7 heads; wanted a multiple of the cache's 2 key"),
        ({"turn": ones(2, 3, 8)}, r"turn wanted float32\[2, 3, 16\], got float32\[2, 3, 8\]"),
        ({"turn": ones(2, 3, 16, dtype=BF16)}, "turn wanted float32.* got bfloat16"),
        ({"positions": np.zeros((2, 2), np.int32)}, r"positions wanted int32\[2, 3\], got int32"),
        ({"positions": np.zeros((2, 3), np.uint8)}, r"positions wanted int32\[2, 3\], got uint8"),
        ({"keys": ones(2, 2, 4, 16, 16)}, r"keys wanted .*\[2, 2, 4, 16, 64\], got float32"),
        ({"keys": ones(2, 2, 64, 16)}, r"keys wanted \[B, G, S/64, h, 64\], got \[2, 2, 64, 16\]"),
        ({"keys": ones(2, 2, 1, 16, 64, dtype=INT8)}, "keys wanted float32 or bfloat16.* got int8"),
        ({"keys": ones(2, 2, 0, 16, 64)}, "the cache has no slots"),
        ({"values": ones(2, 2, 64, 16, dtype=BF16)}, "values wanted float32.* got bfloat16"),
        ({"values": ones(2, 2, 128, 16)}, r"values wanted float32\[2, 2, 64, 16\], got"),
        (INT8_CACHE | {"keys": ones(2, 2, 1, 8, 64, 2)}, "keys wanted int8.* got float32"),
        (INT8_CACHE | {"keys": ALL["keys"]}, r"keys wanted \[B, G, S/64, h/2, 64, 2\], got"),
        (INT8_CACHE | {"values": ALL["values"]}, r"values wanted int8\[2, 2, 32, 16, 2\], got"),
        (INT8_CACHE | {"scales": ones(2, 2, 2, 64)}, r"scales wanted bfloat16\[2, 2, 2, 64\], got"),
        (INT8_CACHE | {"more": ones(1)}, "the cache is keys and values, .* got 4 arrays"),
    ],
)  # fmt: skip
def test_shapes_are_checked_when_a_program_is_traced(changes, message, impl):
    operands = {name: ALL[name] for name in list(ALL)[:5]} | changes
    with pytest.raises(ValueError, match=f"cached_attention: {message}"):
        jax.eval_shape(functools.partial(ops.cached_attention, impl=impl), *operands.values())
