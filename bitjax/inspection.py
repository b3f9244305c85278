"""What a model in any format holds, as tables; one tensor in memory at a time."""

from __future__ import annotations

import dataclasses
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


def inspect(source: str | Path, i2s_group: int | None = None) -> None:
    """Print configuration, linear layers (codes, scales, zeros) and the tensors of the files.

    Raises:
        ValueError: nothing there, or nothing readable.
    """
    path = local_path(source)
    kind = format_of(path)
    checkpoint = open_checkpoint(path, i2s_group)
    about = [("format", FORMATS[kind]), *_settings(checkpoint.config)]
    if checkpoint.tokenizer is not None:
        about.append(("tokenizer", tokenizer_line(checkpoint.tokenizer)))
    terminal.table(("setting", "value"), about, title=str(source))
    held = contents(path, kind, checkpoint.config)
    rows = []
    with terminal.byte_progress("reading") as on_bytes:
        names = matrix_names(checkpoint.config)
        for done, matrix in enumerate(matrices(checkpoint, held), 1):
            rows.append(matrix)
            on_bytes(done, len(names))
    terminal.table(
        ("matrix", "shape", "held as", "-1", "0", "+1", "scale"), [_row(matrix) for matrix in rows]
    )
    if held is not None:
        terminal.table(
            ("tensor", "type", "shape", "bytes"),
            [(t.name, t.kind, list(t.shape), f"{t.nbytes:,}") for t in held.tensors],
        )
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
    scaling = settings["rope_scaling"]
    settings["rope_scaling"] = scaling.kind if scaling.kind == "none" else ", ".join(
        f"{key}={value}" for key, value in dataclasses.asdict(scaling).items()
    )  # fmt: skip
    settings["float_layers"] = " ".join(config.float_layers) or "none"
    return list(settings.items())


def _layout(name: str) -> str:
    """The layout that a tensor's name in a model file ends with, if any."""
    return next((layout for layout in LAYOUTS if name.endswith(f".weight.{layout}")), "")


def _row(matrix: Matrix) -> tuple[str, ...]:
    shape = f"{matrix.shape[0]} x {matrix.shape[1]}"
    if matrix.counts is None:
        return matrix.name, shape, matrix.held, "", "", "", ""
    fractions = (f"{count / sum(matrix.counts):.1%}" for count in matrix.counts)
    few = len(matrix.scales) <= 3
    scales = "\n".join(f"{scale:.4g}" for scale in matrix.scales) if few else (
        f"{min(matrix.scales):.4g}..{max(matrix.scales):.4g}"
    )  # fmt: skip
    return matrix.name, shape, matrix.held, *fractions, scales
