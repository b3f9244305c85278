"""Model files: one safetensors file, float or packed, with the configuration in its metadata.

Metadata key "bitjax" holds JSON `{"format": 2, "config": {...}, "tokenizer": "bytes"}`, or another
tokenizer's settings and its JSON as tensor (`bitjax.model.stored_tokenizer`). The other tensors
are named by their path in the model. A matrix is either

    <path>                  float32 or bfloat16 [rows, cols]

or packed, its layout (`bitjax.packing`, format version 2) being part of the name:

    <path>.<layout>         uint8 [row blocks, column blocks, 64]
    <path>.scale            float32 [] or [rows], multiplies
    <path>.multipliers      uint8 [row blocks, groups, 16], with int4
    <path>.columns          uint8 [column tiles, cols, 64], ternary, optional

Linear layers are packed as ternary2 or ternary1.6, embedding and head as int8 or int4. A bfloat16
head (the embedding, if tied) may have a screen (`bitjax.packing.Screen`), which makes its largest
logits cheap and keeps them exact:

    screen.int4, screen.scale, screen.multipliers    as above, [rows, 32 * ceil(cols / 31)]
    screen.dither           float32 [cols]
    screen.spreads, screen.norms    float32 [rows]

Tensors start at multiples of 64 bytes, so that a memory map of the file is used in place, without
a copy. (Those whose size is no multiple of 64 bytes come last, and may be copied.) Any
safetensors reader reads the file.

Source: the safetensors format, https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
from flax import nnx

from bitjax.config import ModelConfig, from_dict, to_json
from bitjax.model.stored_tokenizer import TENSOR, read_tokenizer, stored_tokenizer
from bitjax.model.transformer import Transformer, abstract_model, bit_linears
from bitjax.ops import Impl
from bitjax.packing import LAYOUTS, PackedWeights, Screen, expanded_cols, validate
from bitjax.quant import require_finite
from bitjax.safetensors_writer import ALIGNMENT, Tensor, write_safetensors
from bitjax.tokenizer import BYTES, Tokenizer

FILE_FORMAT = 2
TABLES = ("embedding", "head")
DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U8": np.dtype(np.uint8),
}


def save_model(path: Path, model: Transformer) -> None:
    """Write a model; the file appears under its name only when complete.

    Raises:
        ValueError: a weight is not finite, or the folder cannot be written.
    """
    tensors = []
    for name, parameter in parameters(model):
        value = parameter.get_value()
        if not isinstance(value, PackedWeights | Screen):
            require_finite(name, value)
        arrays = stored_arrays(name, value)
        tensors += [Tensor.of(stored, np.asarray(array)) for stored, array in arrays.items()]
    write_model_file(path, model.config, tensors, model.tokenizer)


def stored_arrays(name: str, value: jax.Array | PackedWeights | Screen) -> dict[str, jax.Array]:
    """The arrays that a parameter consists of, by their names in a file."""
    if isinstance(value, Screen):
        rest = {f"{name}.{part}": getattr(value, part) for part in ("dither", "spreads", "norms")}
        return stored_arrays(name, value.weights) | rest
    if isinstance(value, PackedWeights):
        arrays = {f"{name}.{value.layout}": value.codes, f"{name}.scale": value.scale}
        if value.multipliers is not None:
            arrays[f"{name}.multipliers"] = value.multipliers
        if value.columns is not None:
            arrays[f"{name}.columns"] = value.columns
        return arrays
    return {name: value}


def write_model_file(
    path: Path, config: ModelConfig, tensors: Sequence[Tensor], tokenizer: Tokenizer = BYTES
) -> None:
    """Write tensors with a configuration; the file appears under its name only when complete.

    Raises:
        ValueError: the file cannot be written, or a tokenizer that files cannot hold.
    """
    stored, text = stored_tokenizer(tokenizer)
    about = {
        "format": FILE_FORMAT,
        "config": json.loads(to_json(config)),
        "tokenizer": stored,
    }
    if text is not None:
        tensors = [*tensors, Tensor.of(TENSOR, text)]
    try:
        _write(path, tensors, {"bitjax": json.dumps(about)})
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from None


def load_model(
    path: Path, dtype: str = "float32", impl: Impl = "auto", check: bool = True
) -> Transformer:
    """Read a model file; large tensors stay in the memory-mapped file.

    Args:
        path: written by `save_model`.
        dtype: of activations.
        impl: of the packed products, see `bitjax.ops`.
        check: read the whole file and refuse weights that stand for nothing. Without, packed
            weights are read from the disk as they are needed; what an invalid byte then does is
            give wrong numbers, never more.

    Raises:
        ValueError: not a model file, a damaged one, or one whose tensors are not those of its
            configuration. Nothing of it is used before all of it is checked.
    """
    about, tensors = _read_safetensors(path)
    config, stored = read_config(path, about)
    text = None if stored == BYTES.name else tensors.pop(TENSOR, None)
    tokenizer = read_tokenizer(path, stored, text, config.vocab_size)
    _check_layers(path, config, tensors)
    try:
        model = abstract_model(config, dtype)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for name, parameter in parameters(model):
        parameter.set_value(_take(path, name, parameter.get_value(), tensors, check))
    head = (model.embedding if model.head is None else model.head).get_value()
    screen = _take_screen(path, head, tensors, check)
    model.screen = None if screen is None else nnx.Param(screen)
    if tensors:
        raise ValueError(f"{path} holds tensors that its configuration has no place for: "
                         f"{', '.join(sorted(tensors)[:3])}")  # fmt: skip
    model.impl, model.tokenizer = impl, tokenizer
    for name, layer in bit_linears(model):
        layer.impl = impl
        if layer.weights == "float" and isinstance(layer.weight.get_value(), PackedWeights):
            raise ValueError(f"{path}: {name} is packed; its configuration has it in float")
    return model


def tensor_table(path: Path) -> list[tuple[str, str, tuple[int, ...], int]]:
    """(name, dtype, shape, bytes) of every tensor in a file, in file order.

    Raises:
        ValueError: not a readable safetensors file.
    """
    header, _ = _read_header(path)
    rows = [
        (name, entry["dtype"], tuple(entry["shape"]), entry["data_offsets"])
        for name, entry in header.items()
    ]
    return [
        (name, dtype, shape, offsets[1] - offsets[0])
        for name, dtype, shape, offsets in sorted(rows, key=lambda row: row[3])
    ]


def parameters(model: Transformer) -> Iterator[tuple[str, nnx.Param]]:
    """Every parameter with its dotted path, which names it in a file."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Param):
            yield ".".join(map(str, path)), node


def read_config(path: Path, about: str) -> tuple[ModelConfig, Any]:
    """The configuration in a file's metadata, and what it says of the tokenizer, unchecked.

    Raises:
        ValueError: malformed, or of another version.
    """
    try:
        parsed = json.loads(about)
        found, tokenizer, config = parsed["format"], parsed["tokenizer"], parsed["config"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{path}: its bitjax metadata cannot be read") from None
    if found != FILE_FORMAT:
        raise ValueError(f"{path}: model file format {found!r}; this version reads {FILE_FORMAT}")
    try:
        return from_dict(ModelConfig, config, "model."), tokenizer
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _check_layers(path: Path, config: ModelConfig, tensors: Iterable[str]) -> None:
    """Refuse a number of layers that the file does not hold, before as many are built."""
    held = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    if held != config.num_layers:
        raise ValueError(
            f"{path} holds {held} layers; its configuration has num_layers={config.num_layers}"
        )


def _take(
    path: Path, name: str, like: Any, tensors: dict[str, np.ndarray], check_codes: bool
) -> Any:
    """Remove one parameter from `tensors`, checked against the shape the model needs."""
    where = f"{path}: {name}"
    layouts = [layout for layout in LAYOUTS if f"{name}.{layout}" in tensors]
    if layouts:
        layout = layouts[0]
        tables = (*TABLES, "screen")
        fits = name.endswith(".weight") if layout.startswith("ternary") else name in tables
        if not fits:
            raise ValueError(
                f"{where} cannot be {layout}; linear layers are packed as ternary, "
                "embedding and head as int4 or int8"
            )
        codes, scale = tensors.pop(f"{name}.{layout}"), tensors.pop(f"{name}.scale", None)
        multipliers = tensors.pop(f"{name}.multipliers", None)
        columns = tensors.pop(f"{name}.columns", None)
        if scale is None:
            raise ValueError(f"{where}.scale is missing")
        rows, cols = like.shape
        packed = PackedWeights(codes, scale, multipliers, rows, cols, layout, columns)  # type: ignore[arg-type]
        validate(where, packed, check_codes)
        return jax.tree.map(_in_place, packed)
    if name not in tensors:
        raise ValueError(f"{where} is missing")
    value = tensors.pop(name)
    vector = len(like.shape) == 1 or name.endswith(".norm.scale")
    if value.shape != like.shape or value.dtype == np.uint8 or (
        vector and value.dtype != np.float32
    ):  # fmt: skip
        raise ValueError(
            f"{where} is {value.dtype}{list(value.shape)}; the configuration needs a "
            f"{'float32' if vector else 'float'} {list(like.shape)}"
        )
    if check_codes:
        require_finite(where, value)
    return _in_place(value)


def _take_screen(
    path: Path, head: Any, tensors: dict[str, np.ndarray], check_codes: bool
) -> Screen | None:
    """Remove the screen of the head from `tensors`, if there is one."""
    if "screen.int4" not in tensors:
        return None
    where = f"{path}: screen"
    if isinstance(head, PackedWeights) or head.dtype != jnp.bfloat16:
        raise ValueError(f"{where} needs a bfloat16 head")
    rows, cols = head.shape
    expanded = jax.ShapeDtypeStruct((rows, expanded_cols(cols)), jnp.float32)
    parts = {}
    for part, size in (("dither", cols), ("spreads", rows), ("norms", rows)):
        array = tensors.pop(f"screen.{part}", None)
        if array is None:
            raise ValueError(f"{where}.{part} is missing")
        if array.shape != (size,) or array.dtype != np.float32 or not np.isfinite(array).all():
            raise ValueError(
                f"{where}.{part} is {array.dtype}{list(array.shape)}; "
                f"a {rows} x {cols} head needs finite float32[{size}]"
            )
        parts[part] = _in_place(array)
    weights = _take(path, "screen", expanded, tensors, check_codes)
    if weights.scale.shape != (rows,):
        raise ValueError(f"{where}.scale must have {rows} values, one a row")
    return Screen(weights, **parts)


def _in_place(array: np.ndarray) -> jax.Array:
    """A JAX array over the same memory where its alignment allows."""
    return jax.device_put(array, jax.local_devices()[0], may_alias=True)


def _write(path: Path, tensors: Sequence[Tensor], metadata: dict[str, str]) -> None:
    """Tensors that keep what follows them aligned come first."""
    order = sorted(tensors, key=lambda tensor: (tensor.nbytes % ALIGNMENT != 0, tensor.name))
    temporary = path.with_name(path.name + ".tmp")
    try:
        write_safetensors(temporary, order, metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Tensor entries, and the offset of the data; the safetensors library checks them first.

    It refuses headers that are oversized or no JSON, and offsets that overlap, leave gaps, leave
    the file or contradict dtype and shape.
    """
    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(no_safetensors(path, error)) from None
    header.pop("__metadata__", None)
    for name in header:
        if not name.isprintable():  # nor would be the messages that quote it
            raise ValueError(f"{path}: the tensor name {name!r:.80} is not printable")
    return header, 8 + length


def no_safetensors(path: Path, error: Exception) -> str:
    """What to say of a file that the safetensors library refuses."""
    cut = "; it may have been cut off" if "not fully covered" in str(error) else ""
    return f"{path} is not a safetensors file: {error}{cut}"


def _read_safetensors(path: Path) -> tuple[str, dict[str, np.ndarray]]:
    """The bitjax metadata and every tensor, as views of a read-only memory map."""
    header, start = _read_header(path)
    with safetensors.safe_open(path, framework="numpy") as file:
        about = (file.metadata() or {}).get("bitjax")
    if about is None:
        raise ValueError(f"{path} has no bitjax metadata; it is not a bitjax model file")
    data = _mapped(path, header, start)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{path}: {name} is {entry['dtype']}; known are {', '.join(DTYPES)}")
        first, last = entry["data_offsets"]
        raw = np.asarray(data[start + first : start + last])
        tensors[name] = raw.view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return about, tensors


def _mapped(path: Path, header: dict[str, Any], start: int) -> np.ndarray:
    """The bytes of a file, mapped read-only, in large pages where a token reads all of them.

    With pages of 4 KiB a token of a 2B model translates some 150,000 addresses (what that costs:
    experiments/inference_limit). Tables of which a token takes single rows keep small pages: large
    ones would bring all of the table into memory.

    Args:
        path: of the file.
        header: its tensors.
        start: of the tensors' bytes.
    """
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        screened = any(name.startswith("screen.") for name in header)
        headed = any(name.partition(".")[0] == "head" for name in header)
        by_rows = TABLES if screened else TABLES[:1] if headed else ()
        first = 0
        tables = [
            entry["data_offsets"]
            for name, entry in header.items()
            if name.partition(".")[0] in by_rows
        ]
        for begin, end in sorted(tables):
            _ask_for_large_pages(mapped, first, start + begin)
            first = start + end
        _ask_for_large_pages(mapped, first, len(mapped))
    return np.frombuffer(mapped, np.uint8)


def _ask_for_large_pages(mapped: mmap.mmap, first: int, last: int) -> None:
    """Of whole pages in a range of bytes."""
    first = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
    with contextlib.suppress(OSError):  # a kernel without them
        if first < last:
            mapped.madvise(mmap.MADV_HUGEPAGE, first, last - first)
