"""Pure JAX twins of the custom calls: any backend, any shape, no extension needed.

They read like the mathematics and define what every kernel must compute.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from bitjax.packing import PackedWeights, unpack
from bitjax.quant import EXACT_FLOAT32_TERMS, int8_per_token

Gate = Literal["none", "relu2", "silu"]


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
    """`x @ (w * scale).T` with x not quantised: packed weights under float activations."""
    acc = _product(x, unpack(weights).astype(x.dtype), jnp.float32)
    return (acc * weights.scale.reshape((1,) * (acc.ndim - 1) + (-1,))).astype(x.dtype)


def _product(x: jax.Array, w_NxK: jax.Array, accumulator: type) -> jax.Array:
    """`x @ w.T` over the last axes, summed in `accumulator`, full precision on every backend."""
    return jax.lax.dot_general(
        x, w_NxK, (((x.ndim - 1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST, preferred_element_type=accumulator,
    )  # fmt: skip
