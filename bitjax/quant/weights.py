"""Weights: ternary and binary codes, with a scale for a tensor, a row or a group of columns.

    ternary          m = max(mean|W|, 1e-5)    codes = clip(round(W / m), -1, 1)      scale = m
    ternary_median   m = max(median|W|, 1e-5)  codes and scale likewise
    ternary_learned  s, a parameter            codes = clip(round(W / s), -1, 1)      scale = s
    binary           m = max(mean|W|, 1e-5)    codes = +1 if W > mean(W) else -1      scale = m

Means and medians are over what shares a scale (`Sharing`). Gradients are straight-through; those of
`ternary_learned` are said there.

With a key, rounding is stochastic (`bitjax.quant.rounded`), and the means of the codes are

    ternary          E codes = clip(W / m, -1, 1)
    binary           E codes = clip((W - mean(W)) / m, -1, 1), as +1 has the probability
                     clip(((W - mean(W)) / m + 1) / 2, 0, 1)

so within +-m weights are unbiased. No packed form has such codes: they are for training.

Sources: ternary, "The Era of 1-bit LLMs: Training Tips, Code and FAQ" (Microsoft, 2024), figure 3;
median, "BitNet b1.58 Reloaded" (arXiv 2407.09527); learned, "Learned Step Size Quantization" (arXiv
1902.08153); binary, BitNet (arXiv 2310.11453), equations 1 to 3; its drawn form, BinaryConnect
(arXiv 1511.00363), equation 2, around BitNet's mean.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from bitjax.quant.codes import EPS, Quantized, rounded, straight_through

ALIGNMENT = 64  # bytes; what XLA on CPU asks of a buffer that it shall use without a copy
ROWS_AT_ONCE = 1024  # of a matrix that is quantised in parts: a few megabytes of temporary values

Segments = tuple[int, ...]  # rows of each of several tensors stacked as one matrix
Statistic = Callable[..., jax.Array]  # jnp.mean or jnp.median


class Sharing(NamedTuple):
    """Which weights share a scale: a stacked tensor, a row, or `group` columns of a row."""

    per: Literal["tensor", "row", "group"] = "tensor"
    group: int = 0  # columns; divides the matrix's


PER_TENSOR = Sharing()


class WeightQuantizer(Protocol):
    """The signature of every weight quantiser.

    Args:
        w_NxK: one tensor, or several stacked.
        segments: rows of each stacked tensor; empty for one tensor.
        sharing: which weights share a scale.
        scale: of `ternary_learned`, as `initial_scale` has it; others take none.
        key: for stochastic rounding; None rounds to nearest.

    Returns:
        Scale `[1, 1]`; `[N, 1]` with segments or one a row; `[N, K]` with groups.
    """

    def __call__(
        self, w_NxK: jax.Array, segments: Segments = (), sharing: Sharing = PER_TENSOR,
        scale: jax.Array | None = None, key: jax.Array | None = None,
    ) -> Quantized: ...  # fmt: skip


def ternary(
    w_NxK: jax.Array,
    segments: Segments = (),
    sharing: Sharing = PER_TENSOR,
    scale: jax.Array | None = None,
    key: jax.Array | None = None,
) -> Quantized:
    """Absmean ternary weights: codes in {-1, 0, 1}; the gradient is straight-through."""
    return _ternary(w_NxK, _size(jnp.mean, w_NxK, segments, sharing), key)


def ternary_median(
    w_NxK: jax.Array,
    segments: Segments = (),
    sharing: Sharing = PER_TENSOR,
    scale: jax.Array | None = None,
    key: jax.Array | None = None,
) -> Quantized:
    """Absmedian ternary weights, whose scale outliers hardly move; straight-through gradient."""
    return _ternary(w_NxK, _size(jnp.median, w_NxK, segments, sharing), key)


def ternary_learned(
    w_NxK: jax.Array,
    segments: Segments = (),
    sharing: Sharing = PER_TENSOR,
    scale: jax.Array | None = None,
    key: jax.Array | None = None,
) -> Quantized:
    """Ternary weights with a learned step size s (LSQ, arXiv 1902.08153, equation 3, section 2.2).

        d dequant / d W = 1 where |W| < s, else 0
        d dequant / d s = g * (codes - W / s where |W| < s, else codes)      g = 1 / sqrt(n)

    n weights share the scale; the largest code is 1. A step below 1e-5 is taken as 1e-5.

    Args:
        w_NxK, segments, sharing, key: as `WeightQuantizer` says.
        scale: s, of `initial_scale`'s shape; without it, that.
    """
    w = w_NxK.astype(jnp.float32)
    s = initial_scale(w, segments, sharing) if scale is None else scale
    s = straight_through(s, jnp.maximum(s, EPS))
    rows = np.asarray(segments or (len(w),))
    if sharing.per == "tensor":
        g = (1 / np.sqrt(rows * w.shape[1])).astype(np.float32)
        s = _scaled_gradient(s, jnp.asarray(g))
        s = jnp.repeat(s, rows, total_repeat_length=len(w))[:, None] if segments else s[:, None]
    elif sharing.per == "row":
        s = _scaled_gradient(s, jnp.float32(w.shape[1] ** -0.5))[:, None]
    else:
        s = _scaled_gradient(s, jnp.float32(sharing.group**-0.5))
        s = jnp.repeat(s, sharing.group, axis=1)
    scaled = w * (1.0 / s)
    inside = jnp.where(jnp.abs(scaled) < 1, scaled, jax.lax.stop_gradient(jnp.sign(scaled)))
    return Quantized(straight_through(inside, _ternary_codes(scaled, key)), s)


def initial_scale(w_NxK: jax.Array, segments: Segments, sharing: Sharing) -> jax.Array:
    """Where a learned scale starts: the absmeans `[tensors]`, `[N]` or `[N, K / group]`."""
    w = w_NxK.astype(jnp.float32)
    if sharing.per == "tensor":
        ends = np.cumsum(segments or (len(w),))
        starts = (0, *ends[:-1])
        means = [jnp.mean(jnp.abs(w[a:b])) for a, b in zip(starts, ends, strict=True)]
        return jnp.maximum(jnp.stack(means), EPS)
    parts = w if sharing.per == "row" else w.reshape(len(w), -1, sharing.group)
    return jnp.maximum(jnp.mean(jnp.abs(parts), axis=-1), EPS)


def binary(
    w_NxK: jax.Array,
    segments: Segments = (),
    sharing: Sharing = PER_TENSOR,
    scale: jax.Array | None = None,
    key: jax.Array | None = None,
) -> Quantized:
    """Binary weights of BitNet b1: codes in {-1, 1}; the gradient is straight-through.

    Sign(0) is -1, as in the paper.
    """
    w = w_NxK.astype(jnp.float32)
    size = _size(jnp.mean, w, segments, sharing)
    mean = _shared(jnp.mean, w, segments, sharing)
    if key is None:
        signs = jnp.where(w > mean, 1.0, -1.0)
    else:
        # In units of the distance from -1 to +1, so that the draw is between these two.
        signs = 2 * jnp.clip(rounded(((w - mean) * (1.0 / size) + 1) / 2, key), 0, 1) - 1
    return Quantized(straight_through(w * (1.0 / size), signs), size)


# The choices of `ModelConfig.weights`; "float" is no quantiser.
WEIGHT_QUANTIZERS: dict[str, WeightQuantizer] = {
    "ternary": ternary,
    "ternary_median": ternary_median,
    "ternary_learned": ternary_learned,
    "binary": binary,
}


def quantize_matrix(
    kind: str, w_NxK: np.ndarray, per: Literal["tensor", "row", "group"] = "tensor"
) -> tuple[np.ndarray, np.ndarray]:
    """One tensor as its quantiser has it, to the bit, in little more memory than its float32.

    Args:
        kind: a key of `WEIGHT_QUANTIZERS`; a learned scale is where it starts.
        w_NxK: of any float dtype.
        per: what has a scale of its own.

    Returns:
        int8 codes `[N, K]` and a float32 scale `[]`, or `[N]`.

    Raises:
        ValueError: scales for groups.
    """
    if per == "group":
        raise ValueError("codes with scales for groups of columns have no form outside training")
    w_NxK = np.asarray(w_NxK)
    scale, mean = _statistics(kind, w_NxK, Sharing(per))
    inverse = np.float32(1) / scale
    codes = np.empty(w_NxK.shape, np.int8)
    for first in range(0, len(codes), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        part, of = w_NxK[rows].astype(np.float32), (rows if per == "row" else slice(None))
        if mean is None:
            codes[rows] = np.clip(np.rint(part * inverse[of]), -1, 1)
        else:
            codes[rows] = np.where(part > mean[of], 1, -1)
    return codes, scale.reshape(() if per == "tensor" else (-1,))


def _statistics(
    kind: str, w_NxK: np.ndarray, sharing: Sharing
) -> tuple[np.ndarray, np.ndarray | None]:
    """Scales and, of binary weights, means: float32 `[1, 1]` or `[N, 1]`, summed by XLA in the
    order of the quantisers, from one float32 copy that XLA shares."""
    values = _aligned(w_NxK.shape)
    values[...] = w_NxK
    mean = None
    if kind == "binary":
        mean = np.asarray(_shared(jnp.mean, _shared_with_xla(values), (), sharing))
    np.abs(values, out=values)
    statistic = jnp.median if kind == "ternary_median" else jnp.mean
    size = np.asarray(_shared(statistic, _shared_with_xla(values), (), sharing))
    del values
    gc.collect(0)  # else JAX lets go of the values, which it shared, with the next matrix only
    return np.maximum(size, np.float32(EPS)), mean


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """float32, not filled, where XLA needs no copy to use it."""
    count = math.prod(shape)
    raw = np.empty(4 * count + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + 4 * count].view(np.float32).reshape(shape)


def _shared_with_xla(values: np.ndarray) -> jax.Array:
    return jax.device_put(values, jax.local_devices(backend="cpu")[0], may_alias=True)


def _ternary(w_NxK: jax.Array, scale: jax.Array, key: jax.Array | None) -> Quantized:
    scaled = w_NxK.astype(jnp.float32) * (1.0 / scale)
    return Quantized(straight_through(scaled, _ternary_codes(scaled, key)), scale)


def _ternary_codes(scaled: jax.Array, key: jax.Array | None) -> jax.Array:
    return jnp.clip(rounded(scaled, key), -1, 1)


def _scaled_gradient(value: jax.Array, factor: jax.Array) -> jax.Array:
    """`value`, whose gradient is multiplied by `factor`."""
    return straight_through(value * factor, value)


def _size(
    statistic: Statistic, w_NxK: jax.Array, segments: Segments, sharing: Sharing
) -> jax.Array:
    size = _shared(statistic, jnp.abs(w_NxK.astype(jnp.float32)), segments, sharing)
    return jax.lax.stop_gradient(jnp.maximum(size, EPS))


def _shared(
    statistic: Statistic, x_NxK: jax.Array, segments: Segments, sharing: Sharing
) -> jax.Array:
    """The mean or median of what shares a scale: `[1, 1]`, `[N, 1]` or `[N, K]`."""
    if sharing.per == "row":
        return statistic(x_NxK, axis=1, keepdims=True)
    if sharing.per == "group":
        groups = x_NxK.reshape(len(x_NxK), -1, sharing.group)
        return jnp.repeat(statistic(groups, axis=2), sharing.group, axis=1)
    if not segments:
        return statistic(x_NxK, keepdims=True)
    ends = np.cumsum(segments)
    each = [statistic(x_NxK[end - n : end]) for n, end in zip(segments, ends, strict=True)]
    return jnp.concatenate([jnp.full((n, 1), m) for n, m in zip(segments, each, strict=True)])
