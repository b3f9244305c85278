"""Building blocks: BitLinear, RMSNorm, rotary embedding and the gated FFN.

BitLinear is where the two worlds meet. Its `weight` holds either a float master weight, which is
fake-quantised on every call with straight-through gradients, or a `PackedTernary`, which goes to
the packed product. The type of the parameter decides; there is no mode.

Both compute `y = (codes_x @ codes_w.T) * (scale_x * scale_w)`: integer-valued codes, an exact sum,
then one scaling in the same association. So a trained layer and its packed form agree to the bit
in float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from bitjax import ops
from bitjax.config import ModelConfig
from bitjax.ops import reference
from bitjax.packing import PackedTernary
from bitjax.quant import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * scale`, computed in float32 (arXiv 1910.07467)."""

    def __init__(self, features: int, eps: float) -> None:
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise the last axis; returns x's shape and dtype."""
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
        scale = self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,))
        return (x32 * jax.lax.rsqrt(mean_square + self.eps) * scale).astype(x.dtype)


class BitLinear(nnx.Module):
    """A linear layer with quantised weights and activations, and no bias.

    `config.weights` and `config.activations` choose the quantisers; with both "float" it is a
    plain linear layer. With `config.inner_norm` an RMSNorm precedes the quantisation (2024 listing
    of "The Era of 1-bit LLMs: Training Tips, Code and FAQ", figure 3).
    """

    def __init__(
        self, in_features: int, out_features: int, config: ModelConfig, *, rngs: nnx.Rngs
    ) -> None:
        self.weight: nnx.Param = nnx.Param(
            config.init_std * jax.random.normal(rngs.params(), (out_features, in_features))
        )
        self.norm = RMSNorm(in_features, config.norm_eps) if config.inner_norm else None
        self.weights = config.weights
        self.activations = config.activations
        self.impl: ops.Impl = "auto"

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[..., K]` to `[..., N]`, in x's dtype."""
        if self.norm is not None:
            x = self.norm(x)
        weight = self.weight.get_value()
        if not isinstance(weight, PackedTernary):
            return self._fake_quantized(x, weight)
        if self.activations == "float":
            return reference.dequantized_matmul(x, weight)
        return ops.ternary_matmul(x, weight, self.impl)

    def _fake_quantized(self, x: jax.Array, w_NxK: jax.Array) -> jax.Array:
        dtype, shape, scale = x.dtype, x.shape, None
        x = x.reshape(-1, shape[-1])  # one matrix product: XLA transposes less on CPU
        if self.activations != "float":
            x, scale = ACTIVATION_QUANTIZERS[self.activations](x)
        if self.weights != "float":
            w_NxK, w_scale = WEIGHT_QUANTIZERS[self.weights](w_NxK)
            scale = w_scale if scale is None else scale * w_scale
        # Codes are exact in bfloat16 too (integers up to 256), and their sums in float32.
        y = jax.lax.dot_general(
            x.astype(dtype), w_NxK.astype(dtype), (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        # Backward, keeps XLA from fusing what precedes into a strided transposition.
        y = jax.lax.optimization_barrier(y)
        y = (y if scale is None else y * scale).astype(dtype)
        return y.reshape(*shape[:-1], -1)


def rotary(x_BxTxNxh: jax.Array, positions_BxT: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding, half-split form (arXiv 2104.09864; `rotate_half`).

    Pairs element i with element i + h/2 and turns the pair by `position * theta^(-2i/h)`.
    """
    half = x_BxTxNxh.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles_BxTx1xf = (
        positions_BxT[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    )
    cos, sin = jnp.cos(angles_BxTx1xf), jnp.sin(angles_BxTx1xf)
    first, second = jnp.split(x_BxTxNxh.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BxTxNxh.dtype)


class FeedForward(nnx.Module):
    """`down(sub_norm(act(gate(x)) * up(x)))`, act = SiLU or ReLU^2 (arXiv 2002.05202, 2109.08668).

    ReLU^2 overflows float16: run in bfloat16 or float32.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        D, F = config.hidden_size, config.intermediate_size
        self.gate = BitLinear(D, F, config, rngs=rngs)
        self.up = BitLinear(D, F, config, rngs=rngs)
        self.sub_norm = RMSNorm(F, config.norm_eps) if config.sub_norm else None
        self.down = BitLinear(F, D, config, rngs=rngs)
        self.activation = config.activation

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """Returns `[B, T, D]`."""
        gate = self.gate(x_BxTxD)
        gate = jax.nn.silu(gate) if self.activation == "silu" else jnp.square(jax.nn.relu(gate))
        hidden_BxTxF = gate * self.up(x_BxTxD)
        if self.sub_norm is not None:
            hidden_BxTxF = self.sub_norm(hidden_BxTxF)
        return self.down(hidden_BxTxF)
