"""Flax modules: one Transformer for training, evaluation and packed inference."""

from bitjax.model.attention import KVCache
from bitjax.model.layers import BitLinear, RMSNorm
from bitjax.model.transformer import (
    Cache,
    Transformer,
    abstract_model,
    bit_linears,
    float_logits,
    layers_matching,
    parameter_count,
)

__all__ = [
    "BitLinear", "Cache", "KVCache", "RMSNorm", "Transformer", "abstract_model", "bit_linears",
    "float_logits", "layers_matching", "parameter_count",
]  # fmt: skip
