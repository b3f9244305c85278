"""The decoder-only Transformer of BitNet b1.58 and its full-precision twin.

One definition serves training, evaluation and packed inference: what its BitLinear layers hold
decides (see `bitjax.model.layers`). Embedding, norms and head are trained in full precision; for
inference embedding and head may be packed too, or a bfloat16 head screened: then `logits` is the
whole product and `next_logits`, for generation, exact where it matters.

Layers are unrolled rather than scanned: a scan over stacked packed weights would copy them at
every step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from fnmatch import fnmatchcase
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bitjax import ops
from bitjax.config import CacheDType, ModelConfig
from bitjax.model.attention import Attention, KVCache
from bitjax.model.layers import BitLinear, FeedForward, RMSNorm
from bitjax.ops import rows as row_ops
from bitjax.ops.rows import Rows
from bitjax.packing import PackedWeights, Screen, packed_rows
from bitjax.tokenizer import BYTES, Tokenizer

Cache = tuple[KVCache, ...]  # one per layer


class Block(nnx.Module):
    """`x + attention(norm(x))`, then `x + ffn(norm(x))`; no pre-norms with `inner_norm`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        def pre_norm() -> RMSNorm | None:
            return None if config.inner_norm else RMSNorm(config.hidden_size, config.norm_eps)

        self.attention_norm = pre_norm()
        self.attention = Attention(config, rngs=rngs)
        self.ffn_norm = pre_norm()
        self.ffn = FeedForward(config, rngs=rngs)

    def __call__(
        self,
        x_BxTxD: jax.Array,
        positions_BxT: jax.Array,
        cache: KVCache | None,
        segments_BxT: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Returns `[B, T, D]` and the updated cache."""
        x_BxTxD, cache = self.attention(
            x_BxTxD, self.attention_norm, positions_BxT, cache, segments_BxT
        )
        return self.ffn(x_BxTxD, self.ffn_norm), cache

    def of_rows(self, x_RxD: jax.Array, rows: Rows, pages: KVCache) -> tuple[jax.Array, KVCache]:
        """Returns `[R, D]` and the updated pages; see `Attention.of_rows`."""
        x_RxD, pages = self.attention.of_rows(x_RxD, self.attention_norm, rows, pages)
        return self.ffn(x_RxD, self.ffn_norm, rows.count_1), pages


class Transformer(nnx.Module):
    """A language model over `config.vocab_size` tokens.

    Args:
        config: the shape and number formats.
        rngs: source of the initial weights (stream "params").
        dtype: of activations, float32 or bfloat16; master weights are float32.

    Raises:
        ValueError: a pattern of `config.float_layers` that matches no linear layer.
    """

    def __init__(
        self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: str | jnp.dtype = "float32"
    ) -> None:
        def table() -> jax.Array:
            shape = (config.vocab_size, config.hidden_size)
            return config.init_std * jax.random.normal(rngs.params(), shape)

        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.tokenizer: Tokenizer = BYTES  # of its tokens; the model itself needs none
        self.impl: ops.Impl = "auto"  # of a packed head's product
        self.remat = False  # backwards, blocks are computed again: memory for a third more work
        self.embedding = nnx.Param(table())
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = None if config.tie_embeddings else nnx.Param(table())
        self.screen: nnx.Param | None = nnx.data(None)  # of the head: a `Screen`
        _keep_float(self)

    def __call__(self, tokens_BxT: jax.Array, segments_BxT: jax.Array | None = None) -> jax.Array:
        """Float32 logits `[B, T, V]` of the token after each position, without a cache.

        With segments (int32, the document of each token) a token sees its own document only;
        rotary positions, which attention takes differences of, count on.
        """
        positions_BxT = jnp.broadcast_to(jnp.arange(tokens_BxT.shape[1]), tokens_BxT.shape)
        hidden_BxTxD, _ = self.extend(tokens_BxT, positions_BxT, None, segments_BxT)
        return self.logits(hidden_BxTxD)

    def extend(
        self,
        tokens_BxT: jax.Array,
        positions_BxT: jax.Array,
        cache: Cache | None,
        segments_BxT: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Run tokens at the given positions, reading and extending the cache.

        Segments, see `__call__`, are for running without one.

        Returns:
            Final normed hidden states `[B, T, D]` and the updated cache.

        Raises:
            ValueError: tokens that are not int32 `[B, T]`, or positions of another shape.
        """
        if tokens_BxT.ndim != 2 or not jnp.issubdtype(tokens_BxT.dtype, jnp.integer):
            raise ValueError(
                f"tokens must be integers [B, T]; got {tokens_BxT.dtype}{list(tokens_BxT.shape)}"
            )
        if positions_BxT.shape != tokens_BxT.shape:
            raise ValueError(
                f"positions have shape {positions_BxT.shape}; tokens have {tokens_BxT.shape}"
            )
        x_BxTxD = _look_up(self.embedding.get_value(), tokens_BxT).astype(self.dtype)
        updated: list[KVCache] = []
        for i, block in enumerate(self.blocks):
            if cache is None and self.remat:
                x_BxTxD = _rematerialized(block, x_BxTxD, positions_BxT, segments_BxT)
            elif cache is None:
                x_BxTxD, _ = block(x_BxTxD, positions_BxT, None, segments_BxT)
            else:
                x_BxTxD, layer_cache = _cached(*nnx.split(block), x_BxTxD, positions_BxT, cache[i])
                updated.append(layer_cache)
        return self.norm(x_BxTxD), None if cache is None else tuple(updated)

    def extend_rows(self, tokens_R: jax.Array, rows: Rows, pages: Cache) -> tuple[jax.Array, Cache]:
        """Run new tokens of several sequences, reading and extending pages.

        A row's result is the same to the bit whatever the others are (`bitjax.ops.rows`).

        Returns:
            Final normed hidden states `[R, D]` and the updated pages.
        """
        x_RxD = _look_up(self.embedding.get_value(), tokens_R).astype(self.dtype)
        updated: list[KVCache] = []
        for block, layer in zip(self.blocks, pages, strict=True):
            x_RxD, layer = _paged(*nnx.split(block), x_RxD, rows, layer)
            updated.append(layer)
        normed_RxD = row_ops.prepare(
            x_RxD, rows.count_1, norm=self.norm.scale[...], eps=self.norm.eps, impl=self.impl
        )
        return normed_RxD, tuple(updated)

    def logits_of_rows(
        self, hidden_RxD: jax.Array, ranks_R: jax.Array, count_1: jax.Array
    ) -> jax.Array:
        """`next_logits`, each row as if it were alone; of the first `count` rows.

        Args:
            hidden_RxD: final hidden states.
            ranks_R: int32, how many of the largest logits shall be exact.
            count_1: int32 `[1]`.
        """
        table_VxD = (self.embedding if self.head is None else self.head).get_value()
        if self.screen is not None:
            screen: Screen = self.screen.get_value()
            return ops.screened_logits(
                hidden_RxD, table_VxD, screen, ranks_R, impl=self.impl, rows=count_1
            )[0]
        if isinstance(table_VxD, PackedWeights):
            wide_RxD = hidden_RxD.astype(jnp.float32)
            return ops.packed_matmul(wide_RxD, table_VxD, rows=count_1, impl=self.impl)
        return row_ops.float_matmul(hidden_RxD, table_VxD, count_1, self.impl)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Float32 `[..., V]` from final hidden states `[..., D]`."""
        table_VxD = (self.embedding if self.head is None else self.head).get_value()
        if isinstance(table_VxD, PackedWeights):
            return ops.packed_matmul(hidden.astype(jnp.float32), table_VxD, impl=self.impl)
        return jax.lax.dot_general(
            hidden, table_VxD.astype(self.dtype), (((hidden.ndim - 1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )  # fmt: skip

    def next_logits(self, hidden: jax.Array, ranks: jax.Array) -> jax.Array:
        """`logits` of which only the largest need be exact: all of them without a screen.

        Args:
            hidden: final hidden states `[..., D]`.
            ranks: int32 `[...]`, how many of the largest shall be exact.
        """
        if self.screen is None:
            return self.logits(hidden)
        table_VxD = (self.embedding if self.head is None else self.head).get_value()
        screen: Screen = self.screen.get_value()
        return ops.screened_logits(hidden, table_VxD, screen, ranks, impl=self.impl)[0]

    def empty_cache(self, batch: int, length: int, dtype: CacheDType | None = None) -> Cache:
        """A KV cache for `batch` sequences of up to `length` tokens, by default in its dtype."""
        return tuple(
            KVCache.empty(batch, length, self.config, jnp.dtype(dtype or self.dtype))
            for _ in range(self.config.num_layers)
        )


@functools.partial(jax.jit, static_argnums=0)
def _cached(
    graph: Any, params: Any, x_BxTxD: jax.Array, positions_BxT: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    """A block with a cache: traced and lowered once for all that are alike; XLA inlines it."""
    return nnx.merge(graph, params)(x_BxTxD, positions_BxT, cache)


@functools.partial(jax.jit, static_argnums=0)
def _paged(
    graph: Any, params: Any, x_RxD: jax.Array, rows: Rows, pages: KVCache
) -> tuple[jax.Array, KVCache]:
    """A block with pages, likewise."""
    return nnx.merge(graph, params).of_rows(x_RxD, rows, pages)


def _rematerialized(
    block: Block, x_BxTxD: jax.Array, positions_BxT: jax.Array, segments_BxT: jax.Array | None
) -> jax.Array:
    """A block of which only the input is kept for the backward pass (arXiv 1604.06174)."""
    graph, params = nnx.split(block)

    @jax.checkpoint
    def run(params: nnx.State, x_BxTxD: jax.Array) -> jax.Array:
        return nnx.merge(graph, params)(x_BxTxD, positions_BxT, None, segments_BxT)[0]

    return run(params, x_BxTxD)


def _look_up(table: jax.Array | PackedWeights, tokens: jax.Array) -> jax.Array:
    if isinstance(table, PackedWeights):
        return packed_rows(table, tokens)
    return table[tokens]


def bit_linears(model: Transformer) -> Iterator[tuple[str, BitLinear]]:
    """Every BitLinear with its dotted path, in a fixed order: `blocks.0.attention.qkv`, ..."""
    for i, block in enumerate(model.blocks):
        for part, names in (("attention", ("qkv", "o")), ("ffn", ("gate_up", "down"))):
            for name in names:
                yield f"blocks.{i}.{part}.{name}", getattr(getattr(block, part), name)


def layers_matching(model: Transformer, pattern: str) -> list[str]:
    """Names of the linear layers that a shell pattern matches, e.g. "*.ffn.down".

    Raises:
        ValueError: there is none.
    """
    names = [name for name, _ in bit_linears(model)]
    matched = [name for name in names if fnmatchcase(name, pattern)]
    if not matched:
        raise ValueError(f"no linear layer matches {pattern!r}; they are {', '.join(names[:4])}, "
                         "...")  # fmt: skip
    return matched


def _keep_float(model: Transformer) -> None:
    """Take the quantisers, and norms of their own, from what `config.float_layers` names."""
    layers = dict(bit_linears(model))
    for pattern in model.config.float_layers:
        for name in layers_matching(model, pattern):
            layers[name].make_float()
            if model.config.linear_norm_eps is not None:
                layers[name].norm = None


def abstract_model(config: ModelConfig, dtype: str = "float32") -> Transformer:
    """The model with shapes in place of arrays: nothing is allocated or computed.

    Raises:
        ValueError: as `Transformer`.
    """
    # An nnx.Rngs counts its draws, and tracing that takes time quadratic in the layers.
    rngs: Any = SimpleNamespace(params=lambda: jax.random.key(0))
    one_layer = dataclasses.replace(config, num_layers=1, float_layers=())
    model = nnx.eval_shape(lambda: Transformer(one_layer, rngs=rngs, dtype=dtype))
    # Blocks are alike: one is built and copied, which takes a tenth of the time.
    block = nnx.eval_shape(lambda: Block(config, rngs=rngs))
    model.blocks = nnx.List([nnx.clone(block) for _ in range(config.num_layers)])
    model.config = config
    _keep_float(model)
    return model


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters, embedding and head included (once if tied)."""
    state = nnx.state(abstract_model(config), nnx.Param)
    return sum(leaf.size for leaf in jax.tree.leaves(state))
