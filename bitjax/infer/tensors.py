"""Tensors of packed model files, described before they exist and made when their turn comes.

So a file can be written that is larger than memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator

import jax.numpy as jnp
import numpy as np

from bitjax.infer.convert import TableFormat, make_screen, pack_table
from bitjax.model.files import DTYPES, stored_arrays
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


def table_tensors(
    name: str, shape: tuple[int, int], form: TableFormat, pieces: Pieces
) -> list[Tensor]:
    """An embedding or head in a number format."""
    if form not in ("int8", "int4"):
        dtype = DTYPES["F32" if form == "float32" else "BF16"]
        return [Tensor(name, dtype, shape, lambda: (piece.astype(dtype) for piece in pieces()))]
    rest: dict[str, list[np.ndarray]] = {}

    def codes() -> Iterator[np.ndarray]:
        rest.update(scale=[], multipliers=[])
        for piece in pieces():
            packed = pack_table(name, jnp.asarray(piece.astype(np.float32)), form)
            assert isinstance(packed, PackedWeights)
            rest["scale"].append(np.asarray(packed.scale))
            if packed.multipliers is not None:
                rest["multipliers"].append(np.asarray(packed.multipliers))
            yield np.asarray(packed.codes)

    def left(part: str) -> list[np.ndarray]:
        if not rest:  # its turn comes before the codes'
            for _ in codes():
                pass
        return rest[part]

    rows, cols = shape
    tensors = [
        Tensor(f"{name}.{form}", DTYPES["U8"], packed_shape(form, rows, cols), codes),
        Tensor(f"{name}.scale", DTYPES["F32"], (rows,), lambda: left("scale")),
    ]
    if LAYOUTS[form].group_blocks:
        of_groups = multiplier_shape(rows, cols)
        tensors.append(
            Tensor(f"{name}.multipliers", DTYPES["U8"], of_groups, lambda: left("multipliers"))
        )
    return tensors


def screen_tensors(shape: tuple[int, int], pieces: Pieces) -> list[Tensor]:
    """The screen of a head, which is made, whole, when it is first asked for.

    Args:
        shape: of the head.
        pieces: its rows.
    """

    @functools.cache
    def made() -> dict[str, np.ndarray]:
        screen = make_screen(piece.astype(DTYPES["BF16"]) for piece in pieces())
        return {name: np.asarray(array) for name, array in stored_arrays("screen", screen).items()}

    rows, cols = shape
    expanded = expanded_cols(cols)
    shapes = {
        "screen.int4": packed_shape("int4", rows, expanded),
        "screen.multipliers": multiplier_shape(rows, expanded),
        "screen.dither": (cols,),
    } | {f"screen.{part}": (rows,) for part in ("scale", "spreads", "norms")}
    return [
        Tensor(name, DTYPES["U8" if len(s) == 3 else "F32"], s, lambda n=name: [made()[n]])  # type: ignore[misc]
        for name, s in shapes.items()
    ]
