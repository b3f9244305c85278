"""Causal grouped-query attention with rotary positions, and its KV cache."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from bitjax.config import ModelConfig
from bitjax.model.layers import BitLinear, RMSNorm, rotary


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of one layer, `[B, G, S, h]` each; slot s holds the token at position s.

    Slots at or beyond a sequence's length may hold anything: attention at position p reads slots
    0..p only, and each position is written before it is read.
    """

    keys: jax.Array
    values: jax.Array

    @classmethod
    def empty(cls, batch: int, length: int, config: ModelConfig, dtype: jnp.dtype) -> KVCache:
        """A zeroed cache for `batch` sequences of up to `length` tokens."""
        shape = (batch, config.num_kv_heads, length, config.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def write(self, keys: jax.Array, values: jax.Array, positions_BxT: jax.Array) -> KVCache:
        """A cache with `[B, T, G, h]` keys and values stored at their positions."""
        rows_Bx1 = jnp.arange(positions_BxT.shape[0])[:, None]
        return KVCache(
            self.keys.at[rows_Bx1, :, positions_BxT].set(keys.astype(self.keys.dtype)),
            self.values.at[rows_Bx1, :, positions_BxT].set(values.astype(self.values.dtype)),
        )


class Attention(nnx.Module):
    """`x + o(sub_norm(attention(qkv(norm(x)))))`: grouped-query attention (arXiv 2305.13245)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        D, H, G, h = (
            config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim,
        )  # fmt: skip
        self.qkv = BitLinear(D, H * h, G * h, G * h, config=config, rngs=rngs)
        self.sub_norm = RMSNorm(H * h, config.norm_eps) if config.sub_norm else None
        self.o = BitLinear(H * h, D, config=config, rngs=rngs)
        self.config = config

    def __call__(
        self,
        x_BxTxD: jax.Array,
        norm: RMSNorm | None,
        positions_BxT: jax.Array,
        cache: KVCache | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Attend to positions up to each token's own.

        Args:
            x_BxTxD: inputs.
            norm: applied to the inputs first, but not to the residual.
            positions_BxT: int32, each token's position; without a cache they must be 0..T-1.
            cache: earlier keys and values; the new ones are written to it before attention.

        Returns:
            `[B, T, D]`, the residual included, and the updated cache (None without one).
        """
        config = self.config
        B, T, _ = x_BxTxD.shape
        H, G, h = config.num_heads, config.num_kv_heads, config.head_dim
        qkv_BxTxNxh = self.qkv(x_BxTxD, norm=norm).reshape(B, T, -1, h)
        turned = rotary(qkv_BxTxNxh[:, :, : H + G], positions_BxT, config.rope_theta)
        q, k, v = turned[:, :, :H], turned[:, :, H:], qkv_BxTxNxh[:, :, H + G :]
        if cache is None:
            k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
        else:
            cache = cache.write(k, v, positions_BxT)
            k, v = cache.keys.astype(q.dtype), cache.values.astype(q.dtype)
        mixed = _attend(q, k, v, positions_BxT)
        return self.o(mixed, norm=self.sub_norm, residual=x_BxTxD), cache


def _attend(
    q_BxTxHxh: jax.Array, k_BxGxSxh: jax.Array, v_BxGxSxh: jax.Array, positions_BxT: jax.Array
) -> jax.Array:
    """`softmax(q k^T / sqrt(h)) v` over key slots 0..position; returns `[B, T, H * h]`.

    Heads lead in every product, and the queries of a group are rows of one matrix: on CPU, XLA
    then makes plain matrix products of them (2.6 times as fast, with gradients, as heads last).
    """
    B, T, H, h = q_BxTxHxh.shape
    G, S = k_BxGxSxh.shape[1:3]
    q = (q_BxTxHxh * h**-0.5).transpose(0, 2, 1, 3).reshape(B, G, H // G * T, h)
    scores = jnp.einsum("BGQh,BGSh->BGQS", q, k_BxGxSxh, preferred_element_type=jnp.float32)
    visible_BxTxS = jnp.arange(S)[None, None, :] <= positions_BxT[:, :, None]
    scores = scores.reshape(B, H, T, S)
    weights = jax.nn.softmax(jnp.where(visible_BxTxS[:, None], scores, -jnp.inf), axis=-1)
    weights = weights.astype(v_BxGxSxh.dtype).reshape(B, G, H // G * T, S)
    mixed = jnp.einsum("BGQS,BGSh->BGQh", weights, v_BxGxSxh)
    return mixed.reshape(B, H, T, h).transpose(0, 2, 1, 3).reshape(B, T, H * h)
