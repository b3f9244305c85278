"""Accelerated operations: one public function each, a pure-JAX twin, and a custom call.

`impl` is static:

    "auto"       the custom call on CPU where the extension is built, the reference elsewhere;
                 decided when the program is lowered, so the same function lowers for a GPU
    "ffi"        the custom call, or an error
    "reference"  pure JAX
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp

from bitjax.ops import ffi, reference
from bitjax.ops.reference import KEY_BLOCK, Gate
from bitjax.packing import PackedWeights, Screen

Impl = Literal["auto", "ffi", "reference"]
FLOAT_PARTS = {"float32": 3, "bfloat16": 2}  # of activations that are not to lose precision
TWO_PART_ROWS = 2  # of activations, up to which a screen takes each in two int8 parts
Result = TypeVar("Result")


def either(
    impl: Impl,
    call: Callable[..., Result],
    twin: Callable[..., Result],
    *operands: Any,
    fits: bool = True,
) -> Result:
    """What a custom call or its twin makes of operands, as the module's docstring says.

    Args:
        impl: which of them.
        call: uses custom calls.
        twin: the same in pure JAX.
        operands: of either.
        fits: whether the custom call takes such operands; "auto" takes the twin if not.

    Raises:
        ValueError: an unknown `impl`.
    """
    if impl not in ("auto", "ffi", "reference"):
        raise ValueError(f"impl={impl!r} is not auto, ffi or reference")
    if impl == "reference" or (impl == "auto" and not (fits and ffi.available())):
        return twin(*operands)
    if impl == "ffi":
        return call(*operands)
    chosen: Result = jax.lax.platform_dependent(*operands, cpu=call, default=twin)
    return chosen


def packed_matmul(
    x: jax.Array,
    weights: PackedWeights,
    *,
    gate: Gate = "none",
    norm: jax.Array | None = None,
    eps: float = 0.0,
    residual: jax.Array | None = None,
    rows: jax.Array | None = None,
    impl: Impl = "auto",
) -> jax.Array:
    """Product of int8-quantised activations with packed weights, with what stands around it.

    `y = rescale(int8_per_token(norm(gate(x))) @ weights.T) + residual`, in float32 from gate to
    sum; `bitjax.ops.reference` has the equations. What is fused here never travels to memory.

    Args:
        x: float32 or bfloat16 `[..., K]`, or `[..., 2K]` with a gate: its gate and up halves.
        weights: packed N x K.
        gate: joins the halves.
        norm: float32 `[K]`, the scale of an RMSNorm.
        eps: of the norm.
        residual: `[..., N]` in x's dtype, added to the result.
        rows: int32 `[1]`; only so many of the first rows, leading axes counted as one, are wanted,
            and the others of the result mean nothing.
        impl: which implementation, see the module's docstring.

    Returns:
        `[..., N]` in x's dtype.

    Raises:
        ValueError: shapes that do not fit, an unsupported dtype, or an unknown `impl` or `gate`.
        ModuleNotFoundError: `impl="ffi"` without the extension.
    """
    if gate not in ("none", "relu2", "silu"):
        raise ValueError(f"gate={gate!r} is not none, relu2 or silu")
    wanted = weights.cols * (1 if gate == "none" else 2)
    if x.ndim < 1 or x.shape[-1] != wanted:
        raise ValueError(
            f"packed_matmul: x has shape {x.shape}; its last axis must be {wanted} for the "
            f"{weights.rows} x {weights.cols} weights and gate={gate!r}"
        )
    if norm is not None and norm.shape != (weights.cols,):
        raise ValueError(f"packed_matmul: norm has shape {norm.shape}; wanted ({weights.cols},)")
    if residual is not None and residual.shape != (*x.shape[:-1], weights.rows):
        raise ValueError(
            f"packed_matmul: residual has shape {residual.shape}; "
            f"wanted {(*x.shape[:-1], weights.rows)}"
        )
    return either(
        impl,
        lambda x, w, n, r, rows: ffi.packed_matmul(x, w, gate, n, eps, r, rows),
        lambda x, w, n, r, rows: reference.packed_matmul(x, w, gate, n, eps, r),
        x, weights, norm, residual, rows,
    )  # fmt: skip


def dequantized_matmul(
    x: jax.Array, weights: PackedWeights, impl: Impl = "auto", rows: jax.Array | None = None
) -> jax.Array:
    """Product of packed weights with activations that are not quantised: `x @ (w * scale).T`.

    The custom call takes x in int8 parts, each what the parts before it left: three leave 254^-3 =
    2^-24 of a row's largest element, as much as a float32 sum loses, and two 2^-16, less than
    bfloat16 resolves. All parts are rows of one product, so weights are read once, packed as they
    are.

    Args:
        x: float32 or bfloat16 `[..., K]`. A row with a NaN or an infinity gives a row of NaN.
        weights: packed N x K.
        impl: which implementation, see the module's docstring.
        rows: as of `packed_matmul`.

    Returns:
        `[..., N]` in x's dtype.

    Raises:
        ValueError: shapes that do not fit, an unsupported dtype, or an unknown `impl`.
        ModuleNotFoundError: `impl="ffi"` without the extension.
    """
    if x.ndim < 1 or x.shape[-1] != weights.cols or x.dtype.name not in FLOAT_PARTS:
        raise ValueError(
            f"dequantized_matmul: x is {x.dtype}{list(x.shape)}; wanted float32 or bfloat16 "
            f"[..., {weights.cols}] for the {weights.rows} x {weights.cols} weights"
        )
    return either(
        impl, _matmul_in_parts, lambda x, w, rows: reference.dequantized_matmul(x, w),
        x, weights, rows,
    )  # fmt: skip


def _matmul_in_parts(
    x: jax.Array, weights: PackedWeights, rows: jax.Array | None = None
) -> jax.Array:
    """`dequantized_matmul` by the custom call."""
    wide = x.astype(jnp.float32)
    # A power of two, so exactly undone, brings the largest element to 512..1024 (unless it is below
    # 2^-100): int8_per_token's smallest scale is then far below what the last part needs.
    exponent = jnp.frexp(jnp.max(jnp.abs(wide), axis=-1, keepdims=True))[1] - 10
    exponent = jnp.maximum(exponent, -110)
    count = FLOAT_PARTS[x.dtype.name]
    parts = reference.int8_parts(jnp.ldexp(wide, -exponent), count)
    rows = None if rows is None else rows * count
    y = ffi.packed_matmul(parts, weights, "none", None, 0.0, None, rows)
    y = functools.reduce(operator.add, (y[..., i, :] for i in range(count)))  # in this order
    return jnp.ldexp(y, exponent).astype(x.dtype)


def screened_logits(
    x: jax.Array,
    table_VxD: jax.Array,
    screen: Screen,
    ranks: jax.Array,
    impl: Impl = "auto",
    rows: jax.Array | None = None,
    allowed: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Logits `x @ table.T` of which the largest are exact, mostly at the price of the screen.

    The screen gives approximate logits of all tokens and a bound on their error that holds but for
    a chance of 2^-60 a token (`bitjax.ops.reference.screened_logits` has the proof). Tokens that
    may be among the `rank` largest are then computed from the table: float32 sums of products with
    x as it is, not quantised. The rest keep the approximation, which is below all of these. So the
    largest `rank` logits are those of the whole table, and a drawing that looks at no others is
    exact. What looks at the tail sees it with the error of an int4 head.

    Args:
        x: float32 or bfloat16 `[..., D]`; independent of the screen's dither. A row with
            a NaN or an infinity gives a row of NaN.
        table_VxD: bfloat16, finite.
        screen: of this table.
        ranks: int32 `[...]`, how many of the largest logits shall be exact; 1..V, or the nearest.
        impl: which implementation, see the module's docstring.
        rows: int32 `[1]`, for x `[R, D]`: only so many rows are wanted, and each is computed as if
            it were the only one, whatever R is (which else decides in how many parts x is taken).
        allowed: with rows, uint32 `[R, ceil(V / 32)]`: ranks count the tokens alone whose bits,
            the lowest first, are set; what else the result has of the others means little.

    Returns:
        float32 `[..., V]`, and int32 `[...]`: how many of them are exact.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an unknown `impl`.
        ModuleNotFoundError: `impl="ffi"` without the extension.
    """
    V, D = screen.shape
    if table_VxD.shape != (V, D) or table_VxD.dtype != jnp.bfloat16:
        raise ValueError(
            f"screened_logits: the table is {table_VxD.dtype}{list(table_VxD.shape)}; "
            f"its screen wants bfloat16[{V}, {D}]"
        )
    if x.ndim < 1 or x.shape[-1] != D or ranks.shape != x.shape[:-1]:
        raise ValueError(
            f"screened_logits: x has shape {x.shape} and ranks {ranks.shape}; wanted [..., {D}] "
            "and the same leading dimensions"
        )
    if rows is not None:
        return either(
            impl, _screened_rows, _screened_rows_twin,
            x, table_VxD, screen, ranks, rows, allowed,
        )  # fmt: skip
    # Few rows wait for memory, so a second part costs nothing and halves the bound; many do not.
    parts_of_x = 2 if math.prod(x.shape[:-1]) <= TWO_PART_ROWS else 1
    parts = reference.int8_parts(screen.expand(x.astype(jnp.float32)), parts_of_x)
    approximate = packed_matmul(parts, screen.weights, impl=impl)
    operands = (x, parts, approximate, table_VxD, screen, ranks)
    return either(impl, ffi.screened_logits, reference.screened_logits, *operands)


def _screened_rows(
    x_RxD: jax.Array,
    table_VxD: jax.Array,
    screen: Screen,
    ranks_R: jax.Array,
    rows_1: jax.Array,
    allowed_RxW: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    parts = ffi.screen_parts(x_RxD, screen, rows_1)
    approximate = ffi.packed_matmul(parts, screen.weights, rows=rows_1)
    wanted_R = jnp.arange(len(x_RxD)) < rows_1
    ranks_R = jnp.where(wanted_R, jnp.maximum(ranks_R, 1), -1)
    return ffi.screened_logits(x_RxD, parts, approximate, table_VxD, screen, ranks_R, allowed_RxW)


def _screened_rows_twin(
    x_RxD: jax.Array,
    table_VxD: jax.Array,
    screen: Screen,
    ranks_R: jax.Array,
    rows_1: jax.Array,
    allowed_RxW: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    del rows_1  # all are computed
    if allowed_RxW is not None:
        ranks_R = jnp.full_like(ranks_R, len(table_VxD))  # the allowed ones among them
    return screened_logits(x_RxD, table_VxD, screen, ranks_R, impl="reference")


def attention_fits(head_dim: int) -> bool:
    """Whether the custom call of cached attention takes heads of so many dimensions."""
    return head_dim % 16 == 0 and 16 <= head_dim <= 512


def cached_attention(
    qkv_BxTxNxh: jax.Array,
    turn_BxTxh: jax.Array,
    positions_BxT: jax.Array,
    *cache: jax.Array,
    impl: Impl = "auto",
) -> tuple[jax.Array, ...]:
    """Causal grouped-query attention of new tokens over a KV cache that they are added to.

    `mixed = softmax(turn(q) turn(k)^T / sqrt(h)) v` over the slots 0..position of each token.

    Args:
        qkv_BxTxNxh: float32 or bfloat16; N = H + 2G: queries, keys and values of T new tokens.
        turn_BxTxh: float32, cosines and sines of the rotary angles, see `reference.rotate`.
        positions_BxT: int32, slot of each new token; outside the cache it is not stored and sees
            all slots.
        cache: of S slots, a multiple of 64. In float32 or bfloat16, keys `[B, G, S/64, h, 64]` and
            values `[B, G, S, h]`. In int8, keys `[B, G, S/64, h/2, 64, 2]`, values
            `[B, G, S/2, h, 2]` and the bfloat16 scales of both, `[B, G, 2, S]`: a key or value is
            rounded to 1/254 of its largest element, see `reference.quantize_slot`; one that holds
            NaN or an infinity is NaN as a whole.
        impl: which implementation; where `attention_fits` says no, "auto" takes the reference.

    Returns:
        `[B, T, H * h]` in the dtype of qkv, and the updated arrays of the cache (in place when it
        is donated).

    Raises:
        ValueError: shapes or dtypes that do not fit, or an unknown `impl`.
        ModuleNotFoundError: `impl="ffi"` without the extension.
    """
    operands = (qkv_BxTxNxh, turn_BxTxh, positions_BxT, *cache)
    _check_attention(qkv_BxTxNxh, turn_BxTxh, positions_BxT, cache)
    h = qkv_BxTxNxh.shape[-1]
    fits = attention_fits(h)
    if impl == "ffi" and not fits:
        raise ValueError(
            "cached_attention: the custom call takes heads of 16..512 dimensions, a multiple "
            f"of 16; got {h}"
        )
    return either(impl, ffi.cached_attention, reference.cached_attention, *operands, fits=fits)


def _check_attention(
    qkv: jax.Array, turn: jax.Array, positions: jax.Array, cache: tuple[jax.Array, ...]
) -> None:
    """Refuse operands that do not fit each other, in one sentence."""

    def require(name: str, x: jax.Array, shape: tuple[int, ...], *dtypes: str) -> None:
        if x.shape != shape or x.dtype.name not in dtypes:
            raise ValueError(
                f"cached_attention: {name} wanted {' or '.join(dtypes)}{list(shape)}, "
                f"got {x.dtype.name}{list(x.shape)}"
            )

    if len(cache) not in (2, 3):
        raise ValueError(
            "cached_attention: the cache is keys and values, in int8 with scales; "
            f"got {len(cache)} arrays"
        )
    int8 = len(cache) == 3
    keys, values = cache[:2]
    if qkv.ndim != 4:
        raise ValueError(f"cached_attention: qkv wanted [B, T, H + 2G, h], got {list(qkv.shape)}")
    if keys.ndim != 5 + int8:
        layout = "[B, G, S/64, h/2, 64, 2]" if int8 else "[B, G, S/64, h, 64]"
        raise ValueError(f"cached_attention: keys wanted {layout}, got {list(keys.shape)}")
    B, T, N, h = qkv.shape
    G, blocks = keys.shape[1:3]
    S = blocks * KEY_BLOCK
    if G < 1 or N - 2 * G < 1 or N % G != 0:
        raise ValueError(
            f"cached_attention: qkv has {N} heads; wanted a multiple of the cache's {G} key heads "
            "as queries, besides its keys and values"
        )
    if S == 0:
        raise ValueError("cached_attention: the cache has no slots")
    floats = ("float32", "bfloat16")
    require("qkv", qkv, qkv.shape, *floats)
    require("turn", turn, (B, T, h), "float32")
    require("positions", positions, (B, T), "int32")
    if int8:
        require("keys", keys, (B, G, blocks, h // 2, KEY_BLOCK, 2), "int8")
        require("values", values, (B, G, S // 2, h, 2), "int8")
        require("scales", cache[2], (B, G, 2, S), "bfloat16")
    else:
        require("keys", keys, (B, G, blocks, h, KEY_BLOCK), *floats)
        require("values", values, (B, G, S, h), keys.dtype.name)
