"""Pure JAX twins of the custom calls: any backend, any shape, no extension needed.

They read like the mathematics and define what every kernel must compute:

    q, s_x = int8_per_token(x)                  (bitjax.quant)
    acc[n] = sum_k q[k] * w[n, k]               an exact integer
    y[n]   = float32(acc[n]) * (s_x * s_w)      in this association, then cast to x's dtype
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bitjax.packing import PackedTernary, unpack
from bitjax.quant import EXACT_FLOAT32_TERMS, int8_per_token


def ternary_matmul(x: jax.Array, weights: PackedTernary) -> jax.Array:
    """`int8(x) @ weights.T`, rescaled.

    Args:
        x: float `[..., K]`.
        weights: N x K.

    Returns:
        `[..., N]` in x's dtype. A token with NaN or an infinity gives NaN.
    """
    q, x_scale = int8_per_token(x)
    if weights.cols <= EXACT_FLOAT32_TERMS:  # float32 sums are exact, and XLA's fastest product
        acc = _product(q, unpack(weights).astype(jnp.float32), jnp.float32)
    else:
        acc = ternary_matmul_i32(q.astype(jnp.int8), weights).astype(jnp.float32)
    return (acc * (x_scale * weights.scale)).astype(x.dtype)


def ternary_matmul_i32(q: jax.Array, weights: PackedTernary) -> jax.Array:
    """The integer product alone: int8 `[..., K]` and N x K weights to int32 `[..., N]`."""
    return _product(q, unpack(weights), jnp.int32)


def dequantized_matmul(x: jax.Array, weights: PackedTernary) -> jax.Array:
    """`x @ (codes * scale).T` with x not quantised: ternary weights under float activations."""
    acc = _product(x, unpack(weights).astype(x.dtype), jnp.float32)
    return (acc * weights.scale).astype(x.dtype)


def _product(x: jax.Array, w_NxK: jax.Array, accumulator: type) -> jax.Array:
    """`x @ w.T` over the last axes, summed in `accumulator`, full precision on every backend."""
    return jax.lax.dot_general(
        x, w_NxK, (((x.ndim - 1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST, preferred_element_type=accumulator,
    )  # fmt: skip
