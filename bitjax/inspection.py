"""What a model in any format holds, as tables; one tensor in memory at a time."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bitjax import terminal
from bitjax.config import ModelConfig
from bitjax.interop.checkpoint import Checkpoint, Ternary, layer_of, tensor_shapes
from bitjax.interop.formats import Format, format_of, local_path, open_checkpoint
from bitjax.interop.stored import Contents, contents
from bitjax.packing import LAYOUTS
from bitjax.quant import WEIGHT_QUANTIZERS, quantize_matrix, require_finite
from bitjax.tokenizer import Tokenizer

FORMATS: dict[Format, str] = {
    "run": "run of bitjax",
    "bitjax": "model file of bitjax",
    "huggingface": "Hugging Face folder",
    "gguf": "GGUF file",
}


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A matrix of a linear layer.

    Attributes:
        name: in a checkpoint.
        shape: rows and columns.
        held: number format in the file.
        counts: of the codes -1, 0 and +1; None if it is not ternary, or unknown.
        scales: of its rows, each once; empty likewise.
    """

    name: str
    shape: tuple[int, int]
    held: str
    counts: tuple[int, int, int] | None = None
    scales: tuple[float, ...] = ()


def inspect(source: str | Path, i2s_group: int | None = None, every: bool = False) -> None:
    """Print configuration, linear layers (codes, scales, zeros) and the tensors of the files.

    Args:
        source: the model.
        i2s_group: of a GGUF source, see `bitjax.interop.gguf.read_gguf`.
        every: print each matrix and tensor, not those of all blocks together.

    Raises:
        ValueError: nothing there, or nothing readable.
    """
    path = local_path(source)
    kind = format_of(path)
    checkpoint = open_checkpoint(path, i2s_group)
    count = sum(math.prod(shape) for shape in tensor_shapes(checkpoint.config).values())
    terminal.console.print(f"{source}: {FORMATS[kind]}, {count:,} parameters", soft_wrap=True)
    tokenizer = checkpoint.tokenizer
    about = [("tokenizer", "none" if tokenizer is None else tokenizer_line(tokenizer))]
    terminal.table(("setting", "value"), [*_settings(checkpoint.config), *about])
    held = contents(path, kind, checkpoint.config)
    rows = []
    with terminal.byte_progress("reading") as on_bytes:
        names = matrix_names(checkpoint.config)
        for done, matrix in enumerate(matrices(checkpoint, held), 1):
            rows.append(matrix)
            on_bytes(done, len(names))
    _print_matrices(rows, every)
    if held is not None:
        _print_tensors(held, every)
    terminal.console.print(summary(rows, held), soft_wrap=True)


def matrix_names(config: ModelConfig) -> list[str]:
    """Matrices of linear layers, in the order of the forward pass."""
    return [
        name for name, shape in tensor_shapes(config).items()
        if name.startswith("blocks.") and len(shape) == 2
    ]  # fmt: skip


def matrices(checkpoint: Checkpoint, held: Contents | None) -> Iterator[Matrix]:
    """Each matrix of a checkpoint in turn.

    Args:
        checkpoint: the model.
        held: by its files, if they are known.

    Raises:
        ValueError: one that cannot be read, or master weights that are not finite.
    """
    config = checkpoint.config
    for name in matrix_names(config):
        rows, cols = tensor_shapes(config)[name]
        stored = held.of(name) if held is not None else []
        form = _layout(stored[0].name) or stored[0].kind if stored else ""
        if config.weights not in WEIGHT_QUANTIZERS or config.is_float_layer(layer_of(name)):
            yield Matrix(name, (rows, cols), form or "F32")
            continue
        value = checkpoint.read(name)
        if not isinstance(value, Ternary):
            require_finite(f"{checkpoint.origin}: {name}", value)
            form = form or str(value.dtype)
            if config.weight_scale == "group":
                yield Matrix(name, (rows, cols), form)
                continue
            value = Ternary(*quantize_matrix(config.weights, value, config.weight_scale))
        plus, minus = (int(np.count_nonzero(value.codes == code)) for code in (1, -1))
        counts = minus, rows * cols - minus - plus, plus
        yield Matrix(name, (rows, cols), form, counts, tuple(dict.fromkeys(
            np.ravel(value.scale).tolist()
        )))  # fmt: skip


def summary(rows: list[Matrix], held: Contents | None) -> str:
    """One line: bytes, weights, bits of each, zeros."""
    weights = sum(matrix.shape[0] * matrix.shape[1] for matrix in rows)
    parts = [f"linear layers: {weights:,} weights"]
    if held is not None:
        of_layers = {tensor for matrix in rows for tensor in held.of(matrix.name)}
        parts.append(f"{8 * sum(tensor.nbytes for tensor in of_layers) / weights:.2f} bits each")
    counted = [matrix.counts for matrix in rows if matrix.counts is not None]
    if counted:
        zeros = sum(counts[1] for counts in counted) / sum(map(sum, counted))
        parts.append(f"{zeros:.1%} of the ternary ones zero")
    size = sum(tensor.nbytes for tensor in held.tensors) if held is not None else 0
    return (f"tensors: {terminal.size(size)}; " if size else "") + ", ".join(parts)


def tokenizer_line(tokenizer: Tokenizer) -> str:
    """Kind, size and what it has."""
    chat = ", chat template" if tokenizer.chat_template else ""
    return f"{tokenizer.name}: {tokenizer.vocab_size:,} tokens{chat}"


def _settings(config: ModelConfig) -> list[tuple[str, object]]:
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    del settings["init_std"]  # of training alone
    scaling = settings["rope_scaling"]
    settings["rope_scaling"] = scaling.kind if scaling.kind == "none" else ", ".join(
        f"{key}={value}" for key, value in dataclasses.asdict(scaling).items()
    )  # fmt: skip
    settings["float_layers"] = " ".join(config.float_layers) or "none"
    if config.linear_norm_eps is None:
        settings["linear_norm_eps"] = "none"
    return list(settings.items())


def _layout(name: str) -> str:
    """The layout that a tensor's name in a model file ends with, if any."""
    return next((layout for layout in LAYOUTS if name.endswith(f".weight.{layout}")), "")


def _print_matrices(matrices: list[Matrix], every: bool) -> None:
    """A line for each matrix, or for those of all blocks that are alike; 80 characters at most."""
    alike: dict[tuple[object, ...], list[Matrix]] = {}
    for matrix in matrices:
        name = matrix.name if every else matrix.name.split(".", 2)[2]
        key = name, matrix.shape, matrix.held, matrix.counts is None
        alike.setdefault(key, []).append(matrix)
    counted = any(matrix.counts is not None for matrix in matrices)
    terminal.table(
        ("matrix", *(() if every else ("no.",)), "shape", "held as",
         *(("-1, 0, +1 (%)", "scale") if counted else ())),
        [_row(str(name), group, every, counted) for (name, *_), group in alike.items()],
    )  # fmt: skip


def _row(name: str, group: list[Matrix], every: bool, counted: bool) -> tuple[str, ...]:
    first = group[0]
    row = [name] if every else [name, str(len(group))]
    row += [f"{first.shape[0]}x{first.shape[1]}", first.held]
    counts = [matrix.counts for matrix in group if matrix.counts is not None]
    if not counts:
        return (*row, "", "") if counted else tuple(row)
    totals = [sum(column) for column in zip(*counts, strict=True)]
    shares = " ".join(f"{100 * total / sum(totals):4.1f}" for total in totals)
    scales = {scale for matrix in group for scale in matrix.scales}
    low, high = f"{min(scales):.2g}", f"{max(scales):.2g}"
    return (*row, shares, f"{min(scales):.4g}" if low == high else f"{low}..{high}")


def _print_tensors(held: Contents, every: bool) -> None:
    """A line for each tensor, or for the tensors of all blocks that are alike."""
    alike: dict[tuple[str, str, str], list[int]] = {}
    for tensor in held.tensors:
        name = tensor.name if every else _pattern(tensor.name)
        alike.setdefault((name, tensor.kind, str(list(tensor.shape))), []).append(tensor.nbytes)
    terminal.table(
        ("tensor", *(() if every else ("no.",)), "type", "shape", "size"),
        [
            (name, *(() if every else (len(sizes),)), kind, shape, terminal.size(sum(sizes)))
            for (name, kind, shape), sizes in alike.items()
        ],
    )


def _pattern(name: str) -> str:
    """A name with its block left open: `model.layers.7.mlp.up_proj.weight`, `*.mlp.up_proj...`."""
    return re.sub(r"^.*?\.\d+\.", "*.", name)
