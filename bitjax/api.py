"""The Python entry points for notebooks and scripts, shared by the command line.

from bitjax.api import load
model = load("shakespeare.safetensors")
print(Generator(model).generate(["ROMEO:"])[0].text)
"""

from __future__ import annotations

from pathlib import Path

from bitjax.model import Transformer
from bitjax.model.files import load_model
from bitjax.ops import Impl


def load(path: str | Path, impl: Impl = "auto") -> Transformer:
    """The model in a model file, or the newest one of a run directory.

    Args:
        path: a `.safetensors` file of bitjax, or a directory written by `bitjax train`.
        impl: of the packed products, see `bitjax.ops`.

    Raises:
        ValueError: nothing there, or nothing readable.
    """
    path = Path(path)
    if path.is_dir():
        from bitjax.train import Trainer  # takes a while to import
        from bitjax.train.checkpoint import read_run

        config, _, state = read_run(path)
        return Trainer(config).model(state.params)
    if not path.exists():
        raise ValueError(f"{path} does not exist; give a model file or a run directory")
    return load_model(path, impl=impl)
