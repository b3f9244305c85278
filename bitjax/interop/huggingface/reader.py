"""Hugging Face folders in: config.json and safetensors files, seen as a `Checkpoint`.

Shapes, dtypes and names are checked when a folder is opened; values when a tensor is read. Of the
forms a matrix may have (`settings`), the reader makes codes and a scale that multiplies, or hands
on master weights.

A folder without a `quantization_config` may hold ternary weights all the same, written as floats
(SpectraSuite's TriLM): it is taken for one if every matrix of its first block is exactly ternary,
and then every other must be. Their activations are floats. Scales of theirs that differ between
shards become scales of rows. Where they differ between columns (o and down projections), they move
to the rows that make those columns: w[:, k] * c_k applied to x is w[:, k] applied to c_k * x_k,
and x_k is linear in row k of `up`, or in the rows of `v` that its head reads; there are no norms in
between. For float16 and bfloat16 the product of the two scales is exact in float32.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path

import numpy as np

from bitjax.interop.checkpoint import Checkpoint, Ternary, layer_of, tensor_shapes
from bitjax.interop.huggingface.codes import ExactTernary, exact_ternary, packed_shape, unpack_codes
from bitjax.interop.huggingface.names import (
    LAYER_NAME,
    LLAMA,
    MATRICES,
    is_matrix,
    scale_name,
    tensor_name,
)
from bitjax.interop.huggingface.settings import Settings, parse_settings
from bitjax.interop.safetensors_files import StoredTensor, open_folder, read_json
from bitjax.interop.tokenizers import read_huggingface_tokenizer

FLOATS = ("F32", "F16", "BF16")
# Tables that older versions of transformers stored although they are computed.
COMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
# Matrices whose columns a row-parallel layer splits, and those whose rows make these columns.
ROW_PARALLEL = {"attention.v": "attention.o", "ffn.up": "ffn.down"}


def read_huggingface(folder: Path) -> Checkpoint:
    """A folder as transformers writes it.

    Raises:
        ValueError: files that cannot be read, a model that bitjax cannot express, or tensors that
            are not those of the configuration.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder")
    settings = parse_settings(read_json(folder / "config.json"), folder / "config.json")
    return _Folder(folder, settings, open_folder(folder)).checkpoint()


class _Folder:
    def __init__(self, path: Path, settings: Settings, tensors: dict[str, StoredTensor]) -> None:
        self.path, self.settings, self.tensors = path, settings, tensors
        self.family, self.config = settings.family, settings.config
        layers = {found[1] for name in tensors if (found := LAYER_NAME.match(name))}
        if len(layers) != self.config.num_layers:
            raise ValueError(
                f"{path} holds {len(layers)} layers; its config.json has num_hidden_layers="
                f"{self.config.num_layers}"
            )
        self.shapes = tensor_shapes(self.config)
        expected = {stored for name, shape in self.shapes.items()
                    for stored in self._check(name, shape)}  # fmt: skip
        self._check_rest(sorted(tensors.keys() - expected))
        self.column_scales = functools.lru_cache(maxsize=2)(self._column_scales)
        self.exact = settings.linear_class is None and not settings.online and self._is_ternary()
        if self.exact:
            self.config = dataclasses.replace(self.config, weights="ternary")

    def checkpoint(self) -> Checkpoint:
        tokenizer = read_huggingface_tokenizer(self.path)
        return Checkpoint(str(self.path), self.config, self.read, tokenizer)

    def read(self, name: str) -> np.ndarray | Ternary:
        """The tensor of a name in `tensor_shapes`."""
        tensor = self.tensors[tensor_name(name, self.family)]
        if not is_matrix(name):
            return tensor.array()
        if self.exact:
            return self._exact_matrix(name)
        scale = self.tensors.get(scale_name(name, self.family))
        if scale is None:
            return tensor.array()
        if tensor.dtype == "U8":
            try:
                codes = unpack_codes(tensor.array(), self.shapes[name][0])
            except ValueError as error:
                raise ValueError(f"{tensor.where} {error}") from None
        else:
            codes = _whole_codes(tensor)
        return Ternary(codes, self._multiplier(scale))

    def _check(self, name: str, shape: tuple[int, ...]) -> list[str]:
        """Refuse a tensor of another shape or dtype than the configuration needs.

        Returns:
            The names of what the tensor consists of.
        """
        stored, wanted = tensor_name(name, self.family), f"a float {list(shape)}"
        tensor = self._take(stored, wanted)
        floats = tensor.dtype in FLOATS and tensor.shape == shape
        scale_at = scale_name(name, self.family) if is_matrix(name) else ""
        linear_class, online = self.settings.linear_class, self.settings.online
        if not scale_at or linear_class is None or online or (
            self.config.is_float_layer(layer_of(name))
        ):  # fmt: skip
            if not floats:
                raise _mismatch(tensor, wanted)
            return [stored]
        if floats and linear_class == "bitlinear" and scale_at not in self.tensors:
            return [stored]  # master weights
        wanted = f"packed U8 {list(packed_shape(*shape))}"
        whole = floats and linear_class == "autobitlinear"
        if not whole and (tensor.dtype, tensor.shape) != ("U8", packed_shape(*shape)):
            raise _mismatch(tensor, wanted)
        scale = self._take(scale_at, "a float [1]")
        if scale.dtype not in FLOATS or scale.shape not in ((), (1,)):
            raise _mismatch(scale, "a float [1]")
        return [stored, scale_at]

    def _take(self, stored: str, wanted: str) -> StoredTensor:
        if stored not in self.tensors:
            raise ValueError(f"{self.path}: {stored} is missing; the configuration needs {wanted}")
        return self.tensors[stored]

    def _check_rest(self, rest: list[str]) -> None:
        """Refuse tensors that have no place, but for those that say nothing new."""
        for name in rest:
            tensor = self.tensors[name]
            if name == "lm_head.weight":  # of a tied head
                embedding = self.tensors["model.embed_tokens.weight"]
                same = (tensor.dtype, tensor.shape) == (embedding.dtype, embedding.shape)
                if same and _equal(tensor.raw, embedding.raw):
                    continue
                raise ValueError(
                    f"{tensor.where} differs from model.embed_tokens.weight; config.json has "
                    "tie_word_embeddings=true"
                )
            if name.endswith(".bias"):
                raise ValueError(f"{tensor.where}: bitjax's linear layers have no biases")
            if name.startswith("lm_head."):
                raise ValueError(f"{tensor.where}: bitjax's head is not ternary")
            if not COMPUTED.fullmatch(name):
                raise ValueError(
                    f"{tensor.where} has no place in the model of config.json"
                    + (f", as {len(rest) - 1} more" if len(rest) > 1 else "")
                )

    def _multiplier(self, tensor: StoredTensor) -> np.ndarray:
        """The scale of a packed matrix, float32 []."""
        scale = tensor.array().reshape(()).astype(np.float32)
        if not np.isfinite(scale) or scale < 0:
            raise ValueError(f"{tensor.where} is {scale}; a scale is finite and not negative")
        if self.settings.linear_class == "autobitlinear":
            return scale
        with np.errstate(divide="ignore", over="ignore"):
            inverse = np.float32(1) / scale
        if not np.isfinite(inverse):
            raise ValueError(f"{tensor.where} is {scale}; weights are divided by it")
        return np.asarray(inverse, np.float32)

    def _is_ternary(self) -> bool:
        """Whether every matrix of the first block is exactly ternary."""
        if self.family is not LLAMA:
            return False
        first = (self.tensors[tensor_name(f"blocks.0.{part}", LLAMA)] for part in MATRICES)
        return all(exact_ternary(tensor.array()) is not None for tensor in first)

    def _exact(self, name: str) -> ExactTernary:
        tensor = self.tensors[tensor_name(name, self.family)]
        found = exact_ternary(tensor.array())
        if found is None:
            raise ValueError(
                f"{tensor.where} is not ternary (each row or each column one number, its opposite "
                "and 0), as the matrices of the first layer are"
            )
        return found

    def _exact_matrix(self, name: str) -> Ternary:
        _, layer, part = name.split(".", 2)
        matrix = self._exact(name)
        if matrix.cols is not None and part not in ROW_PARALLEL.values():
            raise ValueError(f"{self.path}: {tensor_name(name, LLAMA)} has scales of columns")
        if part not in ROW_PARALLEL:
            return Ternary(matrix.codes, matrix.rows)
        inherited = self.column_scales(f"blocks.{layer}.{ROW_PARALLEL[part]}")
        if inherited is None:
            return Ternary(matrix.codes, matrix.rows)
        # A column without a weight takes nothing from its row, whatever its scale.
        return Ternary(matrix.codes, matrix.rows * np.where(inherited > 0, inherited, 1))

    def _column_scales(self, name: str) -> np.ndarray | None:
        """The scales of a matrix's columns, one for each row that makes them; None without any."""
        cols = self._exact(name).cols
        if cols is None or name.endswith("ffn.down"):
            return cols
        G, h = self.config.num_kv_heads, self.config.head_dim
        of_heads = cols.reshape(G, -1, h)  # of the heads that read a key-value head
        shared = of_heads.max(axis=1, keepdims=True)
        if not ((of_heads == shared) | (of_heads == 0)).all():
            raise ValueError(
                f"{self.path}: the scales of {tensor_name(name, LLAMA)} differ between heads that "
                "read the same key-value head"
            )
        return shared.reshape(-1)


def _whole_codes(tensor: StoredTensor) -> np.ndarray:
    """Codes that are stored as floats -1, 0 and 1."""
    found = exact_ternary(tensor.array())
    if found is None or found.cols is not None or (np.any(found.codes) and np.any(found.rows != 1)):
        raise ValueError(f"{tensor.where} holds other numbers than -1, 0 and 1, and has a scale")
    return found.codes


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether bytes are the same, a few megabytes at a time."""
    return all(np.array_equal(a[i : i + 2**22], b[i : i + 2**22]) for i in range(0, len(a), 2**22))


def _mismatch(tensor: StoredTensor, wanted: str) -> ValueError:
    return ValueError(
        f"{tensor.where} is {tensor.dtype} {list(tensor.shape)}; the configuration needs {wanted}"
    )
