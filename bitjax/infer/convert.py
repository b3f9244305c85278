"""The only crossing from trained to packed parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bitjax.config import ModelConfig
from bitjax.model import Transformer, bit_linears, layers_matching
from bitjax.packing import (
    BLOCK_ROWS,
    DITHER_CODE,
    GROUP,
    SCREEN_GROUP,
    LayoutName,
    PackedWeights,
    Screen,
    pack,
    with_columns,
)
from bitjax.quant import (
    WEIGHT_QUANTIZERS,
    int4_dithered,
    int4_grouped,
    int8_per_row,
    require_finite,
)

LayerLayouts = Sequence[tuple[str, LayoutName]]  # pattern of layer names -> layout
TableFormat = Literal["float32", "bfloat16", "int8", "int4", "screened"]
COLUMNS_OF = "ffn.down"  # the layer whose activations are mostly zero, behind ReLU^2
# Values of a table that are quantised at once: temporary float64 values of 8 MB each.
VALUES_AT_ONCE = 2**20


def pack_model(
    model: Transformer,
    layout: LayoutName = "ternary2",
    tables: TableFormat = "float32",
    columns: bool = False,
    layer_layouts: LayerLayouts = (),
) -> Transformer:
    """A copy of a trained model whose linear layers hold packed weights, but for float layers.

    Codes and scales come from the quantiser of the training-time forward pass.

    Args:
        model: with float master weights and `config.weights` of any kind but "float".
        layout: of the linear layers, "ternary2" or "ternary1.6" (bits a weight).
        tables: of embedding and head; "float32" keeps them as trained, "screened" is bfloat16
            with a `Screen` for the head.
        columns: whether down projections are stored by columns as well: a quarter more bytes of
            layers, of which a decoded token reads fewer.
        layer_layouts: of some linear layers, see `layouts_by_layer`.

    Raises:
        ValueError: columns without ReLU^2, a full-precision model, one already packed, weights
            that are not finite, or as `layouts_by_layer`.
    """
    require_packable("this model", model.config)
    if columns:
        require_zeros(model.config)
    layouts = layouts_by_layer(model, layout, layer_layouts)
    packed: Transformer = nnx.clone(model)
    packed.config = packed_config(model.config)
    for name, layer in bit_linears(packed):
        weight = layer.weight.get_value()
        if isinstance(weight, PackedWeights):
            raise ValueError(f"{name} is packed already")
        if layer.weights == "float":
            continue
        require_finite(name, weight)
        codes, scale = layer.quantized()
        scales = np.asarray(scale).reshape(-1)
        packed_scale = scales if len(scales) > 1 else scales[0]
        layer.weights, layer.learned_scale = packed.config.weights, None
        rows = pack(np.asarray(codes), packed_scale, layouts[name])
        by_columns = columns and name.endswith(COLUMNS_OF)
        layer.weight.set_value(with_columns(rows) if by_columns else rows)
    for name, table in (("embedding", packed.embedding), ("head", packed.head)):
        if table is not None:
            table.set_value(pack_table(name, table[...], tables))  # type: ignore[arg-type]
    if tables == "screened":
        head_VxD = np.asarray((packed.embedding if packed.head is None else packed.head)[...])
        packed.screen = nnx.Param(make_screen(in_pieces(head_VxD)))
    return packed


def in_pieces(values: np.ndarray) -> Iterator[np.ndarray]:
    """Consecutive rows, about `VALUES_AT_ONCE` values and whole blocks of rows but for the last."""
    of_row = values[:1].size or 1
    step = max(1, VALUES_AT_ONCE // of_row // BLOCK_ROWS) * BLOCK_ROWS
    for first in range(0, len(values), step):
        yield values[first : first + step]


def packed_config(config: ModelConfig) -> ModelConfig:
    """The configuration of the packed form: learned scales are then scales like others."""
    learned = config.weights == "ternary_learned"
    return dataclasses.replace(config, weights="ternary") if learned else config


def require_packable(what: str, config: ModelConfig) -> None:
    """Refuse a full-precision model, and settings that only training has.

    Raises:
        ValueError: `what` has float weights, or a setting that packed products do not know.
    """
    setting = config.trained_only()
    if setting is not None:
        raise ValueError(f"{what} has {setting}, which packed layers cannot express")
    if config.weights not in WEIGHT_QUANTIZERS:
        raise ValueError(f"{what} has {config.weights} weights; only quantised ones can be packed")


def require_zeros(config: ModelConfig) -> None:
    """Refuse columns for a model whose down projections read few zeros.

    Raises:
        ValueError: its activation is not ReLU^2.
    """
    if config.activation != "relu2":
        raise ValueError(
            f"columns skip activations that are zero, of which {config.activation} leaves few; "
            "they are for models with activation=relu2"
        )


def layouts_by_layer(
    model: Transformer, layout: LayoutName, layer_layouts: LayerLayouts = ()
) -> dict[str, LayoutName]:
    """The layout of every linear layer, by its dotted name.

    Args:
        model: with arrays or only their shapes.
        layout: of the layers that no pattern matches.
        layer_layouts: shell patterns of names, e.g. "*.ffn.down"; the last that matches decides.

    Raises:
        ValueError: not a ternary layout, or a pattern that matches no layer.
    """
    layouts = {name: layout for name, _ in bit_linears(model)}
    for wanted in (layout, *(wanted for _, wanted in layer_layouts)):
        if wanted not in ("ternary2", "ternary1.6"):
            raise ValueError(f"layout={wanted!r} is not ternary2 or ternary1.6")
    for pattern, wanted in layer_layouts:
        layouts |= dict.fromkeys(layers_matching(model, pattern), wanted)
    return layouts


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
    return table_VxD.astype(jnp.bfloat16 if form == "screened" else jnp.dtype(form))


def make_screen(pieces: Iterable[np.ndarray]) -> Screen:
    """The screen of a table that comes in pieces, as `screen_pieces` takes them."""
    screens = list(screen_pieces(pieces))
    first = screens[0].weights
    weights = PackedWeights(
        jnp.concatenate([screen.weights.codes for screen in screens]),
        jnp.concatenate([screen.weights.scale for screen in screens]),
        jnp.concatenate([m for s in screens if (m := s.weights.multipliers) is not None]),
        sum(screen.weights.rows for screen in screens),
        first.cols,
        first.layout,
    )
    spreads = jnp.concatenate([screen.spreads for screen in screens])
    norms = jnp.concatenate([screen.norms for screen in screens])
    return Screen(weights, screens[0].dither, spreads, norms)


def screen_pieces(pieces: Iterable[np.ndarray]) -> Iterator[Screen]:
    """The screen of each piece of a table, all with one dither: together that of the table.

    Args:
        pieces: consecutive rows as bfloat16 `[n, D]`, n a multiple of 16 but for the last piece.
    """
    for piece in pieces:
        w = piece.astype(np.float32)
        n, D = w.shape
        dither_D = screen_dither(D)
        codes, multipliers, scale = int4_dithered(w, SCREEN_GROUP, dither_D)
        whole = np.pad(codes, ((0, 0), (0, -D % SCREEN_GROUP))).reshape(n, -1, SCREEN_GROUP)
        whole = np.pad(whole, ((0, 0), (0, 0), (0, 1)), constant_values=DITHER_CODE)
        steps = multipliers * scale[:, None].astype(np.float64)
        screened = whole * steps[..., None]
        spreads = (steps**4).sum(axis=1) ** 0.25
        norms = np.sqrt(np.maximum(np.square(w).sum(axis=1), np.square(screened).sum(axis=(1, 2))))
        yield Screen(
            pack(whole.reshape(n, -1), scale, "int4", multipliers),
            jnp.asarray(dither_D),
            jnp.asarray(spreads, jnp.float32),
            jnp.asarray(norms, jnp.float32),
        )


def screen_dither(cols: int) -> np.ndarray:
    """The dither of every screen of `cols` columns: float32 in [-1/2, 1/2), the same for all."""
    drawn = np.random.default_rng(0).random(cols, np.float32)
    return drawn - np.full(cols, 0.5, np.float32)
