"""Tiny models for tests: every dimension at most 32, all of them different where they can be."""

import dataclasses

from flax import nnx

from bitjax.config import ModelConfig
from bitjax.model import Transformer, bit_linears

# Grouped queries (4 heads on 2), and sizes that are no multiple of the packed block of 16.
TINY = ModelConfig(
    vocab_size=256, hidden_size=32, intermediate_size=24, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=6, max_seq_len=48, init_std=0.3,
)  # fmt: skip


def tiny_config(**changes):
    """`TINY` with some settings replaced."""
    return dataclasses.replace(TINY, **changes)


def tiny_model(*, seed=0, dtype="float32", **changes) -> Transformer:
    """A Transformer of `tiny_config(**changes)` with random weights."""
    return Transformer(tiny_config(**changes), rngs=nnx.Rngs(seed), dtype=dtype)


def changed(model, *, impl="auto", fuse=True) -> Transformer:
    """A copy of a model whose packed products are another implementation's, or not fused."""
    model = nnx.clone(model)
    model.impl = impl
    for _, layer in bit_linears(model):
        layer.impl, layer.fuse = impl, fuse
    return model
