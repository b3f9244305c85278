"""Activations: one scale for each token, and the Hadamard transform that may precede.

    int8   a = max(max|x|, 1e-5)    codes = clip(round(x * 127 / a), -128, 127)
                                    scale = a * (1/127)
    int4   b = max(mean|x|, 1e-5)   codes = clip(round(x * sqrt(7) / b), -8, 7)
                                    scale = b * (1/sqrt(7))

With a key, rounding is stochastic (`bitjax.quant.rounded`): unbiased but where codes are clipped.

Sources: int8, "The Era of 1-bit LLMs: Training Tips, Code and FAQ" (Microsoft, 2024), figure 4;
int4, BitNet a4.8 (arXiv 2411.04965), equation 7, and BitNet v2 (arXiv 2504.18415), equation 6, per
token; Hadamard, BitNet v2, equations 3 and 4. In both papers a small eps is added to the mean under
the root of 7 alone, so that codes and scale are not quite reciprocal; here, as for int8, 1e-5 is
the least mean and codes belong to their scale. Which layers have it: int4 of all linear layers, as
here, is BitNet v2's; BitNet a4.8 has int4 for q, k, v, gate and up alone, int8 for o and down, and
keeps of o's inputs the larger half, which is not here. Both papers train with int8 first and end
with 5 % of int4 steps (`train.start_from`).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from bitjax.quant.codes import EPS, Quantized, rounded, straight_through


def int8_per_token(x: jax.Array, key: jax.Array | None = None) -> Quantized:
    """Absmax int8 activations along the last axis: codes `[..., K]`, scale `[..., 1]`.

    A token that holds NaN or an infinity has a NaN scale. The gradient is straight-through. A key
    makes rounding stochastic.
    """
    x = x.astype(jnp.float32)
    absmax = _bounded(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    scaled = x * (127.0 / absmax)
    codes = straight_through(scaled, jnp.clip(rounded(scaled, key), -128, 127))
    return Quantized(codes, absmax * np.float32(1 / 127))


def int4_per_token(x: jax.Array, key: jax.Array | None = None) -> Quantized:
    """Absmean int4 activations along the last axis: codes `[..., K]` in -8..7, scale `[..., 1]`.

    Values beyond about 3 absmeans are clipped. A token that holds NaN or an infinity has a NaN
    scale. The gradient is straight-through, where clipped too. A key makes rounding stochastic.
    """
    x = x.astype(jnp.float32)
    absmean = _bounded(jnp.mean(jnp.abs(x), axis=-1, keepdims=True))
    scaled = x * (np.float32(np.sqrt(7)) / absmean)
    codes = straight_through(scaled, jnp.clip(rounded(scaled, key), -8, 7))
    return Quantized(codes, absmean * np.float32(1 / np.sqrt(7)))


def _bounded(size: jax.Array) -> jax.Array:
    size = jax.lax.stop_gradient(jnp.maximum(size, EPS))
    return jnp.where(jnp.isfinite(size), size, jnp.nan)


# The choices of `ModelConfig.activations`; "float" is no quantiser.
ACTIVATION_QUANTIZERS: dict[str, Callable[[jax.Array, jax.Array | None], Quantized]] = {
    "int8": int8_per_token,
    "int4": int4_per_token,
}


def hadamard_block(features: int) -> int:
    """The largest power of two that divides the number of features."""
    return features & -features


def hadamard(x: jax.Array) -> jax.Array:
    """The orthonormal Hadamard transform of the last axis, as x's shape and dtype.

        H_1 = 1      H_2n = [[H_n, H_n], [H_n, -H_n]] / sqrt(2)

    Of widths that are no power of two, each block of `hadamard_block` features is transformed by
    itself. It is its own inverse and its own transpose, so also its own gradient. Computed in
    float32 in log2(block) additions a value.
    """
    features = x.shape[-1]
    block = hadamard_block(features)
    y, half = x.astype(jnp.float32), 1
    while half < block:
        pairs = y.reshape(*x.shape[:-1], features // (2 * half), 2, half)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = jnp.stack([a + b, a - b], axis=-2)
        half *= 2
    return (y.reshape(x.shape) * np.float32(block**-0.5)).astype(x.dtype)
