"""Tensors of packed model files, described before they exist and made when their turn comes.

So a file can be written that is larger than memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator

import jax.numpy as jnp
import numpy as np

from bitjax.infer.convert import TableFormat, pack_table, screen_dither, screen_pieces
from bitjax.model.files import DTYPES
from bitjax.packing import (
    LAYOUTS,
    LayoutName,
    PackedWeights,
    columns_shape,
    expanded_cols,
    multiplier_shape,
    packed_shape,
)
from bitjax.safetensors_writer import Tensor

OnBytes = Callable[[int, int], None]  # told how many bytes are written, and of how many
Pieces = Callable[[], Iterable[np.ndarray]]  # consecutive rows, 16 times n but for the last piece


def reporting(tensors: list[Tensor], on_bytes: OnBytes) -> list[Tensor]:
    """The same tensors, which tell of every piece that was written."""
    total = sum(tensor.nbytes for tensor in tensors)
    done = 0

    def reported(tensor: Tensor) -> Iterator[np.ndarray]:
        nonlocal done
        for part in tensor.parts():
            yield part
            done += part.size * tensor.dtype.itemsize
            on_bytes(done, total)

    return [
        Tensor(t.name, t.dtype, t.shape, lambda t=t: reported(t))  # type: ignore[misc]
        for t in tensors
    ]


def float_format(tables: TableFormat) -> TableFormat:
    """Number format of layers that stay float, beside tables of such a format."""
    return "float32" if tables == "float32" else "bfloat16"


class Last:
    """The last result of a function of a name: tensors of one layer come one after the other."""

    def __init__(self, make: Callable[[str], PackedWeights]) -> None:
        self._make = make
        self._name = ""
        self._made: PackedWeights | None = None

    def __call__(self, name: str) -> PackedWeights:
        """`make(name)`, of which only one result is held at a time."""
        if self._made is None or name != self._name:
            self._made = None  # before the next is made
            self._made, self._name = self._make(name), name
        return self._made


def layer_tensors(
    name: str,
    shape: tuple[int, int],
    layout: LayoutName,
    columns: bool,
    make: Callable[[str], PackedWeights],
) -> list[Tensor]:
    """Codes, scales (one a row) and maybe columns of a linear layer.

    Args:
        name: of the weight.
        shape: rows and columns.
        layout: of the codes.
        columns: whether it is stored by columns as well.
        make: gives the packed weights of a name; it is called for each of the tensors.
    """
    parts = {
        f"{name}.{layout}": ("U8", packed_shape(layout, *shape), "codes"),
        f"{name}.scale": ("F32", shape[:1], "scale"),
    }
    if columns:
        parts[f"{name}.columns"] = ("U8", columns_shape(layout, *shape), "columns")
    return [
        Tensor(stored, DTYPES[dtype], size, lambda p=part: [np.asarray(getattr(make(name), p))])  # type: ignore[misc]
        for stored, (dtype, size, part) in parts.items()
    ]


class _Streamed:
    """Arrays made piece by piece: the codes, which are not kept, and small ones, which are.

    Args:
        make: gives each piece as arrays by name, one of them "codes".
    """

    def __init__(self, make: Callable[[], Iterable[dict[str, np.ndarray]]]) -> None:
        self._make = make
        self._rest: dict[str, list[np.ndarray]] = {}

    def codes(self) -> Iterator[np.ndarray]:
        """The codes of every piece."""
        self._rest = {}
        for arrays in self._make():
            codes = arrays.pop("codes")
            for part, array in arrays.items():
                self._rest.setdefault(part, []).append(array)
            yield codes

    def rest(self, part: str) -> list[np.ndarray]:
        """All pieces of another array."""
        if not self._rest:  # its turn comes before the codes'
            for _ in self.codes():
                pass
        return self._rest[part]

    def tensor(self, name: str, dtype: str, shape: tuple[int, ...], part: str) -> Tensor:
        """One of the arrays as a tensor of a file."""
        parts = self.codes if part == "codes" else functools.partial(self.rest, part)
        return Tensor(name, DTYPES[dtype], shape, parts)


def table_tensors(
    name: str, shape: tuple[int, int], form: TableFormat, pieces: Pieces
) -> list[Tensor]:
    """An embedding or head in a number format."""
    if form not in ("int8", "int4"):
        dtype = DTYPES["F32" if form == "float32" else "BF16"]
        return [Tensor(name, dtype, shape, lambda: (piece.astype(dtype) for piece in pieces()))]

    def made() -> Iterator[dict[str, np.ndarray]]:
        for piece in pieces():
            packed = pack_table(name, jnp.asarray(piece.astype(np.float32)), form)
            assert isinstance(packed, PackedWeights)
            yield _arrays(packed)

    rows, cols = shape
    streamed = _Streamed(made)
    tensors = [
        streamed.tensor(f"{name}.{form}", "U8", packed_shape(form, rows, cols), "codes"),
        streamed.tensor(f"{name}.scale", "F32", (rows,), "scale"),
    ]
    if LAYOUTS[form].group_blocks:
        of_groups = multiplier_shape(rows, cols)
        tensors.append(streamed.tensor(f"{name}.multipliers", "U8", of_groups, "multipliers"))
    return tensors


def screen_tensors(shape: tuple[int, int], pieces: Pieces) -> list[Tensor]:
    """The screen of a head.

    Args:
        shape: of the head.
        pieces: its rows.
    """

    def made() -> Iterator[dict[str, np.ndarray]]:
        for screen in screen_pieces(piece.astype(DTYPES["BF16"]) for piece in pieces()):
            bounds = {"spreads": np.asarray(screen.spreads), "norms": np.asarray(screen.norms)}
            yield _arrays(screen.weights) | bounds

    rows, cols = shape
    expanded = expanded_cols(cols)
    streamed = _Streamed(made)
    return [
        Tensor("screen.dither", DTYPES["F32"], (cols,), lambda: [screen_dither(cols)]),
        streamed.tensor("screen.int4", "U8", packed_shape("int4", rows, expanded), "codes"),
        streamed.tensor(
            "screen.multipliers", "U8", multiplier_shape(rows, expanded), "multipliers"
        ),
        *(
            streamed.tensor(f"screen.{part}", "F32", (rows,), part)
            for part in ("scale", "spreads", "norms")
        ),
    ]


def _arrays(packed: PackedWeights) -> dict[str, np.ndarray]:
    arrays = {"codes": np.asarray(packed.codes), "scale": np.asarray(packed.scale)}
    if packed.multipliers is not None:
        arrays["multipliers"] = np.asarray(packed.multipliers)
    return arrays
