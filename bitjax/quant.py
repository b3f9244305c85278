"""Quantisers of BitNet: ternary and binary weights, int8 activations, straight-through gradients.

Every quantiser returns float32 integer-valued `codes` and a `scale` that MULTIPLIES:

    dequant(x) = codes * scale

The sources write the reciprocal scale s and divide; ours is 1/s.

    ternary, per tensor   m = max(mean|W|, 1e-5)   codes = clip(round(W / m), -1, 1)     scale = m
    binary, per tensor    m = max(mean|W|, 1e-5)   codes = +1 if W > mean(W) else -1      scale = m
    int8, per token       a = max(max|x|, 1e-5)    codes = clip(round(x * 127 / a), -128, 127)
                                                   scale = a * (1/127)

Rounding is to nearest, ties to even. "W / m" is computed as `W * (1/m)`, "x * 127 / a" as
`x * (127 / a)`, and the scale as a product because XLA turns a division by a constant into one; all
in float32 whatever the input's dtype. So all implementations (this one, the C++ kernels, a packed
file) agree to the bit.

Sources: ternary and int8, "The Era of 1-bit LLMs: Training Tips, Code and FAQ" (Microsoft, 2024),
figures 3 and 4; binary, BitNet (arXiv 2310.11453), equations 1 to 3.

Embeddings and heads, kept in full precision by BitNet, have forms for inference: `int8_per_row` and
`int4_grouped`; `int4_dithered` screens a head (`bitjax.ops.screened_logits`).

Deliberately absent: NaN and infinity are not replaced. They make the scale NaN, so they surface
in the output; `require_finite` refuses them where weights enter.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Smallest absmean or absmax: keeps an all-zero tensor's scale finite and its codes zero.
EPS = 1e-5
# Largest number of int8 x {-1,0,1} products whose float32 sum is exact: 2**24 / 128.
EXACT_FLOAT32_TERMS = 2**24 // 128
ROWS_AT_ONCE = 1024  # of a matrix that is quantised in parts: a few megabytes of temporary values
ALIGNMENT = 64  # bytes; what XLA on CPU asks of a buffer that it shall use without a copy


Segments = tuple[int, ...]  # rows of each of several tensors stacked as one matrix


class Quantized(NamedTuple):
    """`dequant = codes * scale`; codes are float32 integers, scale broadcasts against them."""

    codes: jax.Array
    scale: jax.Array

    def dequantize(self) -> jax.Array:
        """The real values the codes stand for, float32."""
        return self.codes * self.scale


def straight_through(value: jax.Array, quantized: jax.Array) -> jax.Array:
    """`quantized` in the forward pass (exactly), the gradient of `value` in the backward pass.

    Exact, unlike `value + stop_gradient(quantized - value)`, because `value - value` is zero.
    """
    return jax.lax.stop_gradient(quantized) + (value - jax.lax.stop_gradient(value))


def ternary(w_NxK: jax.Array, segments: Segments = ()) -> Quantized:
    """Absmean ternary weights: codes in {-1, 0, 1}.

    Args:
        w_NxK: one tensor, or several stacked.
        segments: rows of each stacked tensor; empty for one tensor.

    Returns:
        Scale `[1, 1]`, or `[N, 1]` with segments: each tensor has its own. The gradient of
        `dequantize()` with respect to `w_NxK` is the identity (straight-through).
    """
    w_NxK = w_NxK.astype(jnp.float32)
    scale = _absmean(w_NxK, segments)
    scaled = w_NxK * (1.0 / scale)
    return Quantized(straight_through(scaled, _ternary_codes(scaled)), scale)


def binary(w_NxK: jax.Array, segments: Segments = ()) -> Quantized:
    """Binary weights of BitNet b1: codes in {-1, 1}; scale and segments as in `ternary`.

    Sign(0) is -1, as in the paper. The gradient is straight-through.
    """
    w_NxK = w_NxK.astype(jnp.float32)
    scale = _absmean(w_NxK, segments)
    signs = _signs(w_NxK, _per_tensor_mean(w_NxK, segments))
    return Quantized(straight_through(w_NxK * (1.0 / scale), signs), scale)


def quantize_matrix(kind: str, w_NxK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One tensor as its quantiser has it, to the bit, in little more memory than its float32.

    Args:
        kind: a key of `WEIGHT_QUANTIZERS`.
        w_NxK: of any float dtype.

    Returns:
        int8 codes `[N, K]` and a float32 scale `[]`.
    """
    w_NxK = np.asarray(w_NxK)
    values = _aligned(w_NxK.shape)
    values[...] = w_NxK
    mean = np.asarray(_whole_mean(values)) if kind == "binary" else None
    np.abs(values, out=values)
    scale = np.maximum(_whole_mean(values), np.float32(EPS))
    del values
    gc.collect(0)  # else JAX lets go of the values, which it shared, with the next matrix only
    inverse = np.float32(1) / scale
    codes = np.empty(w_NxK.shape, np.int8)
    for first in range(0, len(codes), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        part = w_NxK[rows].astype(np.float32)
        if mean is None:
            codes[rows] = np.clip(np.rint(part * inverse), -1, 1)
        else:
            codes[rows] = np.where(part > mean, 1, -1)
    return codes, scale


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """float32, not filled, where XLA needs no copy to use it."""
    count = math.prod(shape)
    raw = np.empty(4 * count + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + 4 * count].view(np.float32).reshape(shape)


def _whole_mean(values: np.ndarray) -> np.ndarray:
    """Of a tensor, float32 `[]`: summed by XLA in the order of the quantisers."""
    there = jax.device_put(values, jax.local_devices(backend="cpu")[0], may_alias=True)
    return np.asarray(_per_tensor_mean(there, ())).reshape(())


def _ternary_codes(scaled: jax.Array) -> jax.Array:
    return jnp.clip(jnp.round(scaled), -1, 1)


def _signs(w_NxK: jax.Array, mean: jax.Array) -> jax.Array:
    return jnp.where(w_NxK > mean, 1.0, -1.0)


def int8_per_token(x: jax.Array) -> Quantized:
    """Absmax int8 activations along the last axis: codes `[..., K]`, scale `[..., 1]`.

    A token that holds NaN or an infinity has a NaN scale. The gradient is straight-through.
    """
    x = x.astype(jnp.float32)
    absmax = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    absmax = jax.lax.stop_gradient(jnp.maximum(absmax, EPS))
    absmax = jnp.where(jnp.isfinite(absmax), absmax, jnp.nan)
    scaled = x * (127.0 / absmax)
    codes = straight_through(scaled, jnp.clip(jnp.round(scaled), -128, 127))
    return Quantized(codes, absmax * np.float32(1 / 127))


# The choices of `ModelConfig.weights` and `ModelConfig.activations`; "float" is no quantiser.
WEIGHT_QUANTIZERS: dict[str, Callable[[jax.Array, Segments], Quantized]] = {
    "ternary": ternary,
    "binary": binary,
}
ACTIVATION_QUANTIZERS: dict[str, Callable[[jax.Array], Quantized]] = {"int8": int8_per_token}


def require_finite(name: str, array: jax.Array | np.ndarray) -> None:
    """Refuse a concrete array that holds NaN or an infinity.

    Raises:
        ValueError: naming the array, how many of its values are not finite, and the first.
    """
    array = np.asarray(array)
    flat = array.reshape(-1)
    # Part by part, in the cache: a table of bfloat16 would take twice its size more as float32.
    parts = (flat[i : i + 2**18] for i in range(0, flat.size, 2**18))
    if not all(np.isfinite(part.astype(np.float32)).all() for part in parts):
        bad = ~np.isfinite(array.astype(np.float32))
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{name} holds {int(bad.sum())} values that are not finite, the first at index "
            f"{first}; weights must be finite to be quantised"
        )


def int8_per_row(table_VxD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Absmax int8 rows of an embedding or head: int8 codes in -127..127, float32 scales `[V]`."""
    table_VxD = np.asarray(table_VxD, np.float32)
    scale_V = np.maximum(np.abs(table_VxD).max(axis=1), EPS) / 127
    codes = np.rint(table_VxD / scale_V[:, None])
    return codes.astype(np.int8), scale_V.astype(np.float32)


def int4_grouped(table_VxD: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """4-bit rows of an embedding or head, with an integer multiplier for each group of columns.

        dequant(w)[v, d] = code[v, d] * multiplier[v, d // group] * scale[v]

    Of the multipliers near absmax / 7, each group takes the one of least squared error.

    Returns:
        int8 codes in -8..7 `[V, D]`, uint8 multipliers in 1..15 `[V, ceil(D/group)]`, float32
        scales `[V]`.
    """
    table_VxD = np.asarray(table_VxD, np.float32)
    V, D = table_VxD.shape
    w = np.pad(table_VxD, ((0, 0), (0, -D % group))).reshape(V, -1, group)
    step = np.abs(w).max(axis=2) / 7
    scale = np.maximum(step.max(axis=1), EPS) / 15
    nearest = np.rint(step / scale[:, None])
    best_error = np.full(step.shape, np.inf, np.float32)
    codes = np.zeros(w.shape, np.int8)
    multipliers = np.ones(step.shape, np.uint8)
    for candidate in (nearest - 2, nearest - 1, nearest, nearest + 1):
        m = np.clip(candidate, 1, 15)
        unit = (m * scale[:, None])[..., None]
        c = np.clip(np.rint(w / unit), -8, 7)
        error = np.square(c * unit - w).sum(axis=2)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        codes[better] = c[better]
        multipliers = np.where(better, m, multipliers).astype(np.uint8)
    return codes.reshape(V, -1)[:, :D], multipliers, scale.astype(np.float32)


def int4_dithered(
    table_VxD: np.ndarray, group: int, dither_D: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """4-bit rows by subtractive dither (Schuchman, 1964): `code - dither` stands for a weight.

        step[v, g] = multiplier[v, g] * scale[v]        code = round(w / step + dither[d])
        dequant(w)[v, d] = (code[v, d] - dither[d]) * step[v, d // group]

    The steps are large enough for every weight of their group to lie inside -8..7 steps, so nothing
    is clipped. With a dither drawn from [-1/2, 1/2) the errors of a row, `dequant(w) - w`, are then
    independent and uniform over one step around 0, whatever the weights.

    Args:
        table_VxD: finite.
        group: columns that share a multiplier.
        dither_D: float32 in [-1/2, 1/2), the same for all rows.

    Returns:
        As `int4_grouped`.
    """
    table_VxD = np.asarray(table_VxD, np.float64)
    V, D = table_VxD.shape
    w = np.pad(table_VxD, ((0, 0), (0, -D % group))).reshape(V, -1, group)
    # A little more than needed: rounding the scale to float32 puts no weight outside.
    step = np.maximum(w.max(axis=2) / 7, w.min(axis=2) / -8) * (1 + 2.0**-20)
    largest = np.maximum(step.max(axis=1), EPS)
    scale = np.nextafter((largest / 15).astype(np.float32), np.float32(np.inf))
    multipliers = np.maximum(np.ceil(step / scale[:, None]), 1)
    units = (w / (multipliers * scale[:, None])[..., None]).reshape(V, -1)[:, :D]
    codes = np.floor(units + (dither_D.astype(np.float64) + 0.5))
    return codes.astype(np.int8), multipliers.astype(np.uint8), scale


def _per_tensor_mean(x_NxK: jax.Array, segments: Segments) -> jax.Array:
    """The mean of each stacked tensor: `[1, 1]`, or `[N, 1]` with segments."""
    if not segments:
        return jnp.mean(x_NxK, keepdims=True)
    ends = np.cumsum(segments)
    means = [jnp.mean(x_NxK[end - n : end]) for n, end in zip(segments, ends, strict=True)]
    return jnp.concatenate([jnp.full((n, 1), m) for n, m in zip(segments, means, strict=True)])


def _absmean(w_NxK: jax.Array, segments: Segments) -> jax.Array:
    mean = _per_tensor_mean(jnp.abs(w_NxK), segments)
    return jax.lax.stop_gradient(jnp.maximum(mean, EPS))
