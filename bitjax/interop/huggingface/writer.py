"""Checkpoints out as Hugging Face folders that transformers loads; one tensor in memory at a time.

Matrices are as the form says (`target`), packed scales float32: codes and scales are those of the
checkpoint to the bit. Everything else is of one dtype, for transformers 5.23 loads a packed folder
in the dtype of its files and fails where they are mixed. In bfloat16, weights that are no bfloat16
numbers are rounded; master weights before they are quantised again.

The folder is written beside its place under another name, and moved there when it is complete.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from bitjax.config import DType
from bitjax.interop.checkpoint import Checkpoint, Ternary, layer_of, tensor_shapes
from bitjax.interop.huggingface.card import model_card
from bitjax.interop.huggingface.codes import pack_codes, packed_shape
from bitjax.interop.huggingface.names import is_matrix, scale_name, tensor_name
from bitjax.interop.huggingface.target import Form, Target, plan, token_ids
from bitjax.interop.tokenizers import write_huggingface_tokenizer
from bitjax.quant import quantize_matrix, require_finite
from bitjax.safetensors_writer import Tensor, write_safetensors
from bitjax.text import TextTokenizer
from bitjax.tokenizer import ByteTokenizer

SHARD_BYTES = 5_000_000_000  # of a file; hubs take more, but downloads of less restart sooner
FLOAT32 = np.dtype(np.float32)
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
CHUNK_ROWS = 4096  # converted together


def write_huggingface(
    folder: Path,
    checkpoint: Checkpoint,
    form: Form = "packed",
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    rest: DType = "bfloat16",
    on_bytes: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write a folder for transformers.

    Args:
        folder: to be.
        checkpoint: the model.
        form: "packed" (two bits a weight), or "bfloat16" or "float32" (master weights, or those
            of a full-precision model).
        overwrite: replace the folder if there is one.
        shard_bytes: of a safetensors file; a larger tensor has a file of its own.
        rest: dtype of what is not packed, in the packed form.
        on_bytes: told how many bytes of tensors are written, and of how many.

    Raises:
        ValueError: transformers has no such model, said before anything is written; a folder that
            is there already; weights that are not finite; or the folder cannot be written.
    """
    if form not in ("packed", "bfloat16", "float32"):
        raise ValueError(f"form={form!r} is not packed, bfloat16 or float32")
    tokenizer = checkpoint.tokenizer
    bos = tokenizer.special.bos if isinstance(tokenizer, TextTokenizer) else None
    eos = () if tokenizer is None else tokenizer.stop
    target = plan(checkpoint, form, rest if form == "packed" else form, bos, eos)
    require_replaceable(folder, overwrite)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}.new")
        temporary.mkdir()
        try:
            shards = _shards(list(_tensors(checkpoint, target)), shard_bytes)
            _write_tensors(temporary, shards, on_bytes)
            _write_json(temporary / "config.json", target.settings)
            generation = {"_from_model_config": True, **token_ids(bos, eos)}
            _write_json(temporary / "generation_config.json", generation)
            if isinstance(tokenizer, TextTokenizer | ByteTokenizer):
                write_huggingface_tokenizer(temporary, tokenizer)
            (temporary / "README.md").write_text(model_card(folder.name, checkpoint, target, form))
            _move(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise ValueError(f"cannot write {folder}: {error.strerror or error}") from None


def require_replaceable(folder: Path, overwrite: bool) -> None:
    """Refuse a place that is taken by anything but, if told to overwrite, a model's folder.

    Raises:
        ValueError: the place is taken.
    """
    if not os.path.lexists(folder):
        return
    if not overwrite:
        raise ValueError(f"{folder} exists already; say so if it shall be overwritten")
    ours = folder.is_dir() and not folder.is_symlink()
    inside = sorted(folder.iterdir()) if ours else []
    folders = [path.name for path in inside if path.is_dir()]
    if not ours or folders or (inside and not (folder / "config.json").is_file()):
        what = f"it holds the folder {folders[0]}" if folders else "it is no folder of a model"
        raise ValueError(f"{folder} is not overwritten: {what}")


def _tensors(checkpoint: Checkpoint, target: Target) -> Iterator[Tensor]:
    config, family = checkpoint.config, target.family
    for name, shape in tensor_shapes(config).items():
        stored = tensor_name(name, family)
        quantized = is_matrix(name) and not config.is_float_layer(layer_of(name))
        if quantized and target.storing == "packed":
            yield from _packed(checkpoint, name, stored, scale_name(name, family), shape)
            continue
        dense = quantized and target.storing == "dense" and config.weights != "float"
        dtype = np.dtype(DTYPES[target.dtype])
        parts = functools.partial(_converted, checkpoint, name, dtype, dense)
        yield Tensor(stored, dtype, shape, parts)


def _converted(
    checkpoint: Checkpoint, name: str, dtype: np.dtype, dense: bool
) -> Iterator[np.ndarray]:
    """A tensor as floats, some rows at a time; `dense`: of a ternary matrix."""
    value: np.ndarray | Ternary = _ternary(checkpoint, name) if dense else checkpoint.read(name)
    if isinstance(value, Ternary) and not dense:
        raise ValueError(f"{checkpoint.origin}: {name} is ternary already; wanted floats")
    values = value.codes if isinstance(value, Ternary) else value
    for i in range(0, len(values), CHUNK_ROWS):
        part = values[i : i + CHUNK_ROWS]
        if isinstance(value, Ternary):
            rows = np.broadcast_to(value.scale, values.shape[:1])
            part = part * rows[i : i + CHUNK_ROWS, None]
        with np.errstate(over="ignore"):  # and said below
            part = part.astype(dtype)
        require_finite(f"{checkpoint.origin}: {name} as {dtype}", part)
        yield part


def _packed(
    checkpoint: Checkpoint, name: str, stored: str, scale_at: str, shape: tuple[int, ...]
) -> Iterator[Tensor]:
    """Codes, then the scale that they leave behind."""
    scales: list[np.ndarray] = []

    def codes() -> Iterator[np.ndarray]:
        matrix = _ternary(checkpoint, name)
        scale = np.unique(matrix.scale)
        if scale.size != 1:
            raise ValueError(
                f"{checkpoint.origin} cannot be written for transformers: {name} has "
                f"{scale.size} scales, of which its packed layers have one"
            )
        scales.append(scale)
        yield pack_codes(matrix.codes)

    yield Tensor(stored, np.dtype(np.uint8), packed_shape(*shape), codes)
    yield Tensor(scale_at, FLOAT32, (1,), lambda: [scales.pop()])


def _ternary(checkpoint: Checkpoint, name: str) -> Ternary:
    value = checkpoint.read(name)
    if isinstance(value, Ternary):
        require_finite(f"{checkpoint.origin}: the scale of {name}", value.scale)
        return value
    require_finite(f"{checkpoint.origin}: {name}", value)
    config = checkpoint.config
    return Ternary(*quantize_matrix(config.weights, value, config.weight_scale))


def _shards(tensors: list[Tensor], shard_bytes: int) -> list[list[Tensor]]:
    """Tensors by file, in order; a scale stays with its codes."""
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        scale = tensor.name.endswith("weight_scale")
        if shards[-1] and size + tensor.nbytes > shard_bytes and not scale:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _write_tensors(
    folder: Path, shards: list[list[Tensor]], on_bytes: Callable[[int, int], None]
) -> None:
    total, done = sum(tensor.nbytes for shard in shards for tensor in shard), 0

    def written(count: int) -> None:
        nonlocal done
        done += count
        on_bytes(done, total)

    placed: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        many = f"model-{i:05}-of-{len(shards):05}.safetensors"
        file = many if len(shards) > 1 else "model.safetensors"
        write_safetensors(folder / file, shard, {"format": "pt"}, written)
        placed |= {tensor.name: file for tensor in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        _write_json(folder / "model.safetensors.index.json", index)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _move(temporary: Path, folder: Path) -> None:
    """Put the new folder in its place; the old one goes when the new one is there."""
    if not os.path.lexists(folder):
        os.replace(temporary, folder)
        return
    old = temporary.with_suffix(".old")
    os.replace(folder, old)
    try:
        os.replace(temporary, folder)
    except OSError:
        os.replace(old, folder)
        raise
    shutil.rmtree(old)
