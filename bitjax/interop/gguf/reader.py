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
from pathlib import Path

import numpy as np

from bitjax.config import ModelConfig, from_dict
from bitjax.interop.checkpoint import Checkpoint, Ternary, layer_of, tensor_shapes
from bitjax.interop.gguf import architecture as arch
from bitjax.interop.gguf import blocks, i2s
from bitjax.interop.gguf.container import Container, open_container
from bitjax.interop.gguf.ternary import of_blocks, of_floats
from bitjax.tokenizer import Tokenizer

CONFIG_KEY, GROUP_KEY = "bitjax.config", "bitjax.i2s_group"
# What metadata cannot say of a model but `bitjax.config` does.
STATED = ("weights", "activations", "float_layers", "init_std")


def read_gguf(path: Path, i2s_group: int | None = None) -> Checkpoint:
    """Read a model; its tensors stay in the memory-mapped file until they are asked for.

    Args:
        path: of the file.
        i2s_group: values in a group of I2_S matrices: 128 as built for x86, 64 as built for Arm,
            4 for four rows to a byte; None to have it detected.

    Raises:
        ValueError: not a GGUF file, a damaged one, a model that cannot be expressed here, or I2_S
            matrices of a form that is neither stated nor detectable.
    """
    if i2s_group not in (None, *blocks.I2S_GROUPS):
        raise ValueError(f"i2s_group={i2s_group} is not one of {blocks.I2S_GROUPS}")
    file = open_container(Path(path))
    stated = _stated(file)
    model = _Matrices(file, _shape(file, stated), i2s_group)
    model.config = _with_formats(file, model, stated)
    return Checkpoint(str(path), model.config, model.read, _tokenizer(file, model.config))


def _tokenizer(file: Container, config: ModelConfig) -> Tokenizer | None:
    if file.metadata.get("tokenizer.ggml.model") in (None, "no_vocab", "none"):
        return None
    from bitjax.interop.tokenizers.gguf import tokenizer_from_gguf  # imports much else

    tokenizer = tokenizer_from_gguf(file.metadata, str(file.path))
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{file.path}: the tokenizer has {tokenizer.vocab_size} tokens, the embedding "
            f"{config.vocab_size} rows"
        )
    return tokenizer


def _stated(file: Container) -> ModelConfig | None:
    """What bitjax wrote of the model beside the standard settings."""
    text = file.metadata.get(CONFIG_KEY)
    if text is None:
        return None
    try:
        return from_dict(ModelConfig, json.loads(str(text)), "model.")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file.path}: {CONFIG_KEY} cannot be read: {error}") from None


def _shape(file: Container, stated: ModelConfig | None) -> ModelConfig:
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
        known = [stated.rope_scaling] if stated is not None else []
        config = arch.scaled(where, config, factors, context, known)
    return config


def _architecture(file: Container) -> str:
    return str(file.metadata["general.architecture"])


def _floats(file: Container, name: str) -> np.ndarray:
    entry = file.tensors[name]
    return blocks.decode_float(entry.type, file.raw(name), entry.shape)


def _with_formats(file: Container, model: _Matrices, stated: ModelConfig | None) -> ModelConfig:
    """The configuration with number formats: stated, or found as the module says."""
    config, where = model.config, str(file.path)
    if any(model.kind(name) == "I2_S" for name in arch.matrix_names(config)):
        model.settle_i2s()
    if stated is not None:
        if len(stated.float_layers) > 4 * config.num_layers:
            raise ValueError(f"{where}: {CONFIG_KEY} has more float layers than the model layers")
        return dataclasses.replace(config, **{key: getattr(stated, key) for key in STATED})
    names = arch.matrix_names(config)
    first = names[: len(arch.MATRICES)]
    types = {file.tensors[arch.gguf_name(name)].type.name for name in names}
    if not types & set(blocks.TERNARY):
        if not types <= set(blocks.FLOATS):
            return config.full_precision_twin()
        ternary = all(_is_ternary(model, name) for name in first)
        is_master = _architecture(file) != "llama"
        return config if ternary or is_master else config.full_precision_twin()
    if not all(_is_ternary(model, name) for name in first if model.kind(name) in blocks.BLOCKWISE):
        return config.full_precision_twin()
    layers: dict[str, set[bool]] = {}
    for name in names:
        is_float = model.kind(name) not in blocks.TERNARY and not _is_ternary(model, name)
        layers.setdefault(layer_of(name), set()).add(is_float)
    mixed = [layer for layer, kinds in layers.items() if len(kinds) > 1]
    if mixed:
        raise ValueError(
            f"{where}: {mixed[0]} is stacked of ternary and float matrices; its parts must be alike"
        )
    return dataclasses.replace(
        config, float_layers=tuple(layer for layer, kinds in layers.items() if True in kinds)
    )


def _is_ternary(model: _Matrices, name: str) -> bool:
    return isinstance(model.stored(name), Ternary)


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

    def settle_i2s(self) -> None:
        """Decide on the form of I2_S matrices; see `read_gguf`."""
        if self._group is None:
            stated = self._file.metadata.get(GROUP_KEY)
            if stated is not None and stated not in blocks.I2S_GROUPS:
                raise ValueError(f"{self._file.path}: {GROUP_KEY}={stated!r:.40} is not known")
            self._group = stated if isinstance(stated, int) else i2s.detect(self._file, self.config)
        for name in self._linear:
            shape = self._file.tensors[arch.gguf_name(name)].shape
            if self.kind(name) == "I2_S" and not i2s.fits(shape, self._group):
                raise ValueError(
                    f"{self._where(name)} of shape {list(shape)} cannot be in groups of "
                    f"{self._group}"
                )

    def read(self, name: str) -> np.ndarray | Ternary:
        """As `Checkpoint.read`."""
        if name not in self._names:
            raise ValueError(f"{self._file.path} has no tensor {name!r}")
        if name not in self._linear:
            return _floats(self._file, arch.gguf_name(name))
        if self.config.weights == "float" or self.config.is_float_layer(layer_of(name)):
            return self._in_order(name, self._scaled_floats(name))
        value = self.stored(name)
        if isinstance(value, Ternary):
            scale = self._in_order(name, value.scale) if value.scale.ndim else value.scale
            return Ternary(self._in_order(name, value.codes), scale)
        if self.kind(name) not in blocks.FLOATS:
            raise ValueError(
                f"{self._where(name)} is in {self.kind(name)} and not, row by row, one scale "
                "times -1, 0 and 1; that of a ternary model must be"
            )
        return self._in_order(name, value)

    def stored(self, name: str) -> np.ndarray | Ternary:
        """A matrix in the row order of the file: ternary if its values are."""
        found = self._ternary(name)
        if found is None:
            return self._scaled_floats(name)
        if found.codes.max(initial=0) > 1:
            raise ValueError(
                f"{self._where(name)} holds the code 3, which stands for nothing in a ternary one"
            )
        with np.errstate(over="ignore", invalid="ignore"):
            scale = np.asarray(found.scale * self._factor(name), np.float32)
        if not np.isfinite(scale).all():
            raise ValueError(f"{self._where(name)} has a scale that is not finite")
        return Ternary(found.codes, scale)

    def _ternary(self, name: str) -> Ternary | None:
        """Codes and scale without the matrix's own factor; codes may be +2."""
        kind, raw, shape = self._stored_as(name)
        if kind.name == "I2_S":
            codes, scale = self._i2s(raw, shape)
            return Ternary(codes, np.asarray(scale, np.float32))
        if kind.name in blocks.BLOCKWISE:
            return of_blocks(*blocks.decode_blockwise(kind, raw, shape))
        return of_floats(blocks.decode_float(kind, raw, shape))

    def _scaled_floats(self, name: str) -> np.ndarray:
        kind, raw, shape = self._stored_as(name)
        if kind.name == "I2_S":
            codes, scale = self._i2s(raw, shape)
            values = codes * scale
        else:
            values = blocks.decode_float(kind, raw, shape)
        factor = self._factor(name)
        with np.errstate(over="ignore", invalid="ignore"):
            return values if factor == 1 else values.astype(np.float32) * factor

    def _stored_as(self, name: str) -> tuple[blocks.TensorType, np.ndarray, tuple[int, int]]:
        """Type, bytes and shape of a matrix."""
        name = arch.gguf_name(name)
        rows, cols = self._file.tensors[name].shape
        return self._file.tensors[name].type, self._file.raw(name), (rows, cols)

    def _i2s(self, raw: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.float32]:
        assert self._group is not None  # settled
        return blocks.decode_i2s(raw, shape, self._group)

    def _factor(self, name: str) -> np.float32:
        """Of the whole matrix, which some files keep as a tensor of its own."""
        name = arch.gguf_name(name, "scale")
        if name not in self._file.tensors:
            return np.float32(1)
        return np.float32(_floats(self._file, name)[0])

    def _in_order(self, name: str, values: np.ndarray) -> np.ndarray:
        if _architecture(self._file) != "llama":
            return values
        return arch.half_split(self.config, name, values)

    def _where(self, name: str) -> str:
        return f"{self._file.path}: tensor {arch.gguf_name(name)!r}"
