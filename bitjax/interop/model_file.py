"""Model files of bitjax as checkpoints, and checkpoints as model files or models.

Reading unpacks a matrix when it is asked for. Writing packs one layer at a time, so it takes little
more memory than the largest tensor, or the matrices stacked as one layer.

Tables that a file holds packed (int8, int4) are read as the floats they stand for.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from bitjax.infer.convert import (
    COLUMNS_OF,
    LayerLayouts,
    TableFormat,
    in_pieces,
    layouts_by_layer,
    packed_config,
    require_packable,
    require_zeros,
)
from bitjax.infer.tensors import (
    Last,
    OnBytes,
    float_format,
    layer_tensors,
    reporting,
    screen_tensors,
    table_tensors,
)
from bitjax.interop.checkpoint import (
    Checkpoint,
    Ternary,
    layer_of,
    matrices_of,
    tensor_shapes,
)
from bitjax.model import BitLinear, Transformer, abstract_model, bit_linears
from bitjax.model.files import DTYPES, load_model, parameters, write_model_file
from bitjax.ops import Impl
from bitjax.packing import (
    BLOCK_ROWS,
    LayoutName,
    PackedWeights,
    pack,
    packed_rows,
    unpack_ternary,
    with_columns,
)
from bitjax.quant import WEIGHT_QUANTIZERS, quantize_matrix, require_finite
from bitjax.safetensors_writer import Tensor
from bitjax.tokenizer import BYTES

ROWS_AT_ONCE = 1024  # of a matrix that is unpacked: a few megabytes of temporary values


def read_model(path: Path) -> Checkpoint:
    """A model file, float or packed.

    Raises:
        ValueError: not a model file, or a damaged one.
    """
    return checkpoint_of(load_model(path), str(path))


def checkpoint_of(model: Transformer, origin: str = "the model") -> Checkpoint:
    """A model in memory, or in a file that is mapped to it."""
    config = packed_config(model.config)  # a learned scale is lost unless codes go with it
    layers = dict(bit_linears(model))
    values = dict(parameters(model))

    def read(name: str) -> np.ndarray | Ternary:
        if name not in shapes:
            raise ValueError(f"{origin} has no tensor {name!r}")
        if name in ("embedding", "head"):
            return _table(values[name].get_value())
        matrix = name.removesuffix(".norm")
        layer = layer_of(matrix)
        if layer not in layers:
            return np.asarray(values[f"{name}.scale"][...])
        index = matrices_of(layer).index(matrix)
        if matrix == name:
            return _matrix(layers[layer], index)
        scale = np.asarray(values[f"{layer}.norm.scale"][...])
        return scale if scale.ndim == 1 else scale[index]

    shapes = tensor_shapes(config)
    # A model that came without a tokenizer says "bytes"; not every one has as many tokens.
    fits = model.tokenizer.vocab_size <= config.vocab_size
    return Checkpoint(origin, config, read, model.tokenizer if fits else None)


def _table(table: object) -> np.ndarray:
    if not isinstance(table, PackedWeights):
        return np.asarray(table)
    parts = (
        packed_rows(table, jnp.arange(i, min(i + ROWS_AT_ONCE, table.rows)))
        for i in range(0, table.rows, ROWS_AT_ONCE)
    )
    floats = np.empty(table.shape, np.float32)
    for i, part in enumerate(parts):
        floats[i * ROWS_AT_ONCE : (i + 1) * ROWS_AT_ONCE] = part
    return floats


def _matrix(layer: BitLinear, index: int) -> np.ndarray | Ternary:
    """One of the matrices stacked in a layer."""
    weight = layer.weight.get_value()
    ends = list(itertools.accumulate(layer.segments or weight.shape[:1], initial=0))
    first, last = ends[index : index + 2]
    if not isinstance(weight, PackedWeights):
        if layer.learned_scale is None:
            return np.asarray(weight)[first:last]
        quantized = layer.quantized()
        scales = np.broadcast_to(quantized.scale[:, 0], len(weight))[first:last]
        codes = np.asarray(quantized.codes[first:last], np.int8)
        return Ternary(codes, scales[0] if layer.sharing.per == "tensor" else scales)
    codes = np.empty((last - first, weight.cols), np.int8)
    # Whole blocks of rows, of which the first and the last may be shared with a neighbour.
    step = ROWS_AT_ONCE // BLOCK_ROWS
    stored_codes = np.asarray(weight.codes)
    for block in range(first // BLOCK_ROWS, -(-last // BLOCK_ROWS), step):
        stored = stored_codes[block : block + step]
        rows = min(stored.shape[0] * BLOCK_ROWS, weight.rows - block * BLOCK_ROWS)
        part = unpack_ternary(stored, rows, weight.cols, weight.layout)
        start = block * BLOCK_ROWS
        taken = slice(max(first, start), min(last, start + rows))
        codes[taken.start - first : taken.stop - first] = part[
            taken.start - start : taken.stop - start
        ]
    scale = np.asarray(weight.scale)
    if scale.ndim:
        scale = scale[first:last]
        scale = scale[0] if (scale == scale[0]).all() else scale
    return Ternary(codes, np.asarray(scale))


@dataclasses.dataclass(frozen=True)
class _Source:
    """A checkpoint as the parameters of a model, each made when it is asked for."""

    checkpoint: Checkpoint
    layouts: dict[str, LayoutName]
    columns: bool

    def packs(self, layer: str) -> bool:
        """Whether a linear layer is packed."""
        config = self.checkpoint.config
        return config.weights in WEIGHT_QUANTIZERS and not config.is_float_layer(layer)

    def packed(self, weight: str) -> PackedWeights:
        """A packed layer, by the name of its weight."""
        layer = weight.removesuffix(".weight")
        found = [self._ternary(name) for name in matrices_of(layer)]
        scale = np.concatenate([np.broadcast_to(m.scale, len(m.codes)) for m in found])
        codes = np.concatenate([m.codes for m in found]) if len(found) > 1 else found[0].codes
        del found
        rows = pack(codes, scale, self.layouts[layer])
        return with_columns(rows) if self.has_columns(layer) else rows

    def has_columns(self, layer: str) -> bool:
        """Whether a layer is stored by columns as well."""
        return self.columns and layer.endswith(COLUMNS_OF)

    def floats(self, name: str) -> Iterator[np.ndarray]:
        """A parameter of floats: consecutive rows, see `in_pieces`.

        Raises:
            ValueError: it is ternary, or not finite.
        """
        layer = name.removesuffix(".weight")
        if layer in self.layouts:
            for matrix in matrices_of(layer):
                yield from in_pieces(self._floats(matrix))
        elif name.endswith(".norm.scale") and name.removesuffix(".norm.scale") in self.layouts:
            yield self._norms(name.removesuffix(".norm.scale"))
        else:
            yield from in_pieces(self._floats(name.removesuffix(".scale")))

    def _norms(self, layer: str) -> np.ndarray:
        """The scales of a layer's own norms: `[K]`, or `[matrices, K]` for several matrices."""
        scales = [self._floats(f"{matrix}.norm") for matrix in matrices_of(layer)]
        if len(scales) == 1:
            return scales[0]
        if not self.checkpoint.config.inner_norm:
            return np.stack(scales)
        if not all(np.array_equal(scale, scales[0]) for scale in scales):
            raise ValueError(
                f"{self.checkpoint.origin}: the norms of {', '.join(matrices_of(layer))} differ; "
                "with inner_norm they are one"
            )
        return scales[0]

    def _floats(self, name: str) -> np.ndarray:
        value = self._read(name)
        if isinstance(value, Ternary):
            raise ValueError(
                f"{self.checkpoint.origin}: {name} is ternary already; there are no float weights "
                "to write"
            )
        require_finite(f"{self.checkpoint.origin}: {name}", value)
        return value

    def _ternary(self, name: str) -> Ternary:
        value = self._read(name)
        if isinstance(value, Ternary):
            require_finite(f"{self.checkpoint.origin}: the scale of {name}", value.scale)
            return value
        require_finite(f"{self.checkpoint.origin}: {name}", value)
        config = self.checkpoint.config
        return Ternary(*quantize_matrix(config.weights, value, config.weight_scale))

    def _read(self, name: str) -> np.ndarray | Ternary:
        value = self.checkpoint.read(name)
        wanted = self.shapes[name]
        if value.shape != wanted:
            raise ValueError(
                f"{self.checkpoint.origin}: {name} has shape {list(value.shape)}; wanted "
                f"{list(wanted)}"
            )
        return value

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return tensor_shapes(self.checkpoint.config)


def write_model(
    path: Path,
    checkpoint: Checkpoint,
    layout: LayoutName = "ternary2",
    tables: TableFormat = "float32",
    columns: bool = False,
    layer_layouts: LayerLayouts = (),
    as_float: bool = False,
    overwrite: bool = False,
    on_bytes: OnBytes | None = None,
) -> None:
    """Write a checkpoint as a model file, packed unless it is to be float.

    Args:
        path: of the file, which appears under its name when it is complete.
        checkpoint: the model.
        layout, tables, columns, layer_layouts: as of `bitjax.infer.convert.pack_model`. Layers that
            stay float are float32 beside float32 tables, else bfloat16.
        as_float: write master weights, or those of a full-precision model, as they are.
        overwrite: replace a file of that name.
        on_bytes: told of every piece written.

    Raises:
        ValueError: the file exists or cannot be written; the model has nothing to pack, or no
            float weights to write; weights that are not finite; or as `pack_model`.
    """
    if os.path.lexists(path) and not overwrite:
        raise ValueError(f"{path} exists already; it is replaced only when told to")
    config = checkpoint.config
    if not as_float:
        require_packable(checkpoint.origin, config)
    if columns:
        require_zeros(config)
    model = abstract_model(config)
    layers = dict(bit_linears(model))
    source = _Source(checkpoint, layouts_by_layer(model, layout, layer_layouts), columns)
    packed = Last(source.packed)
    tensors: list[Tensor] = []
    for name, parameter in parameters(model):
        shape = parameter.get_value().shape
        layer = name.removesuffix(".weight")
        rows = functools.partial(source.floats, name)
        if layer in layers and source.packs(layer) and not as_float:
            tensors += layer_tensors(
                name, shape, source.layouts[layer], source.has_columns(layer), packed
            )
        elif layer in layers:
            tensors += table_tensors(name, shape, float_format(tables), rows)
        elif name in ("embedding", "head"):
            tensors += table_tensors(name, shape, tables, rows)
            if tables == "screened" and (name == "head" or config.tie_embeddings):
                tensors += screen_tensors(shape, rows)
        else:
            tensors.append(Tensor(name, DTYPES["F32"], shape, rows))
    if on_bytes is not None:
        tensors = reporting(tensors, on_bytes)
    write_model_file(path, config, tensors, checkpoint.tokenizer or BYTES)


def build_model(
    checkpoint: Checkpoint, layout: LayoutName = "ternary2", impl: Impl = "auto"
) -> Transformer:
    """A checkpoint as a model in memory: ternary layers packed, everything else as it is.

    Args:
        checkpoint: the model.
        layout: of packed layers.
        impl: of their products, see `bitjax.ops`.

    Raises:
        ValueError: weights that are not finite, or not of the configuration's shape.
    """
    if checkpoint.config.weights in WEIGHT_QUANTIZERS:
        require_packable(checkpoint.origin, checkpoint.config)
    model = abstract_model(checkpoint.config)
    layers = dict(bit_linears(model))
    source = _Source(checkpoint, layouts_by_layer(model, layout), columns=False)
    for name, parameter in parameters(model):
        layer = name.removesuffix(".weight")
        if layer in layers and source.packs(layer):
            parameter.set_value(source.packed(name))
            continue
        floats = np.concatenate(list(source.floats(name)))
        # Norms are float32 wherever they are read, and jax has no use for float16.
        keeps = floats.dtype == DTYPES["BF16"] and floats.ndim == 2
        parameter.set_value(jnp.asarray(floats if keeps else floats.astype(np.float32)))
    for bit_linear in layers.values():
        bit_linear.impl = impl
    model.impl, model.tokenizer = impl, checkpoint.tokenizer or BYTES
    return model
