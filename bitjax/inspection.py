"""What a model file or a run directory holds, as tables."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from bitjax import terminal
from bitjax.api import load
from bitjax.model import Transformer, bit_linears
from bitjax.model.files import tensor_table
from bitjax.packing import PackedWeights, unpack
from bitjax.quant import WEIGHT_QUANTIZERS
from bitjax.tokenizer import Tokenizer


def inspect(path: Path) -> None:
    """Print configuration, linear layers (codes, scales, zeros) and, for a file, its tensors.

    Raises:
        ValueError: nothing there, or nothing readable.
    """
    model = load(path)
    terminal.table(
        ("setting", "value"),
        [*dataclasses.asdict(model.config).items(), ("tokenizer", tokenizer_line(model.tokenizer))],
        title=str(path),
    )
    terminal.table(
        ("linear layer", "shape", "held as", "-1", "0", "+1", "scale"), layer_rows(model)
    )
    if path.is_file():
        tensors = tensor_table(path)
        linear = {name for name, _ in bit_linears(model)}
        stored = sum(n for name, _, _, n in tensors if name.partition(".weight")[0] in linear)
        weights = sum(int(np.prod(layer.weight.get_value().shape)) for _, layer in
                      bit_linears(model))  # fmt: skip
        terminal.table(
            ("tensor", "type", "shape", "bytes"),
            [(name, kind, list(shape), f"{count:,}") for name, kind, shape, count in tensors],
        )
        terminal.console.print(
            f"{terminal.size(path.stat().st_size)}; linear layers: {weights:,} weights, "
            f"{8 * stored / weights:.2f} bits each"
        )


def tokenizer_line(tokenizer: Tokenizer) -> str:
    """Kind, size and what it has."""
    chat = ", chat template" if tokenizer.chat_template else ""
    return f"{tokenizer.name}: {tokenizer.vocab_size:,} tokens{chat}"


def layer_rows(model: Transformer) -> list[tuple[str, ...]]:
    """One row per linear layer: shape, storage, fraction of each code, scale."""
    rows: list[tuple[str, ...]] = []
    for name, layer in bit_linears(model):
        weight = layer.weight.get_value()
        shape = " x ".join(map(str, weight.shape))
        if isinstance(weight, PackedWeights):
            held, codes, scale = str(weight.layout), np.asarray(unpack(weight)), weight.scale
        elif layer.weights in WEIGHT_QUANTIZERS:
            quantized = WEIGHT_QUANTIZERS[layer.weights](weight, layer.segments)
            held, codes, scale = str(weight.dtype), np.asarray(quantized.codes), quantized.scale
        else:
            rows.append((name, shape, str(weight.dtype), "", "", "", ""))
            continue
        fractions = (f"{np.mean(codes == code):.1%}" for code in (-1, 0, 1))
        scales = "\n".join(f"{value:.4g}" for value in dict.fromkeys(np.ravel(scale).tolist()))
        rows.append((name, shape, held, *fractions, scales))
    return rows
