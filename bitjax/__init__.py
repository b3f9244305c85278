"""bitjax: train, study and run 1.58-bit (ternary) language models in JAX.

    model = bitjax.load("a.safetensors")
    print(model.generate("ROMEO:"))

`import bitjax` is light: nothing here needs the compiled extension, and the submodules that need
JAX are imported by whoever uses them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from bitjax.language_model import LanguageModel

__version__ = "0.1.0"


def load(path: str | Path, **settings: Any) -> LanguageModel:
    """A model to generate with: `bitjax.load("a.safetensors").generate("ROMEO:")`.

    Args:
        path: a model file of bitjax, a directory written by `bitjax train`, a Hugging Face folder,
            a GGUF file, or a hub name (owner/name).
        settings: see `bitjax.language_model.load`.

    Raises:
        ValueError: nothing readable there, or settings out of range.
    """
    from bitjax import language_model

    return language_model.load(path, **settings)


def set_threads(threads: int | None) -> None:
    """Limit the threads that each custom call of this process uses, the caller's included.

    XLA's own operators keep XLA's pool. It has a thread for each CPU that the process may run on
    when JAX starts, and custom calls never use more: `taskset -c 0 ...` limits both.

    Args:
        threads: 1 or more; None lifts the limit. Compiled functions follow it too.

    Raises:
        ValueError: less than 1.
        ModuleNotFoundError: the extension is not installed.
    """
    from bitjax.ops import ffi

    ffi.set_threads(threads)
