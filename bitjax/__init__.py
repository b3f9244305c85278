"""bitjax: train, study and run 1.58-bit (ternary) language models in JAX.

`import bitjax` is light: nothing here needs the compiled extension, and the submodules that need
JAX are imported by whoever uses them.
"""

from __future__ import annotations

__version__ = "0.1.0"


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
