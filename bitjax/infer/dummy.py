"""Models with random weights, written straight to a packed file: shapes to measure, not to talk to.

A file is produced piece by piece, so a model much larger than memory can be written. The same seed
gives the same bytes.
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from bitjax.config import ModelConfig
from bitjax.infer.convert import (
    COLUMNS_OF,
    LayerLayouts,
    TableFormat,
    layouts_by_layer,
    require_zeros,
)
from bitjax.infer.tensors import (
    OnBytes,
    float_format,
    reporting,
    screen_tensors,
    table_tensors,
)
from bitjax.model import abstract_model
from bitjax.model.files import DTYPES, parameters, write_model_file
from bitjax.packing import (
    BLOCK_ROWS,
    LAYOUTS,
    MAX_MULTIPLIER,
    LayoutName,
    PackedWeights,
    columns_shape,
    multiplier_shape,
    pack,
    packed_shape,
    with_columns,
)
from bitjax.safetensors_writer import Tensor

PART_BYTES = 2**24  # of codes drawn at once


def write_dummy(
    path: Path,
    config: ModelConfig,
    layout: LayoutName = "ternary2",
    tables: TableFormat = "int4",
    seed: int = 0,
    on_bytes: OnBytes | None = None,
    columns: bool = False,
    layer_layouts: LayerLayouts = (),
) -> None:
    """Write a packed model file of random weights.

    Ternary weights are -1, 0 and +1 with equal chances, with the scale that keeps the variance of
    activations; embedding and head are uniform over their codes, or normal where they are floats,
    with a standard deviation of 0.02.

    Args:
        path: of the file; replaced if it exists.
        config: the shape.
        layout: of the linear layers.
        tables: number format of embedding and head.
        seed: of the random numbers.
        on_bytes: called with the bytes written so far and the bytes in all.
        columns: as of `bitjax.infer.convert.pack_model`.
        layer_layouts: of some linear layers, see `layouts_by_layer`.

    Raises:
        ValueError: an unknown layout or number format, a pattern that matches no layer, or the file
            cannot be written.
    """
    known = typing.get_args(TableFormat)
    if tables not in known:
        raise ValueError(f"tables={tables!r} is not {', '.join(known[:-1])} or {known[-1]}")
    if columns:
        require_zeros(config)
    model = abstract_model(config)
    layouts = layouts_by_layer(model, layout, layer_layouts)
    tensors: list[Tensor] = []
    for index, (name, parameter) in enumerate(parameters(model)):
        shape, key = parameter.get_value().shape, (seed, index)
        if name.endswith(".weight") and config.is_float_layer(name.removesuffix(".weight")):
            pieces = functools.partial(_normal, shape, key)
            tensors += table_tensors(name, shape, float_format(tables), pieces)
        elif name.endswith(".weight"):
            layer = layouts[name.removesuffix(".weight")]
            tensors += _packed(name, shape, layer, (1.5 / shape[1]) ** 0.5, key)
            if columns and name.endswith(f"{COLUMNS_OF}.weight"):
                tensors.append(_columns(name, shape, layer, key))
        elif name in ("embedding", "head") and tables in ("int8", "int4"):
            tensors += _packed(name, shape, tables, 0.02 / _spread(tables), key)
        elif name in ("embedding", "head"):
            pieces = functools.partial(_normal, shape, key)
            tensors += table_tensors(name, shape, tables, pieces)
            if tables == "screened" and (name == "head" or config.tie_embeddings):
                tensors += screen_tensors(shape, pieces)
        else:
            tensors.append(Tensor.of(name, np.ones(shape, np.float32)))
    if on_bytes is not None:
        tensors = reporting(tensors, on_bytes)
    write_model_file(path, config, tensors)


def _spread(layout: TableFormat) -> float:
    """Standard deviation of the dequantised codes of a table, before its scale."""
    return 4.6 * MAX_MULTIPLIER if layout == "int4" else 127 / 3**0.5


def _packed(
    name: str, shape: tuple[int, int], layout: LayoutName, scale: float, key: tuple[int, int]
) -> list[Tensor]:
    rows, cols = shape
    tensors = [
        Tensor(
            f"{name}.{layout}", DTYPES["U8"], packed_shape(layout, rows, cols),
            lambda: _codes(rows, cols, layout, key),
        ),
        Tensor.of(f"{name}.scale", np.full(rows, scale, np.float32)),
    ]  # fmt: skip
    if LAYOUTS[layout].group_blocks:
        multipliers = np.full(multiplier_shape(rows, cols), MAX_MULTIPLIER, np.uint8)
        tensors.append(Tensor.of(f"{name}.multipliers", multipliers))
    return tensors


def _columns(name: str, shape: tuple[int, int], layout: LayoutName, key: tuple[int, int]) -> Tensor:
    """The matrix of `_packed` with the same key, by columns; made, whole, when it is asked for."""

    def made() -> Iterator[np.ndarray]:
        codes = np.concatenate(list(_codes(*shape, layout, key)))
        packed = PackedWeights(jnp.asarray(codes), jnp.float32(1), None, *shape, layout)
        yield np.asarray(with_columns(packed).columns)

    return Tensor(f"{name}.columns", DTYPES["U8"], columns_shape(layout, *shape), made)


def _codes(rows: int, cols: int, layout: LayoutName, key: tuple[int, int]) -> Iterator[np.ndarray]:
    about = LAYOUTS[layout]
    rng = np.random.default_rng(key)
    row_blocks, col_blocks, block_bytes = packed_shape(layout, rows, cols)
    if layout == "ternary2":  # every byte of four codes below 3
        digits = np.indices((3, 3, 3, 3)).reshape(4, -1)
        valid = (digits * np.array([[1], [4], [16], [64]])).sum(0).astype(np.uint8)
    else:
        low = 1 if layout == "int8" else 0  # the code 0 of int8 stands for no weight
        valid = np.arange(
            low, about.base**about.planes if about.planes > 1 else 256, dtype=np.uint8
        )
    unit = about.group_blocks or 1
    whole = cols // (about.block_cols * unit) * unit
    step = max(1, PART_BYTES // (col_blocks * block_bytes))
    for first in range(0, row_blocks, step):
        count = min(step, row_blocks - first)
        drawn = rng.integers(0, len(valid), (count, col_blocks, block_bytes), np.uint8)
        codes = drawn if valid[0] == 0 and valid[-1] == len(valid) - 1 else valid[drawn]
        # Beyond the last row and the last column there is weight zero.
        if whole < col_blocks:
            codes[:, whole:] = _random_pack(rng, count * BLOCK_ROWS, cols, whole, layout)
        if (first + count) * BLOCK_ROWS > rows:
            codes[-1:] = _random_pack(rng, rows % BLOCK_ROWS, cols, 0, layout)
        yield codes


def _random_pack(
    rng: np.random.Generator, rows: int, cols: int, first_block: int, layout: LayoutName
) -> np.ndarray:
    """Codes of random weights for the columns from a block on, padding included."""
    about = LAYOUTS[layout]
    cols -= first_block * about.block_cols
    blocks = packed_shape(layout, rows, cols)[1]
    w = np.zeros((rows, blocks * about.block_cols), np.int8)
    w[:, :cols] = rng.integers(about.low, about.high + 1, (rows, cols), np.int8)
    multipliers = np.ones((rows, multiplier_shape(rows, w.shape[1])[1]), np.uint8)
    return np.asarray(pack(w, 1.0, layout, multipliers if about.group_blocks else None).codes)


def _normal(shape: tuple[int, ...], key: tuple[int, int]) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(key)
    step = max(1, PART_BYTES // (4 * shape[1]) // BLOCK_ROWS) * BLOCK_ROWS
    for first in range(0, shape[0], step):
        drawn = rng.standard_normal((min(step, shape[0] - first), shape[1]), np.float32)
        yield drawn * np.float32(0.02)
