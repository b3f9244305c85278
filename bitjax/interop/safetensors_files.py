"""Safetensors files that somebody else wrote, and those written for others: bounded and streamed.

A file is an 8-byte length, a JSON header of that length, and the tensors' bytes. What is read is
checked before it is used: the header's size, JSON without repeated names, offsets that neither
overlap nor leave the file, sizes that are those of dtype and shape. Tensors are views of a
read-only memory map, so opening a file of any size costs its header.

Source: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from bitjax.model.files import no_safetensors

# An entry of a header takes about 150 bytes: room for 50,000 tensors, where Llama 405B has 1,137.
MAX_HEADER_BYTES = 8 * 2**20
MAX_JSON_BYTES = 8 * 2**20  # of a configuration or an index, whose entries are smaller still
DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U8": np.dtype(np.uint8),
}


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: no readable file, larger than `limit` bytes, no JSON object, a repeated name, or
            a number that JSON does not have (NaN, Infinity).
    """
    try:
        if not path.is_file():
            raise ValueError(f"{path} is no file")
        with path.open("rb") as file:
            text = file.read(limit + 1)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    if len(text) > limit:
        raise ValueError(f"{path} has more than {limit:,} bytes; no such file needs as many")
    return parse_json(text, str(path))


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """The object that JSON text holds; `where` names it in errors.

    Raises:
        ValueError: as `read_json`.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else error
        raise ValueError(f"{where} is not valid JSON: {reason}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} holds a {type(value).__name__}; wanted a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {name:.80} comes twice")
        found[name] = value
    return found


def _no_number(constant: str) -> None:
    raise ValueError(f"{constant} is not a number of JSON")


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of an open file.

    Attributes:
        path: of the file.
        name: in the file.
        dtype: as the file says it: "F32", "BF16", "I64", ...
        shape: of the tensor.
        raw: its bytes, a view of the file.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    raw: np.ndarray

    @property
    def where(self) -> str:
        """File and tensor, for messages."""
        return f"{self.path}: {self.name}"

    def array(self) -> np.ndarray:
        """The tensor, read-only, of a dtype in `DTYPES`."""
        return self.raw.view(DTYPES[self.dtype]).reshape(self.shape)


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a file, by name.

    Raises:
        ValueError: no readable safetensors file, or one with an oversized or damaged header.
    """
    try:
        if not path.is_file():  # a pipe or a device would be waited for
            raise ValueError(f"{path} is no file")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise ValueError(
                    f"{path} is not a safetensors file: its header would take {length:,} bytes, "
                    f"and {MAX_HEADER_BYTES:,} are the most"
                )
            header = parse_json(file.read(length), f"{path}: its header")
        with safetensors.safe_open(path, framework="numpy"):
            pass  # the library checks dtypes, shapes and offsets, against each other and the file
        data = np.memmap(path, np.uint8, mode="r")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    except safetensors.SafetensorError as error:
        raise ValueError(no_safetensors(path, error)) from None
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if not name.isprintable():  # nor would be the messages that quote it
            raise ValueError(f"{path}: the tensor name {name!r:.80} is not printable")
        first, last = (8 + length + offset for offset in entry["data_offsets"])
        raw = np.asarray(data[first:last])
        tensors[name] = StoredTensor(path, name, entry["dtype"], tuple(entry["shape"]), raw)
    return tensors


def open_folder(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of `model.safetensors` or of the shards its index names.

    Raises:
        ValueError: there are neither, only pickles, or files that contradict the index.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return open_safetensors(single)
    if not index.exists():
        raise ValueError(f"{folder} {_what_else(folder)}")
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(s, str) for s in placed.values()):
        raise ValueError(f"{index} has no weight_map of tensor names to files")
    shards = sorted(set(placed.values()))
    for shard in shards:
        # Only names of files beside the index: no folders, no drives, no "..".
        if Path(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise ValueError(
                f"{index} names the file {shard!r:.80}; wanted the name of a safetensors file "
                "in the same folder"
            )
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        for name, tensor in open_safetensors(folder / shard).items():
            if name in tensors:
                raise ValueError(f"{tensor.where} is in {tensors[name].path.name} as well")
            if placed.get(name) != shard:
                raise ValueError(
                    f"{tensor.where} is there; {index.name} has it in {placed.get(name, 'no file')}"
                )
            tensors[name] = tensor
    missing = sorted(placed.keys() - tensors.keys())
    if missing:
        raise ValueError(f"{folder / placed[missing[0]]}: {missing[0]} is missing")
    return tensors


def _what_else(folder: Path) -> str:
    """Why a folder without safetensors files cannot be read."""
    pickles = [
        file.name
        for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt")
        for file in sorted(folder.glob(pattern))
    ]
    if not pickles:
        return "has no model.safetensors and no model.safetensors.index.json"
    return (
        f"has its weights in {pickles[0]}, a Python pickle, which may run any code when it is "
        "read: only safetensors files are (transformers' save_pretrained writes them)"
    )
