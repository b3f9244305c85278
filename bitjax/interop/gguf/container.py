"""The GGUF container: typed metadata, a table of tensors, and their data; read and written.

    "GGUF"  version u32 (2 or 3)  tensors u64  entries u64
    entry:  key string, value type u32, value          string: length u64, UTF-8 bytes
    tensor: name string, dimensions u32, sizes u64 (fastest first), type u32, offset u64
    padding to `general.alignment` (32 unless stated), then the data; offsets count from here

All little-endian. Source: ggml's documentation of the format, docs/gguf.md.

Files are hostile. Every count and length is checked against what is left of the file before it is
used, metadata is limited in bytes and strings, tensors must lie inside the file, aligned and apart.
The tensors stay in the memory-mapped file. So nothing is allocated that the file has not got the
bytes for, but for a few objects per string.

The `gguf` package's own reader is not used: it knows no I2_S, keeps every number of an array as an
object, and on damaged files raises whatever NumPy does; its writer knows no I2_S either.

Deliberately absent: version 1, big-endian files, nested arrays, and models split over files.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bitjax.interop.gguf.blocks import TYPES, TensorType, nbytes

ALIGNMENT = 32  # bytes, where a file does not say otherwise
# Llama 3's vocabulary is 8 MB in 410,000 strings; the largest known are twice that.
MAX_METADATA = 2**26  # bytes of metadata and tensor table together
MAX_STRINGS = 2**21  # strings in arrays of one file
MAX_ENTRIES = 2**16  # metadata entries, and tensors
MAX_NAME = 2**16  # bytes of a key or tensor name
MAX_DIMENSIONS = 4

# Numbers of value types.
BOOL, STRING, ARRAY = 7, 8, 9
NUMBERS: dict[int, np.dtype] = {
    0: np.dtype("u1"), 1: np.dtype("i1"), 2: np.dtype("<u2"), 3: np.dtype("<i2"),
    4: np.dtype("<u4"), 5: np.dtype("<i4"), 6: np.dtype("<f4"), BOOL: np.dtype("?"),
    10: np.dtype("<u8"), 11: np.dtype("<i8"), 12: np.dtype("<f8"),
}  # fmt: skip
UINT32, INT32, FLOAT32, UINT64 = 4, 5, 6, 10
Value = str | bool | int | float | list[str] | np.ndarray


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Attributes:
        type: how its values are stored.
        shape: slowest dimension first, as NumPy has it; the file lists them the other way round.
        offset: of its first byte from the start of the file.
    """

    type: TensorType
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return nbytes(self.type, self.shape)


@dataclasses.dataclass(frozen=True)
class Container:
    """A GGUF file, open.

    Attributes:
        path: of the file.
        metadata: key -> str, bool, int, float, list of str, or array of numbers.
        tensors: by name, in file order.
        data: the whole file, memory-mapped.
    """

    path: Path
    metadata: Mapping[str, Value]
    tensors: Mapping[str, Entry]
    data: np.ndarray

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a tensor, in place: uint8 `[nbytes]`."""
        entry = self.tensors[name]
        return self.data[entry.offset : entry.offset + entry.nbytes]


def open_container(path: Path) -> Container:
    """Read a file's metadata and tensor table.

    Raises:
        ValueError: not a GGUF file, a damaged one, or one beyond the limits above.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if file.read(4) != b"GGUF":
                raise ValueError(f"{path} is not a GGUF file")
            data = np.memmap(file, np.uint8, mode="r")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    cursor = _Cursor(path, data.data[: min(size, MAX_METADATA)], size)
    cursor.at = 4
    version = cursor.number(UINT32)
    if version not in (2, 3):
        swapped = version in (2 << 24, 3 << 24)
        raise ValueError(
            f"{path}: " + ("big-endian GGUF files" if swapped else f"GGUF version {version}")
            + " cannot be read; versions 2 and 3, little-endian, can"
        )  # fmt: skip
    counts = (cursor.number(UINT64), cursor.number(UINT64))
    # The smallest tensor takes 32 bytes of the table, the smallest entry 13.
    for what, count, least in zip(("tensors", "entries"), counts, (32, 13), strict=True):
        if count > MAX_ENTRIES or count * least > size:
            raise ValueError(
                f"{path}: {count} {what}; {min(size // least, MAX_ENTRIES)} "
                "are allowed in a file of this size"
            )
    metadata: dict[str, Value] = {}
    for _ in range(counts[1]):
        key = cursor.name("metadata key")
        if key in metadata:
            raise ValueError(f"{path}: metadata key {key!r} occurs twice")
        metadata[key] = cursor.value(key)
    table = _tensor_table(cursor, counts[0])
    return Container(
        path, metadata, _placed(path, metadata, table, cursor.at, size), np.asarray(data)
    )


def _tensor_table(cursor: _Cursor, count: int) -> dict[str, Entry]:
    """Tensors whose offsets count from the start of the data yet."""
    table: dict[str, Entry] = {}
    for _ in range(count):
        name = cursor.name("tensor name")
        where = f"{cursor.path}: tensor {name!r}"
        if name in table:
            raise ValueError(f"{where} occurs twice")
        dimensions = cursor.number(UINT32)
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise ValueError(
                f"{where} has {dimensions} dimensions; 1 to {MAX_DIMENSIONS} are allowed"
            )
        shape = tuple(cursor.number(UINT64) for _ in range(dimensions))[::-1]
        number, offset = cursor.number(UINT32), cursor.number(UINT64)
        if number not in TYPES:
            raise ValueError(f"{where} is of ggml type {number}, which cannot be read; "
                             f"{', '.join(kind.name for kind in TYPES.values())} can")  # fmt: skip
        kind = TYPES[number]
        if min(shape) < 1 or shape[-1] % kind.values:
            raise ValueError(
                f"{where} has shape {list(shape)}; {kind.name} needs rows of "
                f"a multiple of {kind.values} values, and none of size 0"
            )
        table[name] = Entry(kind, shape, offset)
    return table


def _placed(
    path: Path, metadata: Mapping[str, Value], table: dict[str, Entry], end: int, size: int
) -> dict[str, Entry]:
    """Tensors with offsets from the start of the file, all inside it, aligned and apart."""
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= 2**20 or alignment & (alignment - 1):
        raise ValueError(f"{path}: general.alignment={alignment!r:.40} is not a power of two")
    start = end + -end % alignment
    placed = {
        name: dataclasses.replace(entry, offset=start + entry.offset)
        for name, entry in table.items()
    }
    for name, entry in placed.items():
        if (entry.offset - start) % alignment or entry.offset + entry.nbytes > size:
            raise ValueError(
                f"{path}: tensor {name!r} takes bytes {entry.offset} to "
                f"{entry.offset + entry.nbytes} of {size}, or is not aligned to {alignment}"
            )
    order = sorted(placed, key=lambda name: placed[name].offset)
    for first, second in itertools.pairwise(order):
        if placed[first].offset + placed[first].nbytes > placed[second].offset:
            raise ValueError(f"{path}: tensors {first!r} and {second!r} overlap")
    return placed


class _Cursor:
    """Takes values from the start of a file, none of them beyond its end or the limits."""

    def __init__(self, path: Path, data: memoryview, size: int) -> None:
        self.path = path
        self.at = 0
        self._data = data
        self._size = size
        self._strings = MAX_STRINGS

    def _take(self, length: int) -> int:
        """Offset of the next `length` bytes, which are there."""
        at = self.at
        if at + length > len(self._data):
            if at + length > self._size:
                raise ValueError(f"{self.path} is cut off: {length} bytes wanted at byte {at}")
            raise ValueError(f"{self.path}: more than {MAX_METADATA} bytes of metadata")
        self.at = at + length
        return at

    def number(self, kind: int) -> Any:
        """A number of a value type."""
        dtype = NUMBERS[kind]
        at = self._take(dtype.itemsize)
        return np.frombuffer(self._data, dtype, 1, at)[0].item()

    def string(self, where: str, limit: int) -> str:
        """A string of at most `limit` bytes."""
        (length,) = struct.unpack_from("<Q", self._data, self._take(8))
        if length > limit:
            raise ValueError(f"{self.path}: {where} of {length} bytes; at most {limit} are allowed")
        at = self._take(length)
        try:
            return str(self._data[at : at + length], "utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{self.path}: {where} is not UTF-8") from None

    def name(self, what: str) -> str:
        """A key or the name of a tensor."""
        name = self.string(what, MAX_NAME)
        if not name.isprintable():  # nor would be the messages that quote it
            raise ValueError(f"{self.path}: the {what} {name!r:.80} is not printable")
        return name

    def value(self, key: str) -> Value:
        """The value of a metadata entry."""
        kind = self.number(UINT32)
        if kind == STRING:
            return self.string(key, MAX_METADATA)
        if kind in NUMBERS:
            return self.number(kind)
        if kind != ARRAY:
            raise ValueError(f"{self.path}: {key} has the unknown value type {kind}")
        kind, count = self.number(UINT32), self.number(UINT64)
        if kind in NUMBERS:
            at = self._take(count * NUMBERS[kind].itemsize)
            stored = np.dtype("u1") if kind == BOOL else NUMBERS[kind]
            array = np.frombuffer(self._data, stored, count, at)
            return array != 0 if kind == BOOL else array
        if kind != STRING:
            raise ValueError(f"{self.path}: {key} is an array of value type {kind}, not allowed")
        self._strings -= count
        if self._strings < 0:
            raise ValueError(f"{self.path}: {key} has {count} strings, too many")
        if count * 8 > len(self._data) - self.at:
            raise ValueError(
                f"{self.path}: {key} has {count} strings, too many for a file of "
                f"{len(self._data):,} bytes; it may have been cut off"
            )
        return [self.string(key, MAX_METADATA) for _ in range(count)]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """What a file shall hold, produced while it is written.

    Attributes:
        name, type, shape: as in the file, slowest dimension first.
        parts: yields consecutive pieces, uint8 each, that together have all its bytes.
    """

    name: str
    type: TensorType
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[np.ndarray]]


def write_container(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Sequence[Tensor],
    overwrite: bool = False,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> None:
    """Write a file; it appears under its name only when complete.

    Args:
        path: of the file.
        metadata: str, bool, int (stored as uint32 if it fits), float (float32), sequences of str,
            int (int32) or float (float32), and arrays of numbers.
        tensors: in the order of the file.
        overwrite: replace a file of that name.
        on_bytes: told the size of every piece that was written.

    Raises:
        ValueError: the file exists, or cannot be written.
    """
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists already; it is replaced only when told to")
    header = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        header += [_string(key), _encoded(key, value)]
    offset = 0
    for tensor in tensors:
        sizes = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape[::-1])
        header += [_string(tensor.name), sizes, struct.pack("<IQ", tensor.type.number, offset)]
        offset += _padded(nbytes(tensor.type, tensor.shape))
    start = b"".join(header)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(start.ljust(_padded(len(start)), b"\0"))
            for tensor in tensors:
                size = nbytes(tensor.type, tensor.shape)
                written = 0
                for part in tensor.parts():
                    piece = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
                    file.write(piece.data)
                    written += piece.size
                    on_bytes(piece.size)
                if written != size:
                    raise ValueError(f"{tensor.name} came in {written} bytes instead of {size}")
                file.write(bytes(_padded(size) - size))
            file.flush()
            os.fsync(file.fileno())
        if path.exists() and not overwrite:
            raise ValueError(f"{path} has appeared meanwhile; it is replaced only when told to")
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _padded(size: int) -> int:
    return size + -size % ALIGNMENT


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _number_type(key: str, value: bool | int | float) -> int:
    if isinstance(value, bool):
        return BOOL
    if isinstance(value, float):
        return FLOAT32
    if not -(2**31) <= value < 2**64:
        raise ValueError(f"metadata {key}={value} fits no integer of a GGUF file")
    return INT32 if value < 0 else UINT32 if value < 2**32 else UINT64


def _encoded(key: str, value: Any) -> bytes:
    """Value type and value."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, bool | int | float):
        kind = _number_type(key, value)
        return struct.pack("<I", kind) + np.array(value, NUMBERS[kind]).tobytes()
    if isinstance(value, np.ndarray):
        kinds = {dtype: kind for kind, dtype in NUMBERS.items()}
        dtype = value.dtype.newbyteorder("<") if value.dtype.itemsize > 1 else value.dtype
        if value.ndim != 1 or dtype not in kinds:
            raise ValueError(f"metadata {key} is an array of {value.dtype}, which GGUF has not got")
        return struct.pack("<IIQ", ARRAY, kinds[dtype], len(value)) + value.astype(dtype).tobytes()
    items = list(value)
    head = struct.pack("<I", ARRAY)
    if all(isinstance(item, str) for item in items):
        return head + struct.pack("<IQ", STRING, len(items)) + b"".join(map(_string, items))
    whole = all(isinstance(item, int) for item in items)
    return _encoded(key, np.array(items, "<i4" if whole else "<f4"))
