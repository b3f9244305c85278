"""A model from any format to any other: what `bitjax convert` does."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bitjax import terminal
from bitjax.config import ModelConfig, WeightQuantizer
from bitjax.infer.convert import LayerLayouts, TableFormat
from bitjax.interop.checkpoint import Checkpoint
from bitjax.interop.formats import open_checkpoint, quantized, with_int8_activations
from bitjax.packing import LayoutName
from bitjax.quant import WEIGHT_QUANTIZERS

if TYPE_CHECKING:
    from bitjax.config import DType
    from bitjax.interop.gguf.writer import Kind, Table

GGUF: dict[str, Kind] = {
    "gguf-tq2_0": "TQ2_0", "gguf-tq1_0": "TQ1_0", "gguf-i2_s": "I2_S", "gguf-f16": "F16",
}  # fmt: skip
Target = Literal["bitjax", "hf", "hf-bf16", "gguf-tq2_0", "gguf-tq1_0", "gguf-i2_s", "gguf-f16"]
# Number formats of embedding and head, by what other formats call them.
GGUF_TABLES: dict[TableFormat | None, Table] = {
    None: "F16", "float32": "F32", "bfloat16": "BF16", "int8": "Q8_0",
}  # fmt: skip
HUGGINGFACE_TABLES: dict[TableFormat | None, DType] = {
    None: "bfloat16", "bfloat16": "bfloat16", "float32": "float32",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What is asked for.

    Attributes:
        to: the format; None to take it from the output's suffix, see `target_for`.
        quantize: quantise a full-precision model so, with int8 activations.
        int8_activations: of a model with ternary weights and float activations.
        i2s_group: of a GGUF source, see `bitjax.interop.gguf.read_gguf`.
        as_float: a model file of float weights instead of packed ones.
        layout, columns, layer_layouts: of a model file, see `bitjax.infer.convert.pack_model`.
        tables: number format of embedding and head; None for the format's own: float32 in a model
            file, float16 in GGUF, bfloat16 for Hugging Face.
        overwrite: replace what is there.
    """

    to: Target | None = None
    quantize: WeightQuantizer | None = None
    int8_activations: bool = False
    i2s_group: int | None = None
    as_float: bool = False
    layout: LayoutName = "ternary2"
    tables: TableFormat | None = None
    columns: bool = False
    layer_layouts: LayerLayouts = ()
    overwrite: bool = False


def convert(source: str | Path, output: Path, wanted: Conversion) -> None:
    """Write a model in another format; the output appears when it is complete.

    Raises:
        ValueError: nothing to read, something there already, or a model that the format cannot
            express; said before anything is written where it can be known.
    """
    if output.exists() and not wanted.overwrite:
        raise ValueError(f"{output} exists; choose another name or give --overwrite")
    checkpoint = open_checkpoint(source, wanted.i2s_group)
    if wanted.quantize is not None:
        checkpoint = quantized(checkpoint, wanted.quantize)
    if wanted.int8_activations:
        checkpoint = with_int8_activations(checkpoint)
    if checkpoint.tokenizer is None:
        warnings.warn(f"{source} has no tokenizer; {output} will take bytes for tokens",
                      stacklevel=2)  # fmt: skip
    target = wanted.to or target_for(output, checkpoint.config)
    if target != "bitjax":
        _refuse_packing(target, wanted)
    if target == "bitjax":
        _to_model_file(checkpoint, output, wanted)
    elif target in GGUF:
        _to_gguf(checkpoint, output, GGUF[target], wanted)
    else:
        _to_huggingface(checkpoint, output, target, wanted)
    files = [output] if output.is_file() else [p for p in output.iterdir() if p.is_file()]
    written = terminal.size(sum(file.stat().st_size for file in files))
    terminal.console.print(f"{output}: {written}", soft_wrap=True)


def target_for(output: Path, config: ModelConfig) -> Target:
    """The format that an output's suffix stands for: GGUF for `.gguf`, else a model file."""
    if output.suffix != ".gguf":
        return "bitjax"
    return "gguf-tq2_0" if config.weights in WEIGHT_QUANTIZERS else "gguf-f16"


def _refuse_packing(target: Target, wanted: Conversion) -> None:
    given = {
        "--float": wanted.as_float,
        "--bits 1.6": wanted.layout != "ternary2",
        "--layer-bits": wanted.layer_layouts,
        "--columns": wanted.columns,
    }
    for option, value in given.items():
        if value:
            raise ValueError(f"{option} is for model files of bitjax; {target} has no such form")


def _to_model_file(checkpoint: Checkpoint, output: Path, wanted: Conversion) -> None:
    from bitjax.interop.model_file import write_model

    if not wanted.as_float and checkpoint.config.weights == "float":
        raise ValueError(
            f"{checkpoint.origin} has float weights, which are not packed: give --float to keep "
            "them, or --quantize ternary"
        )
    with terminal.byte_progress(output.name) as on_bytes:
        write_model(
            output, checkpoint, wanted.layout, wanted.tables or "float32", wanted.columns,
            wanted.layer_layouts, wanted.as_float, wanted.overwrite, on_bytes,
        )  # fmt: skip


def _to_gguf(checkpoint: Checkpoint, output: Path, kind: Kind, wanted: Conversion) -> None:
    from bitjax.interop.gguf import gguf_notes, write_gguf

    if wanted.tables not in GGUF_TABLES:
        raise ValueError(f"--tables {wanted.tables} is not a form of GGUF; "
                         "float32, bfloat16 and int8 are")  # fmt: skip
    for note in gguf_notes(checkpoint.config, kind):
        terminal.console.print(f"note: {note}", soft_wrap=True)
    with terminal.byte_progress(output.name) as on_bytes:
        write_gguf(output, checkpoint, kind, wanted.overwrite, GGUF_TABLES[wanted.tables], on_bytes)


def _to_huggingface(
    checkpoint: Checkpoint, output: Path, target: Target, wanted: Conversion
) -> None:
    from bitjax.interop.huggingface import write_huggingface

    if wanted.tables not in HUGGINGFACE_TABLES:
        raise ValueError(f"--tables {wanted.tables} is not a form of Hugging Face folders; "
                         "float32 and bfloat16 are")  # fmt: skip
    rest = HUGGINGFACE_TABLES[wanted.tables]
    packed = target == "hf" and checkpoint.config.weights in WEIGHT_QUANTIZERS
    with terminal.byte_progress(output.name) as on_bytes:
        write_huggingface(
            output, checkpoint, "packed" if packed else rest, wanted.overwrite, rest=rest,
            on_bytes=on_bytes,
        )  # fmt: skip
