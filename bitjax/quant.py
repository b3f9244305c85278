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

Deliberately absent: NaN and infinity are not replaced. They make the scale NaN, so they surface
in the output; `require_finite` refuses them where weights enter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Smallest absmean or absmax: keeps an all-zero tensor's scale finite and its codes zero.
EPS = 1e-5
# Largest number of int8 x {-1,0,1} products whose float32 sum is exact: 2**24 / 128.
EXACT_FLOAT32_TERMS = 2**24 // 128


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


def ternary(w_NxK: jax.Array) -> Quantized:
    """Absmean ternary weights: codes in {-1, 0, 1}, one scale `[1, 1]` per tensor.

    The gradient of `dequantize()` with respect to `w_NxK` is the identity (straight-through).
    """
    w_NxK = w_NxK.astype(jnp.float32)
    scale = _absmean(w_NxK)
    scaled = w_NxK * (1.0 / scale)
    return Quantized(straight_through(scaled, jnp.clip(jnp.round(scaled), -1, 1)), scale)


def binary(w_NxK: jax.Array) -> Quantized:
    """Binary weights of BitNet b1: codes in {-1, 1}, one scale `[1, 1]` per tensor.

    Sign(0) is -1, as in the paper. The gradient is straight-through.
    """
    w_NxK = w_NxK.astype(jnp.float32)
    scale = _absmean(w_NxK)
    signs = jnp.where(w_NxK > jnp.mean(w_NxK), 1.0, -1.0)
    return Quantized(straight_through(w_NxK * (1.0 / scale), signs), scale)


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
WEIGHT_QUANTIZERS: dict[str, Callable[[jax.Array], Quantized]] = {
    "ternary": ternary,
    "binary": binary,
}
ACTIVATION_QUANTIZERS: dict[str, Callable[[jax.Array], Quantized]] = {"int8": int8_per_token}


def require_finite(name: str, array: jax.Array | np.ndarray) -> None:
    """Refuse a concrete array that holds NaN or an infinity.

    Raises:
        ValueError: naming the array, how many of its values are not finite, and the first.
    """
    bad = ~np.isfinite(np.asarray(array, dtype=np.float32))
    if bad.any():
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{name} holds {int(bad.sum())} values that are not finite, the first at index "
            f"{first}; weights must be finite to be quantised"
        )


def _absmean(w_NxK: jax.Array) -> jax.Array:
    mean = jnp.mean(jnp.abs(w_NxK), keepdims=True)
    return jax.lax.stop_gradient(jnp.maximum(mean, EPS))
