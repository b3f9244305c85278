"""Pure JAX twins of the custom calls: any backend, any shape, no extension needed.

They read like the mathematics and define what every kernel must compute.
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp

from bitjax.packing import MAX_MULTIPLIER, SCREEN_GROUP, PackedWeights, Screen, unpack
from bitjax.quant import EXACT_FLOAT32_TERMS, int8_per_token

# sqrt(60 ln 2 / 6): exp(-6 c^2) = 2^-60, the chance that a row's error exceeds its bound.
DEVIATIONS = math.sqrt(10 * math.log(2))

Gate = Literal["none", "relu2", "silu"]
KEY_BLOCK = 64  # slots of a block of cached keys; a cache holds a multiple of so many
SMALLEST_SCALE = 2.0**-100  # of an int8 key or value; its inverse is finite


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """`x / sqrt(mean(x^2) + eps) * scale` over the last axis, float32 (arXiv 1910.07467)."""
    x = x.astype(jnp.float32)
    mean_square = jnp.mean(x * x, axis=-1, keepdims=True)
    scale = scale.reshape((1,) * (x.ndim - 1) + (-1,))
    return x * jax.lax.rsqrt(mean_square + eps) * scale


def gated(gate: Gate, x: jax.Array, up: jax.Array) -> jax.Array:
    """`act(x) * up`, act = SiLU or ReLU^2 (arXiv 2002.05202, 2109.08668)."""
    return (jax.nn.silu(x) if gate == "silu" else jnp.square(jax.nn.relu(x))) * up


def packed_matmul(
    x: jax.Array,
    weights: PackedWeights,
    gate: Gate = "none",
    norm: jax.Array | None = None,
    eps: float = 0.0,
    residual: jax.Array | None = None,
) -> jax.Array:
    """`int8(norm(gate(x))) @ weights.T`, rescaled, plus the residual; see `bitjax.ops`.

    q, s_x = int8_per_token(norm(gate(x)))      float32 throughout
    acc[n] = sum_k q[k] * w[n, k]               an exact integer
    y[n]   = float32(acc[n]) * (s_x * s_w[n]) + residual[n]
    """
    dtype = x.dtype
    if gate != "none":
        x = gated(gate, *jnp.split(x.astype(jnp.float32), 2, axis=-1))
    if norm is not None:
        x = rms_norm(x, norm, eps)
    q, x_scale = int8_per_token(x)
    ternary = weights.layout.startswith("ternary")
    if ternary and weights.cols <= EXACT_FLOAT32_TERMS:  # exact in float32, XLA's fastest product
        acc = _product(q, unpack(weights).astype(jnp.float32), jnp.float32)
    else:
        acc = packed_matmul_i32(q.astype(jnp.int8), weights).astype(jnp.float32)
    w_scale = weights.scale.reshape((1,) * (acc.ndim - 1) + (-1,))
    y = acc * (x_scale * w_scale)
    if residual is not None:
        y = y + residual.astype(jnp.float32)
    return y.astype(dtype)


def packed_matmul_i32(q: jax.Array, weights: PackedWeights) -> jax.Array:
    """The integer product alone: int8 `[..., K]` and N x K weights to int32 `[..., N]`."""
    return _product(q, unpack(weights), jnp.int32)


def dequantized_matmul(x: jax.Array, weights: PackedWeights) -> jax.Array:
    """`x @ (w * scale).T` with x not quantised; see `bitjax.ops`."""
    acc = _product(x, unpack(weights).astype(x.dtype), jnp.float32)
    return (acc * weights.scale.reshape((1,) * (acc.ndim - 1) + (-1,))).astype(x.dtype)


def int8_parts(x: jax.Array, count: int) -> jax.Array:
    """`[..., count, D]`: x quantised to int8 per token, and what that left, quantised likewise.

    The sum of two parts is x to 16 bits. Quantising them again changes nothing, for their codes are
    integers and their largest is 127 (or their scale is the smallest there is).
    """
    parts: list[jax.Array] = []
    for _ in range(count):
        parts.append(int8_per_token(x - sum(parts)).dequantize())
    return jnp.stack(parts, axis=-2)


def screened_logits(
    x: jax.Array,
    parts: jax.Array,
    approximate: jax.Array,
    table_VxD: jax.Array,
    screen: Screen,
    ranks: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Exact logits where the approximate ones leave a doubt; see `bitjax.ops.screened_logits`.

    With z = expand(x) (`bitjax.packing.Screen`) and its int8 parts p, the error of a row v splits
    into what the screen and what the parts got wrong:

        table[v] . x - screen[v] . p = -sum_i error[v, i] x_i  +  screen[v] . (z - p)

    The first sum has independent terms (x knows nothing of the dither), each uniform over an
    interval of length L_i = step[v, g(i)] |x_i| around 0. The moment generating function of such a
    term, sinh(a) / a with a = s L_i / 2, is at most exp(a^2 / 6). So by Chernoff's bound the sum
    exceeds t with probability at most exp(-6 t^2 / S), S = sum_i L_i^2; with t = c sqrt(S),
    c = sqrt(60 ln 2 / 6), that is 2^-60, and any of 2^17 rows does it with 2^-43. (Hoeffding's
    inequality, which knows the intervals only, needs sqrt(3) times this t.) S is not known for
    every row without reading its multipliers, but by Cauchy and Schwarz over the groups g

        S = sum_g step_g^2 |x_g|^2 <= sqrt(sum_g step_g^4) sqrt(sum_g |x_g|^4)

    which is close where the groups of x are alike, and S <= max_g step_g^2 |x|^2 where they are
    not. The second sum is at most |screen[v]| |z - p|, also by Cauchy and Schwarz: no chance in
    it, and p is close. (For the first sum that would give a bound like sqrt(D / 12) times the
    steps' mean, some 6 times as much at D = 2560: it rules out next to nothing.)

    Float32 sums of D products, and their scaling, round by D + 64 times 2^-24 of the product of the
    lengths at most. Here all logits are computed, then chosen from; the custom call computes those
    chosen.
    """
    D = x.shape[-1]
    x = x.astype(jnp.float32)
    z, p = screen.expand(x), parts.sum(-2)
    groups = -(-D // SCREEN_GROUP)
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, groups * SCREEN_GROUP - D)])
    energy = jnp.square(padded.reshape(*x.shape[:-1], groups, SCREEN_GROUP)).sum(-1)

    def length(squares: jax.Array) -> jax.Array:
        return jnp.sqrt(squares.sum(-1, keepdims=True))

    def row(values_V: jax.Array) -> jax.Array:
        return values_V.reshape((1,) * (x.ndim - 1) + (-1,))

    step = jnp.minimum(
        length(energy) * MAX_MULTIPLIER * row(screen.weights.scale),
        jnp.sqrt(length(jnp.square(energy))) * row(screen.spreads),
    )
    rounding = (D + 64) * 2.0**-24 * (length(energy) + 2 * length(p * p))
    bound = DEVIATIONS * step + (length(jnp.square(z - p)) + rounding) * row(screen.norms)

    exact = _product(x, table_VxD.astype(jnp.float32), jnp.float32)
    ranks = jnp.clip(ranks, 1, exact.shape[-1])
    threshold = jnp.take_along_axis(jnp.sort(exact), exact.shape[-1] - ranks[..., None], axis=-1)
    approximate = approximate.sum(-2)
    below = approximate + bound * (1 + 2.0**-16) < threshold
    logits = jnp.where(below, approximate, exact)
    finite = jnp.isfinite(x).all(-1, keepdims=True)
    return jnp.where(finite, logits, jnp.nan), (~below).sum(-1, dtype=jnp.int32)


def rotate(x_BxTxNxh: jax.Array, turn_BxTxh: jax.Array) -> jax.Array:
    """Rotary position embedding, half-split form (arXiv 2104.09864; `rotate_half`); float32.

    Turns the pair of elements i and i + h/2 by an angle whose cosine and sine are `turn[..., i]`
    and `turn[..., i + h/2]`.
    """
    cos, sin = jnp.split(turn_BxTxh[:, :, None, :], 2, axis=-1)
    first, second = jnp.split(x_BxTxNxh.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attend(
    q_BxTxHxh: jax.Array,
    k_BxGxSxh: jax.Array,
    v_BxGxSxh: jax.Array,
    positions_BxT: jax.Array,
    segments_BxT: jax.Array | None = None,
) -> jax.Array:
    """`softmax(q k^T / sqrt(h)) v` over key slots 0..position; returns `[B, T, H * h]`.

    With segments, of as many slots as queries, over those of a query's own segment only.

    Heads lead in every product, and the queries of a group are rows of one matrix: on CPU, XLA
    then makes plain matrix products of them (2.6 times as fast, with gradients, as heads last).
    """
    B, T, H, h = q_BxTxHxh.shape
    G, S = k_BxGxSxh.shape[1:3]
    q = (q_BxTxHxh * h**-0.5).transpose(0, 2, 1, 3).reshape(B, G, H // G * T, h)
    scores = jnp.einsum("BGQh,BGSh->BGQS", q, k_BxGxSxh, preferred_element_type=jnp.float32)
    visible_BxTxS = jnp.arange(S)[None, None, :] <= positions_BxT[:, :, None]
    if segments_BxT is not None:
        visible_BxTxS &= segments_BxT[:, :, None] == segments_BxT[:, None, :]
    scores = scores.reshape(B, H, T, S)
    weights = jax.nn.softmax(jnp.where(visible_BxTxS[:, None], scores, -jnp.inf), axis=-1)
    weights = weights.astype(v_BxGxSxh.dtype).reshape(B, G, H // G * T, S)
    mixed = jnp.einsum("BGQS,BGSh->BGQh", weights, v_BxGxSxh)
    return mixed.reshape(B, H, T, h).transpose(0, 2, 1, 3).reshape(B, T, H * h)


def quantize_slot(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Codes int8 `[..., h]` and scale bfloat16 `[...]` of keys or values: `x ~ scale * codes`.

    `scale = max(absmax / 127, 2^-100)`, rounded up to bfloat16, and NaN (with codes 0) where x
    holds NaN or an infinity; codes are rounded to even, so `|x - scale * codes| <= scale / 2`.
    """
    x = x.astype(jnp.float32)
    absmax = jnp.max(jnp.abs(x), axis=-1)
    finite = jnp.isfinite(absmax)
    bits = jax.lax.bitcast_convert_type(jnp.maximum(absmax / 127, SMALLEST_SCALE), jnp.uint32)
    up = ((bits + 0xFFFF) >> 16).astype(jnp.uint16)
    scale = jnp.where(finite, jax.lax.bitcast_convert_type(up, jnp.bfloat16), jnp.nan)
    codes = jnp.round(x * (1 / scale.astype(jnp.float32))[..., None])
    return jnp.where(finite[..., None], codes, 0).astype(jnp.int8), scale.astype(jnp.bfloat16)


def cached_attention(
    qkv_BxTxNxh: jax.Array, turn_BxTxh: jax.Array, positions_BxT: jax.Array, *cache: jax.Array
) -> tuple[jax.Array, ...]:
    """Turn, store, attend; see `bitjax.ops`. Float32 but for what is stored."""
    q, k, v = _turned(qkv_BxTxNxh, turn_BxTxh, cache[0].shape[1])
    S = cache[0].shape[2] * KEY_BLOCK
    slot = jnp.where(positions_BxT < 0, S, positions_BxT)  # a negative one would count from the end
    cache = _stored(jnp.arange(len(slot))[:, None], slot, k, v, cache)
    mixed = attend(q, *_widened(cache), slot)
    return mixed.astype(qkv_BxTxNxh.dtype), *cache


def paged_attention(
    qkv_RxNxh: jax.Array,
    turn_Rxh: jax.Array,
    positions_R: jax.Array,
    sequences_R: jax.Array,
    tables_QxN: jax.Array,
    count_1: jax.Array,
    *cache: jax.Array,
) -> tuple[jax.Array, ...]:
    """Turn, store, attend; see `bitjax.ops.rows`. Every row has its pages gathered for it."""
    R, P, G = len(positions_R), len(cache[0]), cache[0].shape[1]
    q, k, v = _turned(qkv_RxNxh[:, None], turn_Rxh[:, None], G)
    pages_RxN = tables_QxN[sequences_R]
    page_R = pages_RxN[jnp.arange(R), positions_R // KEY_BLOCK]
    page_R = jnp.where(jnp.arange(R) < count_1[0], page_R, P)  # outside: not stored
    cache = _stored(page_R[:, None], (positions_R % KEY_BLOCK)[:, None], k, v, cache)
    gathered = []
    for axis, array in enumerate(cache):
        whole = array[pages_RxN]  # [R, N, G, ...], slots behind: in blocks, plain, and of scales
        if axis == 0:
            gathered.append(whole.swapaxes(1, 2)[:, :, :, 0])
        elif axis == 1:
            whole = whole.swapaxes(1, 2)
            gathered.append(whole.reshape(R, G, -1, *whole.shape[4:]))
        else:
            gathered.append(whole.transpose(0, 2, 3, 1, 4).reshape(R, G, 2, -1))
    mixed = attend(q, *_widened(tuple(gathered)), positions_R[:, None])
    return mixed[:, 0].astype(qkv_RxNxh.dtype), *cache


def _turned(
    qkv_BxTxNxh: jax.Array, turn_BxTxh: jax.Array, G: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries and keys, turned, and values."""
    H = qkv_BxTxNxh.shape[2] - 2 * G
    turned = rotate(qkv_BxTxNxh[:, :, : H + G], turn_BxTxh)
    return turned[:, :, :H], turned[:, :, H:], qkv_BxTxNxh[:, :, H + G :]


def _stored(
    row: jax.Array, slot: jax.Array, k: jax.Array, v: jax.Array, cache: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
    """The cache with keys and values `[B, T, G, h]` put at slots of rows; outside it, nowhere."""
    every = slice(None)
    block, place = slot // KEY_BLOCK, slot % KEY_BLOCK

    def put(where: jax.Array, index: tuple[object, ...], x: jax.Array) -> jax.Array:
        return where.at[index].set(x.astype(where.dtype), mode="drop")

    if len(cache) == 2:
        keys = put(cache[0], (row, every, block, every, place), k)
        return keys, put(cache[1], (row, every, slot), v)
    (k, k_scale), (v, v_scale) = quantize_slot(k), quantize_slot(v)
    pairs = k.reshape(*k.shape[:-1], k.shape[-1] // 2, 2)
    keys = put(cache[0], (row, every, block, every, place), pairs)
    values = put(cache[1], (row, every, slot // 2, every, slot % 2), v)
    scales = put(cache[2], (row, every, 0, slot), k_scale)
    return keys, values, put(scales, (row, every, 1, slot), v_scale)


def _widened(cache: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    """Keys and values of a cache as float32 `[B, G, S, h]`."""
    keys, values = cache[:2]
    B, G, blocks = keys.shape[:3]
    k = keys.swapaxes(3, 4).reshape(B, G, blocks * KEY_BLOCK, -1)
    if len(cache) == 2:
        return k.astype(jnp.float32), values.astype(jnp.float32)
    wide_BxGx2xSx1 = cache[2].astype(jnp.float32)[..., None]
    v = values.swapaxes(3, 4).reshape(k.shape)
    return k * wide_BxGx2xSx1[:, :, 0], v * wide_BxGx2xSx1[:, :, 1]


def _product(x: jax.Array, w_NxK: jax.Array, accumulator: type) -> jax.Array:
    """`x @ w.T` over the last axes, summed in `accumulator`, full precision on every backend."""
    return jax.lax.dot_general(
        x, w_NxK, (((x.ndim - 1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST, preferred_element_type=accumulator,
    )  # fmt: skip
