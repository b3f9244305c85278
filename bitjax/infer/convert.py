"""The only crossing from trained to packed parameters."""

from __future__ import annotations

import numpy as np
from flax import nnx

from bitjax.config import DType
from bitjax.model import Transformer, bit_linears
from bitjax.packing import PackedTernary, pack
from bitjax.quant import WEIGHT_QUANTIZERS, require_finite


def pack_model(model: Transformer, table_dtype: DType = "float32") -> Transformer:
    """A copy of a trained model whose linear layers hold packed weights.

    Codes and scales come from the quantiser of the training-time forward pass.

    Args:
        model: with float master weights and `config.weights` "ternary" or "binary".
        table_dtype: in which embedding and head are kept; "float32" keeps them as trained.

    Raises:
        ValueError: a full-precision model, one already packed, or weights that are not finite.
    """
    kind = model.config.weights
    if kind not in WEIGHT_QUANTIZERS:
        raise ValueError(
            f"this model has {kind} weights; only {' and '.join(WEIGHT_QUANTIZERS)} can be packed"
        )
    packed: Transformer = nnx.clone(model)
    for name, layer in bit_linears(packed):
        weight = layer.weight.get_value()
        if isinstance(weight, PackedTernary):
            raise ValueError(f"{name} is packed already")
        require_finite(name, weight)
        codes, scale = WEIGHT_QUANTIZERS[kind](weight)
        layer.weight.set_value(pack(np.asarray(codes), np.asarray(scale)))
    for table in (packed.embedding, packed.head):
        if table is not None:
            table.set_value(table[...].astype(table_dtype))
    return packed
