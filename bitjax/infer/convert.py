"""The only crossing from trained to packed parameters."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bitjax.model import Transformer, bit_linears
from bitjax.packing import GROUP, LayoutName, PackedWeights, pack
from bitjax.quant import WEIGHT_QUANTIZERS, int4_grouped, int8_per_row, require_finite

TableFormat = Literal["float32", "bfloat16", "int8", "int4"]


def pack_model(
    model: Transformer, layout: LayoutName = "ternary2", tables: TableFormat = "float32"
) -> Transformer:
    """A copy of a trained model whose linear layers hold packed weights.

    Codes and scales come from the quantiser of the training-time forward pass.

    Args:
        model: with float master weights and `config.weights` "ternary" or "binary".
        layout: of the linear layers, "ternary2" or "ternary1.6" (bits a weight).
        tables: of embedding and head; "float32" keeps them as trained.

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
        if isinstance(weight, PackedWeights):
            raise ValueError(f"{name} is packed already")
        require_finite(name, weight)
        codes, scale = WEIGHT_QUANTIZERS[kind](weight, layer.segments)
        scales = np.asarray(scale).reshape(-1)
        packed_scale = scales if layer.segments else scales[0]
        layer.weight.set_value(pack(np.asarray(codes), packed_scale, layout))
    for name, table in (("embedding", packed.embedding), ("head", packed.head)):
        if table is not None:
            table.set_value(pack_table(name, table[...], tables))  # type: ignore[arg-type]
    return packed


def pack_table(name: str, table_VxD: jax.Array, form: TableFormat) -> jax.Array | PackedWeights:
    """An embedding or head in another number format.

    Raises:
        ValueError: a value is not finite; `name` says where.
    """
    require_finite(name, table_VxD)
    if form == "int8":
        codes, scale = int8_per_row(np.asarray(table_VxD))
        return pack(codes, scale, "int8")
    if form == "int4":
        codes, multipliers, scale = int4_grouped(np.asarray(table_VxD), GROUP)
        return pack(codes, scale, "int4", multipliers)
    return table_VxD.astype(jnp.dtype(form))
