"""Causal grouped-query attention with rotary positions, and its KV cache."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from bitjax import ops
from bitjax.config import ModelConfig
from bitjax.model.layers import BitLinear, RMSNorm, rotary_angles, rotary_frequencies
from bitjax.ops import reference
from bitjax.ops import rows as row_ops
from bitjax.ops.reference import KEY_BLOCK


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of one layer as `ops.cached_attention` takes them; slot s holds position s.

    Slots at or beyond a sequence's length may hold any finite number: attention at position p
    reads slots 0..p only, and each position is written before it is read.
    """

    keys: jax.Array
    values: jax.Array
    scales: jax.Array | None = None  # of an int8 cache

    @classmethod
    def empty(cls, batch: int, length: int, config: ModelConfig, dtype: jnp.dtype) -> KVCache:
        """A zeroed cache for `batch` sequences of up to `length` tokens: float or int8."""
        blocks = -(-length // KEY_BLOCK)
        heads, slots, h = (batch, config.num_kv_heads), blocks * KEY_BLOCK, config.head_dim
        if dtype == jnp.int8:
            return cls(
                jnp.zeros((*heads, blocks, h // 2, KEY_BLOCK, 2), dtype),
                jnp.zeros((*heads, slots // 2, h, 2), dtype),
                jnp.zeros((*heads, 2, slots), jnp.bfloat16),
            )
        return cls(
            jnp.zeros((*heads, blocks, h, KEY_BLOCK), dtype), jnp.zeros((*heads, slots, h), dtype)
        )

    @property
    def arrays(self) -> tuple[jax.Array, ...]:
        """Keys, values and, of an int8 cache, scales."""
        return (self.keys, self.values) + (() if self.scales is None else (self.scales,))


class Attention(nnx.Module):
    """`x + o(sub_norm(attention(qkv(norm(x)))))`: grouped-query attention (arXiv 2305.13245)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        D, H, G, h = (
            config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim,
        )  # fmt: skip
        self.qkv = BitLinear(D, H * h, G * h, G * h, config=config, rngs=rngs)
        self.sub_norm = RMSNorm(H * h, config.norm_eps) if config.sub_norm else None
        self.o = BitLinear(H * h, D, config=config, rngs=rngs, transform=True)
        self.config = config

    def __call__(
        self,
        x_BxTxD: jax.Array,
        norm: RMSNorm | None,
        positions_BxT: jax.Array,
        cache: KVCache | None = None,
        segments_BxT: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Attend to positions up to each token's own.

        Args:
            x_BxTxD: inputs.
            norm: applied to the inputs first, but not to the residual.
            positions_BxT: int32, each token's position; without a cache they must be 0..T-1.
            cache: earlier keys and values; the new ones are written to it before attention.
            segments_BxT: int32, without a cache: a token attends to its own segment only.

        Returns:
            `[B, T, D]`, the residual included, and the updated cache (None without one).
        """
        config = self.config
        B, T, _ = x_BxTxD.shape
        H, G, h = config.num_heads, config.num_kv_heads, config.head_dim
        qkv_BxTxNxh = self.qkv(x_BxTxD, norm=norm).reshape(B, T, -1, h)
        frequencies = rotary_frequencies(h, config.rope_theta, config.rope_scaling)
        turn_BxTxh = rotary_angles(positions_BxT, frequencies)
        if cache is None:
            turned = reference.rotate(qkv_BxTxNxh[:, :, : H + G], turn_BxTxh)
            q, k = jnp.split(turned.astype(qkv_BxTxNxh.dtype), [H], axis=2)
            k, v = k.transpose(0, 2, 1, 3), qkv_BxTxNxh[:, :, H + G :].transpose(0, 2, 1, 3)
            mixed = reference.attend(q, k, v, positions_BxT, segments_BxT)
        else:
            mixed, *arrays = ops.cached_attention(
                qkv_BxTxNxh, turn_BxTxh, positions_BxT, *cache.arrays,
                impl=self.o.impl if ops.attention_fits(h) else "reference",
            )  # fmt: skip
            cache = KVCache(*arrays)
        return self.o(mixed, norm=self.sub_norm, residual=x_BxTxD), cache

    def of_rows(
        self, x_RxD: jax.Array, norm: RMSNorm | None, rows: row_ops.Rows, pages: KVCache
    ) -> tuple[jax.Array, KVCache]:
        """The same for new tokens of several sequences over a cache of pages (`bitjax.ops.rows`).

        Args:
            x_RxD: inputs.
            norm: as above.
            rows: which tokens they are.
            pages: `KVCache.empty` of as many sequences of 64 slots as there are pages.

        Returns:
            `[R, D]`, the residual included, and the updated pages.
        """
        h = self.config.head_dim
        qkv_RxNxh = self.qkv(x_RxD, norm=norm, rows=rows.count_1).reshape(len(x_RxD), -1, h)
        mixed, *arrays = row_ops.paged_attention(
            qkv_RxNxh, rows, *pages.arrays,
            impl=self.o.impl if ops.attention_fits(h) else "reference",
        )  # fmt: skip
        added = self.o(mixed, norm=self.sub_norm, residual=x_RxD, rows=rows.count_1)
        return added, KVCache(*arrays)
