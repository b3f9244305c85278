"""Safetensors files, written one piece of a tensor at a time: a file may be larger than memory.

Source: the safetensors format, https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

ALIGNMENT = 64  # bytes; what XLA on CPU asks of a buffer it shall use in place
DTYPE_NAMES: dict[np.dtype, str] = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.uint8): "U8",
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor to be written, produced when its turn comes.

    Attributes:
        name, dtype, shape: as in the file.
        parts: yields consecutive pieces that together have `shape`.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[np.ndarray]]

    @classmethod
    def of(cls, name: str, array: np.ndarray) -> Tensor:
        """A tensor that is there already."""
        return cls(name, array.dtype, array.shape, lambda: [array])

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    path: Path,
    tensors: Sequence[Tensor],
    metadata: Mapping[str, str],
    on_bytes: Callable[[int], None] = lambda _: None,
) -> None:
    """Write a file, one piece of a tensor at a time.

    Args:
        path: of the file, which is replaced if there is one.
        tensors: in file order.
        metadata: of the header.
        on_bytes: told of every piece written.

    Raises:
        ValueError: pieces that do not make up the tensor.
        OSError: the file cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-(8 + len(encoded)) % ALIGNMENT)  # so that the first tensor is aligned
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            written = 0
            for part in tensor.parts():
                piece = np.ascontiguousarray(part, tensor.dtype).reshape(-1).view(np.uint8)
                file.write(piece.data)
                written += piece.nbytes
                on_bytes(piece.nbytes)
            if written != tensor.nbytes:
                raise ValueError(
                    f"{tensor.name} came with {written:,} bytes; wanted {tensor.nbytes:,}"
                )
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            # Out of the page cache, which holds it in pieces as small as they were written: whoever
            # maps the file gets large pages only where it is read anew.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
