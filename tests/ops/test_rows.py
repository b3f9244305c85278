"""Operations on rows: pages against a cache in one piece, and sums against oracles.

By the same kernel, attention over pages has the bits of attention over a cache in one piece, which
tests/ops/test_cached_attention.py compares with an oracle.
"""

import dataclasses
import functools

import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_cached_attention import assert_same_bits, cache_of, make

from bitjax import ops
from bitjax.infer.convert import make_screen
from bitjax.ops import ffi, reference, rows
from bitjax.packing import pack

pytestmark = pytest.mark.skipif(not ffi.available(), reason="the extension is not built")

F32, BF16, INT8 = np.float32, oracle.BF16, np.int8
H, G, h = 4, 2, 16
by_pages = jax.jit(rows.paged_attention, static_argnames="impl")
in_one = jax.jit(functools.partial(ops.cached_attention, impl="ffi"))


def count(n):
    return np.array([n], np.int32)


def paged(lengths, starts, cache_dtype, qkv_dtype=F32, blocks=20, seed=0):
    """Rows of several sequences, their pages in disorder; and each sequence in one piece."""
    rng = np.random.default_rng(seed)
    pages, at = rng.permutation(3 * blocks), 0
    store = [np.zeros((3 * blocks, *x.shape[1:]), x.dtype) for x in _cache(1, 64, cache_dtype)]
    tables = np.zeros((len(lengths), blocks), np.int32)
    qkvs, turns, alone = [], [], []
    for s, (length, start) in enumerate(zip(lengths, starts, strict=True)):
        qkv, turn, positions, *cache = make(
            [start], length, H, G, h, 64 * blocks, qkv_dtype, cache_dtype, seed + s
        )
        alone.append((qkv, turn, positions, *cache))
        qkvs.append(qkv[0])
        turns.append(turn[0])
        for n in range(-(-(start + length) // 64)):
            tables[s, n] = pages[at]
            for whole, part in zip(store, _pages(cache, n), strict=True):
                whole[pages[at]] = part
            at += 1
    order = np.repeat(np.arange(len(lengths)), lengths).astype(np.int32)
    positions = np.concatenate([a[2][0] for a in alone])
    where = rows.Rows(positions, order, tables, np.concatenate(turns), count(len(order)))
    return np.concatenate(qkvs), where, store, alone


def _cache(batch, slots, dtype):
    return cache_of(*np.zeros((2, batch, G, slots, h)), dtype)


def _pages(cache, n):
    """Slots 64n.. of a cache of one sequence, as a page has them."""
    if len(cache) == 2:
        return cache[0][0, :, n : n + 1], cache[1][0, :, 64 * n : 64 * n + 64]
    values, scales = cache[1][0, :, 32 * n : 32 * n + 32], cache[2][0, :, :, 64 * n : 64 * n + 64]
    return cache[0][0, :, n : n + 1], values, scales


@pytest.mark.parametrize("cache_dtype", [F32, BF16, INT8])
@pytest.mark.parametrize(
    ("lengths", "starts"),
    [
        ([1], [0]),
        ([1, 1, 1], [63, 64, 700]),
        ([5, 1, 130], [60, 1100, 0]),  # one beyond a split of 1,024 slots, one over three pages
        ([3], [1200]),  # few tiles: splits are shared out
    ],
)
def test_pages_give_the_bits_of_one_piece(lengths, starts, cache_dtype):
    qkv, where, store, alone = paged(lengths, starts, cache_dtype)
    mixed, *updated = map(np.asarray, by_pages(qkv, where, *store, impl="ffi"))
    first = 0
    for s, length in enumerate(lengths):
        wanted, *cache = map(np.asarray, in_one(*alone[s]))
        assert_same_bits(mixed[first : first + length], wanted[0])
        for n in range(-(-(starts[s] + length) // 64)):
            for whole, part in zip(updated, _pages(cache, n), strict=True):
                assert_same_bits(whole[where.tables_QxN[s, n]], part)
        first += length


@pytest.mark.parametrize("name", ffi.kernels() if ffi.available() else ())
@pytest.mark.parametrize("cache_dtype", [F32, BF16, INT8])
def test_pages_give_the_bits_of_one_piece_on_every_kernel(name, cache_dtype):
    ffi.force_kernel(name)
    try:
        test_pages_give_the_bits_of_one_piece([5, 1, 130], [60, 1100, 0], cache_dtype)
    finally:
        ffi.force_kernel(None)


@pytest.mark.parametrize("cache_dtype", [F32, INT8])
def test_pages_of_the_reference(cache_dtype):
    qkv, where, store, _ = paged([5, 1, 3], [60, 90, 0], cache_dtype, blocks=3)
    mixed, *updated = by_pages(qkv, where, *store, impl="ffi")
    wanted, *stored = by_pages(qkv, where, *store, impl="reference")
    np.testing.assert_allclose(mixed, wanted, atol=3e-3 if cache_dtype == INT8 else 1e-5)
    for got, cache in zip(updated, stored, strict=True):
        difference = np.abs(np.asarray(got).astype(F32) - np.asarray(cache).astype(F32))
        # Keys are turned with another rounding; then a code may be the next one.
        assert (difference > 1e-5).mean() < (1e-3 if cache_dtype == INT8 else 1e-9)


@pytest.mark.parametrize("impl", ["ffi", "reference"])
def test_rows_beyond_the_count_are_not_stored(impl):
    qkv, where, store, _ = paged([1, 1], [10, 20], F32, blocks=1)
    where = dataclasses.replace(where, count_1=count(1))
    _, keys, _ = by_pages(qkv, where, *store, impl=impl)
    changed = (np.asarray(keys) != store[0]).any(axis=(1, 2, 3, 4))
    assert changed.nonzero()[0].tolist() == [where.tables_QxN[0, 0]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions_R": np.array([64], np.int32)}, r"positions: wanted 0\.\.63, got 64"),
        ({"sequences_R": np.array([1], np.int32)}, r"sequences: wanted 0\.\.0, got 1"),
        ({"tables_QxN": np.array([[3]], np.int32)}, r"tables: wanted 0\.\.2, got 3"),
        ({"turn_Rxh": np.zeros((2, h), F32)}, r"turn: wanted \[1, 16\], got \[2, 16\]"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    qkv, where, store, _ = paged([1], [3], F32, blocks=1)
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=message):
        jax.block_until_ready(
            by_pages(qkv, dataclasses.replace(where, **changes), *store, impl="ffi")
        )


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("table_dtype", [F32, BF16])
def test_float_product(dtype, table_dtype):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((5, 83)).astype(dtype)
    table = rng.standard_normal((37, 83)).astype(table_dtype)
    run = jax.jit(rows.float_matmul, static_argnames="impl")
    got = np.asarray(run(x, table, count(4), impl="ffi"))[:4]
    wide = x[:4].astype(np.float64), table.astype(np.float64)
    sizes = np.linalg.norm(wide[0], axis=1)[:, None] * np.linalg.norm(wide[1], axis=1)
    assert (np.abs(got - wide[0] @ wide[1].T) <= (83 + 8) * 2.0**-24 * sizes).all()
    for m in (1, 2, 3):  # a row does not know how many others there are
        assert_same_bits(np.asarray(run(x[:m], table, count(m), impl="ffi")), got[:m])
    np.testing.assert_allclose(run(x, table, count(5), impl="reference")[:4], got, atol=1e-4)


@pytest.mark.parametrize("gate", ["none", "relu2", "silu"])
@pytest.mark.parametrize("normed", [True, False])
def test_prepare(gate, normed):
    rng = np.random.default_rng(2)
    x = rng.standard_normal((3, 40)).astype(F32)
    norm = rng.uniform(0.5, 2, 40 if gate == "none" else 20).astype(F32) if normed else None
    run = jax.jit(rows.prepare, static_argnames=("gate", "eps", "impl"))
    got = np.asarray(run(x, count(3), gate=gate, norm=norm, eps=1e-5, impl="ffi"))
    y = x.astype(np.float64)
    if gate != "none":
        a, b = np.split(y, 2, axis=1)
        y = (np.maximum(a, 0) ** 2 if gate == "relu2" else a / (1 + np.exp(-a))) * b
    if normed:
        y = y / np.sqrt((y * y).mean(1, keepdims=True) + 1e-5) * norm
    np.testing.assert_allclose(got, y, rtol=3e-6, atol=1e-6)
    twin = run(x, count(3), gate=gate, norm=norm, eps=1e-5, impl="reference")
    np.testing.assert_allclose(got, twin, rtol=3e-6, atol=1e-6)


def test_products_of_some_rows():
    """The rest of the result is left as it is: the rows that count are as without a number."""
    rng = np.random.default_rng(3)
    weights = pack(rng.integers(-1, 2, (24, 40)).astype(INT8), 0.5, "ternary1.6")
    x = jnp.asarray(rng.standard_normal((9, 40)), jnp.float32)
    run = jax.jit(functools.partial(ops.packed_matmul, impl="ffi"))
    whole = np.asarray(run(x, weights))
    for n in (0, 1, 5, 9, 100):
        got = np.asarray(run(x, weights, rows=count(n)))
        assert_same_bits(got[:n], whole[:n])


def test_screened_rows_do_not_know_each_other():
    from bitjax.infer.convert import make_screen

    rng = np.random.default_rng(4)
    table = rng.standard_normal((300, 70)).astype(BF16)
    screen = make_screen([table])
    x = rng.standard_normal((6, 70)).astype(F32)
    ranks = np.array([1, 5, 300, 1, 9, 2], np.int32)
    run = jax.jit(functools.partial(ops.screened_logits, impl="ffi"))
    whole = np.asarray(run(x, table, screen, ranks, rows=count(6))[0])
    for n in (1, 3):
        got = np.asarray(run(x[:n], table, screen, ranks[:n], rows=count(n))[0])
        assert_same_bits(got, whole[:n])
    exact = x.astype(np.float64) @ table.astype(np.float64).T
    for row, rank in enumerate(ranks):
        best = np.argsort(-exact[row])[:rank]
        np.testing.assert_allclose(whole[row][best], exact[row][best], atol=1e-4)
    twin = reference.int8_parts(screen.expand(jnp.asarray(x)), 1)
    parts = np.asarray(jax.jit(ffi.screen_parts)(x, screen, count(6)))
    np.testing.assert_allclose(parts, twin, atol=1.1 * np.abs(parts).max() / 127)
    assert (parts == np.asarray(twin)).mean() > 0.95


def test_other_platforms_are_served_by_pure_jax():
    """The same program lowers for a GPU, where there are no custom calls."""
    x, table = np.ones((3, 62), F32), np.ones((40, 62), BF16)
    screen, ranks, allowed = make_screen([table]), np.ones(3, np.int32), np.ones((3, 2), np.uint32)
    qkv, where, store, _ = paged([2], [5], F32, blocks=2)
    for function, *operands in (
        (lambda *o: ops.screened_logits(*o[:4], rows=o[4]), x, table, screen, ranks, count(2)),
        (
            lambda *o: ops.screened_logits(*o[:4], rows=o[4], allowed=o[5]),
            x, table, screen, ranks, count(2), allowed,
        ),
        (rows.prepare, x, count(2)),
        (rows.float_matmul, x, table, count(2)),
        (rows.paged_attention, qkv, where, *store),
    ):  # fmt: skip
        traced = jax.jit(function).trace(*operands)
        assert "bitjax_" in traced.lower(lowering_platforms=("cpu",)).as_text()
        assert "bitjax_" not in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_an_unknown_implementation():
    x = np.ones((1, 4), F32)
    with pytest.raises(ValueError, match="impl='fast' is not auto, ffi or reference"):
        rows.prepare(x, count(1), impl="fast")
    with pytest.raises(ValueError, match="impl='fast' is not auto, ffi or reference"):
        rows.float_matmul(x, x, count(1), impl="fast")
