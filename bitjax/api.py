"""The Python entry points for notebooks and scripts, shared by the command line.

from bitjax.api import load
model = load("shakespeare.safetensors")
print(Generator(model).generate(["ROMEO:"])[0].text)
"""

from __future__ import annotations

import warnings
from pathlib import Path

from bitjax.infer import memory
from bitjax.model import Transformer
from bitjax.model.files import load_model
from bitjax.ops import Impl


def load(path: str | Path, impl: Impl = "auto", check: bool = True) -> Transformer:
    """The model in a model file, or the newest one of a run directory.

    A file larger than the memory that is available gives a warning, for it will be slow.

    Args:
        path: a `.safetensors` file of bitjax, or a directory written by `bitjax train`.
        impl: of the packed products, see `bitjax.ops`.
        check: of a file, see `bitjax.model.files.load_model`.

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
    about = memory.mapping_warning(path.stat().st_size, memory.available_memory())
    if about:
        warnings.warn(about, stacklevel=2)
    return load_model(path, impl=impl, check=check)
