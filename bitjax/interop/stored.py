"""What a model's files hold, tensor by tensor, as they hold it: for tables of contents."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from bitjax.config import ModelConfig
from bitjax.interop.checkpoint import layer_of
from bitjax.interop.formats import Format
from bitjax.model.files import tensor_table
from bitjax.packing import LAYOUTS


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file.

    Attributes:
        name: in the file.
        kind: number format, as the file calls it.
        shape: in the file, slowest dimension first.
        nbytes: it takes.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Contents:
    """Everything that a model's files hold.

    Attributes:
        tensors: in the order of the files.
        names: of the tensors that a matrix of a linear layer consists of, itself first; several
            matrices may share them.
    """

    tensors: list[StoredTensor]
    names: Callable[[str], list[str]]

    def of(self, matrix: str) -> list[StoredTensor]:
        """What is there of a matrix, itself first."""
        by_name = {tensor.name: tensor for tensor in self.tensors}
        return [by_name[name] for name in self.names(matrix) if name in by_name]


def contents(path: Path, kind: Format, config: ModelConfig) -> Contents | None:
    """What a model's files hold; None of a run, whose files are not tensors one by one.

    Args:
        path: of the file or folder.
        kind: its format.
        config: of the model.

    Raises:
        ValueError: it cannot be read.
    """
    if kind == "bitjax":
        rows = [StoredTensor(*row) for row in tensor_table(path)]
        return Contents(rows, _names_in_model_file)
    if kind == "huggingface":
        return _of_folder(path)
    if kind == "gguf":
        return _of_gguf(path)
    return None


def _names_in_model_file(matrix: str) -> list[str]:
    weight = f"{layer_of(matrix)}.weight"
    return [weight, *(f"{weight}.{kind}" for kind in (*LAYOUTS, "scale", "columns"))]


def _of_folder(path: Path) -> Contents:
    from bitjax.interop.huggingface.names import scale_name, tensor_name
    from bitjax.interop.huggingface.settings import parse_settings
    from bitjax.interop.safetensors_files import open_folder, read_json

    file = path / "config.json"
    family = parse_settings(read_json(file), file).family
    tensors = [
        StoredTensor(t.name, t.dtype, t.shape, t.raw.nbytes) for t in open_folder(path).values()
    ]
    return Contents(tensors, lambda name: [tensor_name(name, family), scale_name(name, family)])


def _of_gguf(path: Path) -> Contents:
    from bitjax.interop.gguf.architecture import gguf_name
    from bitjax.interop.gguf.container import open_container

    tensors = [
        StoredTensor(name, entry.type.name, entry.shape, entry.nbytes)
        for name, entry in open_container(path).tensors.items()
    ]
    return Contents(tensors, lambda name: [gguf_name(name), gguf_name(name, "scale")])
