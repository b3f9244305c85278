"""Models in any format that is read here, told apart by what they hold and not by their names."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from bitjax.config import WeightQuantizer
from bitjax.interop.checkpoint import Checkpoint
from bitjax.interop.hub import download, is_hub_name
from bitjax.printable import printable
from bitjax.quant import WEIGHT_QUANTIZERS

Format = Literal["run", "bitjax", "huggingface", "gguf"]


def local_path(source: str | Path) -> Path:
    """The path of a source, which is downloaded if it is a hub name and no path.

    Raises:
        ValueError: there is nothing.
    """
    path = Path(source)
    if not str(source):
        raise ValueError("the name of the model is empty")
    if path.exists():
        return path
    if is_hub_name(str(source)):
        return download(str(source))
    raise ValueError(
        f"{path} does not exist; give a model file, a run directory, a Hugging Face folder, a GGUF "
        "file or a hub name (owner/name)"
    )


def format_of(path: Path) -> Format:
    """What a file or folder is.

    Raises:
        ValueError: none of what is read here.
    """
    if path.is_dir():
        if (path / "checkpoints").is_dir():
            return "run"
        if (path / "config.json").is_file():
            return "huggingface"
        raise ValueError(
            f"{path} is neither a run, which has a folder checkpoints, nor a Hugging Face folder, "
            "which has a config.json"
        )
    try:
        if not path.is_file():  # a pipe or a device would be waited for
            raise ValueError(f"{path} is no file")
        with path.open("rb") as file:
            start = file.read(9)
        if not start:
            raise ValueError(f"{path} is empty")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    if start[:4] == b"GGUF":
        return "gguf"
    # Python's pickle of protocol 2 and on, and the archive of them that torch.save writes.
    if (start[:1] == b"\x80" and start[1:2] in b"\2\3\4\5" and start[8:9] != b"{") or (
        start[:4] == b"PK\3\4"
    ):
        raise ValueError(
            f"{path} is a Python pickle, or an archive with one, which may run any code when it is "
            "read; only safetensors and GGUF files are"
        )
    if path.suffix == ".gguf":
        raise ValueError(f"{path} is not a GGUF file: it does not begin with the letters GGUF")
    return "bitjax"


def open_checkpoint(source: str | Path, i2s_group: int | None = None) -> Checkpoint:
    """A model by path or hub name, opened; tensors are read as they are asked for.

    Args:
        source: a model file, a run directory (its newest state), a Hugging Face folder, a GGUF
            file, or a hub name.
        i2s_group: of a GGUF file, see `bitjax.interop.gguf.read_gguf`.

    Raises:
        ValueError: nothing there, or nothing that can be read; what it quotes of the file is
            printable.
    """
    path = local_path(source)
    kind = format_of(path)
    if i2s_group is not None and kind != "gguf":
        raise ValueError(f"{source} is no GGUF file, so it has no groups of I2_S")
    try:
        found = _open(path, kind, i2s_group)
    except ValueError as error:
        raise ValueError(printable(str(error))) from error
    return dataclasses.replace(found, origin=str(source))


def _open(path: Path, kind: Format, i2s_group: int | None) -> Checkpoint:
    # Each takes a while to import.
    if kind == "gguf":
        from bitjax.interop.gguf import read_gguf

        return read_gguf(path, i2s_group)
    if kind == "huggingface":
        from bitjax.interop.huggingface import read_huggingface

        return read_huggingface(path)
    if kind == "run":
        from bitjax.interop.model_file import checkpoint_of
        from bitjax.train import Trainer
        from bitjax.train.checkpoint import read_run
        from bitjax.train.source import read_tokenizer_file

        config, _, state = read_run(path)
        warmup = config.train.quantization_warmup_steps
        if int(state.step) < warmup:
            raise ValueError(
                f"{path} is at step {int(state.step)} of train.quantization_warmup_steps={warmup}: "
                "its weights are not wholly quantised yet; train on"
            )
        model = Trainer(config).model(state.params)
        model.tokenizer = read_tokenizer_file(path)
        return checkpoint_of(model, str(path))
    from bitjax.interop.model_file import read_model

    return read_model(path)


def quantized(checkpoint: Checkpoint, weights: WeightQuantizer) -> Checkpoint:
    """A full-precision model whose weights shall be quantised after training, and activations int8.

    Accuracy suffers: models are meant to be trained with quantised weights.

    Raises:
        ValueError: the weights are quantised already.
    """
    config = checkpoint.config
    if config.weights in WEIGHT_QUANTIZERS:
        raise ValueError(f"{checkpoint.origin} has {config.weights} weights already")
    changed = dataclasses.replace(config, weights=weights, activations="int8")
    return dataclasses.replace(checkpoint, config=changed)


def with_int8_activations(checkpoint: Checkpoint) -> Checkpoint:
    """A model with ternary weights and float activations, as if it had been trained with int8."""
    config = dataclasses.replace(checkpoint.config, activations="int8")
    return dataclasses.replace(checkpoint, config=config)
