"""The Python entry points for notebooks and scripts, shared by the command line.

from bitjax.api import load
model = load("shakespeare.safetensors")
print(Generator(model).generate(["ROMEO:"])[0].text)
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import jax
from flax import nnx

from bitjax.config import ModelConfig
from bitjax.infer import memory
from bitjax.interop.formats import format_of, local_path, open_checkpoint
from bitjax.model import Transformer
from bitjax.model.files import load_model
from bitjax.ops import Impl
from bitjax.printable import html_table


@dataclass(frozen=True)
class Summary:
    """What a model holds; shows itself in notebooks.

    Attributes:
        config: of the model.
        parameters: values, of arrays; a packed layer's are its bytes.
        bytes: of all parameters in memory.
    """

    config: ModelConfig
    parameters: int
    bytes: int

    def _repr_html_(self) -> str:
        shown = ("hidden_size", "num_layers", "vocab_size", "max_seq_len", "weights", "activations")
        rows: list[tuple[str, object]] = [(name, getattr(self.config, name)) for name in shown]
        rows += [("arrays' values", f"{self.parameters:,}"), ("bytes", f"{self.bytes:,}")]
        return html_table(("setting", "value"), rows)


def summary(model: Transformer) -> Summary:
    """What a model holds."""
    leaves = jax.tree.leaves(nnx.state(model))
    size = sum(leaf.nbytes for leaf in leaves)
    return Summary(model.config, sum(leaf.size for leaf in leaves), size)


def load(path: str | Path, impl: Impl = "auto", check: bool = True) -> Transformer:
    """The model in a model file, the newest one of a run directory, or a released one.

    A file larger than the memory that is available gives a warning, for it will be slow. Hugging
    Face folders and GGUF files are packed in memory each time: `bitjax convert` makes a model file,
    which is mapped instead.

    Args:
        path: a `.safetensors` file of bitjax, a directory written by `bitjax train`, a Hugging Face
            folder, a GGUF file, or a hub name (owner/name).
        impl: of the packed products, see `bitjax.ops`.
        check: of a file, see `bitjax.model.files.load_model`.

    Raises:
        ValueError: nothing there, or nothing readable.
    """
    source, path = path, local_path(path)
    kind = format_of(path)
    if kind in ("huggingface", "gguf"):
        from bitjax.interop.model_file import build_model

        return build_model(open_checkpoint(source), impl=impl)
    if kind == "run":
        from bitjax.train import Trainer  # takes a while to import
        from bitjax.train.checkpoint import read_run
        from bitjax.train.source import read_tokenizer_file

        config, _, state = read_run(path)
        model = Trainer(config).model(state.params)
        model.tokenizer = read_tokenizer_file(path)
        return model
    about = memory.mapping_warning(path.stat().st_size, memory.available_memory())
    if about:
        warnings.warn(about, stacklevel=2)
    return load_model(path, impl=impl, check=check)
