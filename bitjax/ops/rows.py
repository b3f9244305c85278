"""Operations on rows of activations that belong to many sequences: what batches are made of.

A row's result depends on that row (and the pages it reads) alone: not on the number of rows, the
others' values, or the number of threads, to the bit, where the custom calls serve. XLA's own sums
take another order for another shape. So a sequence is the same in whatever company it runs.

`count` is int32 `[1]`: of R rows, only so many of the first are wanted; the others of a result mean
nothing, and cost nothing. So few shapes serve any number of rows.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from bitjax.ops import Impl, attention_fits, either, ffi, reference
from bitjax.ops.reference import KEY_BLOCK, Gate

PAGE = KEY_BLOCK  # slots of a page


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Which tokens rows are. Rows of one sequence lie side by side.

    Attributes:
        positions_R: int32, slot of each row in its sequence, 0..64N-1.
        sequences_R: int32, table of each row, 0..Q-1.
        tables_QxN: int32, pages of each sequence; those that are not read may be any.
        turn_Rxh: float32, cosines and sines of the rotary angles, see `reference.rotate`.
        count_1: int32 `[1]`, how many rows are wanted.
    """

    positions_R: jax.Array
    sequences_R: jax.Array
    tables_QxN: jax.Array
    turn_Rxh: jax.Array
    count_1: jax.Array


def paged_attention(
    qkv_RxNxh: jax.Array, rows: Rows, *cache: jax.Array, impl: Impl = "auto"
) -> tuple[jax.Array, ...]:
    """Causal grouped-query attention of new tokens over pages that they are added to.

    As `bitjax.ops.cached_attention`, whose caches are here pages of 64 slots: slot s of a sequence
    is slot s % 64 of page `tables[sequence, s // 64]`. All rows are stored before any attends. A
    page that a sequence stores to must not be read by another in the same call.

    Args:
        qkv_RxNxh: float32 or bfloat16; N = H + 2G.
        rows: see `Rows`.
        cache: of P pages, as `cached_attention` takes P sequences of 64 slots: keys
            `[P, G, 1, h, 64]` and values `[P, G, 64, h]`, or three arrays of an int8 cache.
        impl: as of `cached_attention`.

    Returns:
        `[R, H * h]` in the dtype of qkv, and the updated arrays of the cache (in place when it is
        donated).

    Raises:
        ValueError: dtypes or shapes that do not fit, or an unknown `impl`.
        ModuleNotFoundError: `impl="ffi"` without the extension.
    """
    operands = (
        qkv_RxNxh, rows.turn_Rxh, rows.positions_R, rows.sequences_R, rows.tables_QxN,
        rows.count_1, *cache,
    )  # fmt: skip
    if qkv_RxNxh.ndim != 3 or cache[0].ndim not in (5, 6) or cache[0].shape[2] != 1:
        raise ValueError(
            "paged_attention: wanted qkv [R, H + 2G, h] and keys [P, G, 1, ...], got "
            f"{list(qkv_RxNxh.shape)} and {list(cache[0].shape)}"
        )
    fits = attention_fits(qkv_RxNxh.shape[-1])
    return either(impl, ffi.paged_attention, reference.paged_attention, *operands, fits=fits)


def prepare(
    x_RxK: jax.Array,
    count_1: jax.Array,
    *,
    gate: Gate = "none",
    norm: jax.Array | None = None,
    eps: float = 0.0,
    impl: Impl = "auto",
) -> jax.Array:
    """`norm(gate(x))` in float32 between, `[R, K]` in x's dtype; with a gate x is `[R, 2K]`.

    Raises:
        ValueError: an unknown `impl`; when it runs, shapes that do not fit.
        ModuleNotFoundError: `impl="ffi"` without the extension.
    """

    def twin(x: jax.Array, norm: jax.Array | None, count_1: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        if gate != "none":
            y = reference.gated(gate, *jnp.split(y, 2, axis=-1))
        return (y if norm is None else reference.rms_norm(y, norm, eps)).astype(x.dtype)

    def call(x: jax.Array, norm: jax.Array | None, count_1: jax.Array) -> jax.Array:
        return ffi.prepare(x, gate, norm, eps, count_1)

    return either(impl, call, twin, x_RxK, norm, count_1)


def float_matmul(
    x_RxK: jax.Array, table_NxK: jax.Array, count_1: jax.Array, impl: Impl = "auto"
) -> jax.Array:
    """`x @ table.T`, both float32 or bfloat16, summed in float32: `[R, N]`.

    Raises:
        ValueError: an unknown `impl`; when it runs, shapes that do not fit.
        ModuleNotFoundError: `impl="ffi"` without the extension.
    """

    def twin(x: jax.Array, table: jax.Array, count_1: jax.Array) -> jax.Array:
        return jax.lax.dot_general(
            x.astype(jnp.float32), table.astype(jnp.float32), (((1,), (1,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
        )  # fmt: skip

    return either(impl, ffi.float_matmul, twin, x_RxK, table_NxK, count_1)
