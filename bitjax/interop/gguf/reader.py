"""Read a GGUF file as a checkpoint.

What a file's matrices are follows from their types and, where a float type may hold either, from
their values:

    all TQ1_0, TQ2_0 or I2_S          a ternary model, with int8 activations as its engines compute
    all F32, F16, BF16                ternary if the first block's hold one magnitude and zeros;
                                      else float, but master weights in a bitnet architecture
    anything else                     a float model, of quantised values as they are
    some ternary, some of the above   a ternary model with float layers

A matrix in TQ1_0 or TQ2_0 whose blocks have scales of their own (a float model quantised so) is
float. Files of bitjax state the formats under `bitjax.config`, and the groups of I2_S.

I2_S has two forms (`bitjax.interop.gguf.blocks`) that no file tells apart. The form is taken from
the argument, from `bitjax.i2s_group`, or detected (`i2s.py`), and else asked for.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from bitjax.config import ModelConfig, from_dict
from bitjax.interop.checkpoint import LAYER_OF, Checkpoint, Ternary, tensor_shapes
from bitjax.interop.gguf import architecture as arch
from bitjax.interop.gguf import blocks, i2s
from bitjax.interop.gguf.container import Container, open_container
from bitjax.tokenizer import Tokenizer

CONFIG_KEY, GROUP_KEY = "bitjax.config", "bitjax.i2s_group"
# What metadata cannot say of a model but `bitjax.config` does.
STATED = ("weights", "activations", "float_layers", "init_std")
ROWS = 1024  # of a float matrix, examined at once


def read_gguf(
    path: Path,
    i2s_group: int | None = None,
    tokenizer_from: Callable[[Mapping[str, object]], Tokenizer | None] | None = None,
) -> Checkpoint:
    """Read a model; its tensors stay in the memory-mapped file until they are asked for.

    Args:
        path: of the file.
        i2s_group: values in a group of I2_S matrices: 128 as built for x86, 64 as built for Arm,
            4 for four rows to a byte; None to have it detected.
        tokenizer_from: makes a tokenizer of the metadata; by default the project's own.

    Raises:
        ValueError: not a GGUF file, a damaged one, a model that cannot be expressed here, or I2_S
            matrices of a form that is neither stated nor detectable.
    """
    if i2s_group not in (None, *blocks.I2S_GROUPS):
        raise ValueError(f"i2s_group={i2s_group} is not one of {blocks.I2S_GROUPS}")
    file = open_container(Path(path))
    config = _shape(file)
    model = _Matrices(file, config, i2s_group)
    config = _with_formats(file, model)
    model.config = config
    tokenizer = _tokenizer(tokenizer_from, file)
    return Checkpoint(str(path), config, model.read, tokenizer)


def _tokenizer(
    tokenizer_from: Callable[[Mapping[str, object]], Tokenizer | None] | None, file: Container
) -> Tokenizer | None:
    if file.metadata.get("tokenizer.ggml.model") in (None, "no_vocab", "none"):
        return None
    return None if tokenizer_from is None else tokenizer_from(file.metadata)


def _shape(file: Container) -> ModelConfig:
    """The shape of the model, of which the file has every tensor and no other."""
    where = str(file.path)
    embedding = file.tensors.get(arch.gguf_name("embedding"))
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError(f"{where} has no matrix {arch.gguf_name('embedding')}")
    tied = arch.gguf_name("head") not in file.tensors
    config = arch.config_from(where, file.metadata, embedding.shape[0], tied)
    if config.num_layers * len(arch.MATRICES) > len(file.tensors):
        raise ValueError(
            f"{where} has {len(file.tensors)} tensors, too few for {config.num_layers} layers"
        )
    wanted = {arch.gguf_name(name): shape for name, shape in tensor_shapes(config).items()}
    optional = {arch.gguf_name(name, "scale"): (1,) for name in arch.matrix_names(config)}
    optional[arch.ROPE_FACTORS] = (config.head_dim // 2,)
    for name, shape in wanted.items():
        if name not in file.tensors:
            raise ValueError(f"{where}: tensor {name!r} is missing")
        if file.tensors[name].shape != shape:
            raise ValueError(
                f"{where}: tensor {name!r} has shape {list(file.tensors[name].shape)}; "
                f"the metadata make it {list(shape)}"
            )
    for name, entry in file.tensors.items():
        if name not in wanted and (name not in optional or entry.shape != optional[name]):
            raise ValueError(f"{where}: tensor {name!r} of shape {list(entry.shape)} has no place "
                             f"in a model of architecture {_architecture(file)}")  # fmt: skip
        if len(entry.shape) == 1 and entry.type.name not in blocks.FLOATS:
            raise ValueError(f"{where}: tensor {name!r} is a vector of type {entry.type.name}")
    for name in ("embedding", "head")[: 1 if tied else 2]:
        if file.tensors[arch.gguf_name(name)].type.name == "I2_S":
            raise ValueError(f"{where}: tensor {arch.gguf_name(name)!r} is in I2_S, which is for "
                             "linear layers")  # fmt: skip
    if arch.ROPE_FACTORS in file.tensors:
        factors = _floats(file, arch.ROPE_FACTORS).astype(np.float32)
        settings = arch.Settings(where, file.metadata)
        context = int(settings.number("rope.scaling.original_context_length", 0))
        config = arch.scaled(where, config, factors, context)
    return config


def _architecture(file: Container) -> str:
    return str(file.metadata["general.architecture"])


def _floats(file: Container, name: str) -> np.ndarray:
    entry = file.tensors[name]
    return blocks.decode_float(entry.type, file.raw(name), entry.shape)


def _with_formats(file: Container, model: _Matrices) -> ModelConfig:
    """The configuration with number formats: stated, or found as the module says."""
    config, where = model.config, str(file.path)
    stated = file.metadata.get(CONFIG_KEY)
    if stated is not None:
        try:
            known = from_dict(ModelConfig, json.loads(str(stated)), "model.")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: {CONFIG_KEY} cannot be read: {error}") from None
        if len(known.float_layers) > 4 * config.num_layers:
            raise ValueError(f"{where}: {CONFIG_KEY} has more float layers than the model layers")
        return dataclasses.replace(config, **{key: getattr(known, key) for key in STATED})
    names = arch.matrix_names(config)
    first = names[: len(arch.MATRICES)]
    types = {file.tensors[arch.gguf_name(name)].type.name for name in names}
    if not types & set(blocks.TERNARY):
        if not types <= set(blocks.FLOATS):
            return config.full_precision_twin()
        ternary = all(isinstance(model.stored(name), Ternary) for name in first)
        is_master = _architecture(file) != "llama"
        return config if ternary or is_master else config.full_precision_twin()
    if any(model.is_float(name) for name in first if model.kind(name) in blocks.BLOCKWISE):
        return config.full_precision_twin()
    layers: dict[str, set[bool]] = {}
    for name in names:
        parent, _, part = name.rpartition(".")
        layer = f"{parent}.{LAYER_OF.get(part, part)}"
        layers.setdefault(layer, set()).add(
            model.kind(name) not in blocks.TERNARY and model.is_float(name)
        )
    mixed = [layer for layer, kinds in layers.items() if len(kinds) > 1]
    if mixed:
        raise ValueError(
            f"{where}: {mixed[0]} is stacked of ternary and float matrices; "
            "its parts must be alike"
        )
    return dataclasses.replace(
        config, float_layers=tuple(layer for layer, kinds in layers.items() if True in kinds)
    )


class _Matrices:
    """The tensors of a file under the names of a checkpoint.

    Attributes:
        config: of the model, at first without number formats.
    """

    def __init__(self, file: Container, config: ModelConfig, i2s_group: int | None) -> None:
        self.config = config
        self._file = file
        self._group = i2s_group
        self._linear = frozenset(arch.matrix_names(config))
        self._names = frozenset(tensor_shapes(config))

    def kind(self, name: str) -> str:
        """Name of the type that a tensor is stored in."""
        return self._file.tensors[arch.gguf_name(name)].type.name

    def is_float(self, name: str) -> bool:
        """Whether a matrix is no code times scale."""
        return not isinstance(self.stored(name), Ternary)

    def read(self, name: str) -> np.ndarray | Ternary:
        """As `Checkpoint.read`."""
        if name not in self._names:
            raise ValueError(f"{self._file.path} has no tensor {name!r}")
        if name not in self._linear:
            return _floats(self._file, arch.gguf_name(name))
        parent, _, part = name.rpartition(".")
        config, kind = self.config, self.kind(name)
        if config.weights == "float" or config.is_float_layer(
            f"{parent}.{LAYER_OF.get(part, part)}"
        ):
            return self._in_order(name, self._scaled_floats(name))
        value = self.stored(name)
        if not isinstance(value, Ternary) and kind not in blocks.FLOATS:
            raise ValueError(
                f"{self._where(name)} is in {kind} and not one scale times -1, 0 and 1 in every "
                "row, in a ternary model"
            )
        if isinstance(value, Ternary):
            return Ternary(
                self._in_order(name, value.codes),
                self._in_order(name, value.scale) if value.scale.ndim else value.scale,
            )
        return self._in_order(name, value)

    def stored(self, name: str) -> np.ndarray | Ternary:
        """A matrix in the row order of the file: ternary if its values are."""
        entry, raw = self._file.tensors[arch.gguf_name(name)], self._file.raw(arch.gguf_name(name))
        if entry.type.name == "I2_S":
            codes, scale = self._i2s(name)
            found: Ternary | None = Ternary(codes, np.asarray(scale, np.float32))
            self._require_codes(name, codes)
        elif entry.type.name in blocks.BLOCKWISE:
            codes, scales = blocks.decode_blockwise(entry.type, raw, entry.shape)  # type: ignore[arg-type]
            found = _uniform(codes, scales)
            if found is not None:
                self._require_codes(name, codes)
        else:
            found = as_ternary(blocks.decode_float(entry.type, raw, entry.shape))
        if found is None:
            return self._scaled_floats(name)
        factor = self._factor(name)
        with np.errstate(over="ignore", invalid="ignore"):
            scale = np.asarray(found.scale * factor, np.float32)
        if not np.isfinite(scale).all():
            raise ValueError(f"{self._where(name)} has a scale that is not finite")
        return Ternary(found.codes, scale)

    def _where(self, name: str) -> str:
        return f"{self._file.path}: tensor {arch.gguf_name(name)!r}"

    def _in_order(self, name: str, values: np.ndarray) -> np.ndarray:
        if _architecture(self._file) != "llama":
            return values
        return arch.half_split(self.config, name, values)

    def _factor(self, name: str) -> np.float32:
        """Of the whole matrix, which some files keep as a tensor of its own."""
        name = arch.gguf_name(name, "scale")
        return _floats(self._file, name).astype(np.float32)[0] if name in self._file.tensors else np.float32(1)

    def _scaled_floats(self, name: str) -> np.ndarray:
        kind, factor = self.kind(name), self._factor(name)
        if kind == "I2_S":
            codes, scale = self._i2s(name)
            values = codes * scale
        else:
            values = _floats(self._file, arch.gguf_name(name))
        return values if factor == 1 else values.astype(np.float32) * factor

    def _require_codes(self, name: str, codes: np.ndarray) -> None:
        if codes.max(initial=0) > 1:
            raise ValueError(
                f"{self._where(name)} holds the code 3, which stands for nothing in a ternary matrix"
            )

    def _i2s_group(self) -> int:
        if self._group is None:
            stated = self._file.metadata.get(GROUP_KEY)
            if stated is not None and stated not in blocks.I2S_GROUPS:
                raise ValueError(f"{self._file.path}: {GROUP_KEY}={stated!r:.40} is not known")
            self._group = stated if isinstance(stated, int) else i2s.detect(self._file, self.config)
        return self._group

    def _i2s(self, name: str) -> tuple[np.ndarray, np.float32]:
        """Codes and scale of a matrix in I2_S."""
        name_there = arch.gguf_name(name)
        shape, group = self._file.tensors[name_there].shape, self._i2s_group()
        if not i2s.fits(shape, group):
            raise ValueError(
                f"{self._where(name)} of shape {list(shape)} cannot be in groups of {group}"
            )
        return blocks.decode_i2s(self._file.raw(name_there), shape, group)  # type: ignore[arg-type]


def _uniform(codes: np.ndarray, scales: np.ndarray) -> Ternary | None:
    """A matrix whose blocks of one row have one scale, the scale made positive; else None.

    Blocks whose scale is 0 hold zeros whatever their codes.
    """
    width = codes.shape[1] // scales.shape[1]
    zero = scales == 0
    if zero.any():
        codes = np.where(np.repeat(zero, width, axis=1), np.int8(0), codes)
    per_row = np.take_along_axis(scales, np.argmax(~zero, axis=1)[:, None], axis=1)
    if not ((scales == per_row) | zero).all():
        return None
    row = per_row[:, 0]
    rows_used = row != 0
    if not rows_used.any():
        return Ternary(codes, np.float32(0) + np.zeros((), np.float32))
    first = row[rows_used][0]
    if (row[rows_used] == first).all():
        scale = np.asarray(first)
    else:
        scale = row
    negative = scale < 0
    if negative.any():
        codes = np.where(negative if not negative.ndim else negative[:, None], -codes, codes)
    return Ternary(codes.astype(np.int8, copy=False), np.abs(scale).astype(np.float32))


def as_ternary(values: np.ndarray) -> Ternary | None:
    """A float matrix as codes and scale, if every row is one magnitude and zeros; else None."""
    rows, cols = values.shape
    scales = np.empty(rows, np.float32)
    codes = np.empty((rows, cols), np.int8)
    for start in range(0, rows, ROWS):
        part = np.asarray(values[start : start + ROWS], np.float32)
        size = np.abs(part)
        largest = size.max(axis=1)
        if not np.isfinite(largest).all() or not ((size == largest[:, None]) | (size == 0)).all():
            return None
        scales[start : start + ROWS] = largest
        codes[start : start + ROWS] = np.sign(part)
    used = scales[scales > 0]
    if not used.size:
        return None
    if (used == used[0]).all():
        return Ternary(codes, np.asarray(used[0]))
    return Ternary(codes, scales)
