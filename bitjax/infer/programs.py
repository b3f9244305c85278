"""Compiled programs that outlive the process.

A function is traced and lowered in every process. What XLA then compiles is stored in a file named
by the SHA-256 of all that it depends on: the lowered program and its arguments, the versions of
jax and jaxlib, jax's settings and XLA's flags, devices, threads, and the processor with its
features. So an entry can be missing but never out of date, and nothing has to be invalidated.

    file = SHA-256 of the name and the rest, 32 bytes | executable, serialised by jax

The files lie in `$BITJAX_CACHE_DIR`, by default `$XDG_CACHE_HOME/bitjax` or `~/.cache/bitjax`; an
empty BITJAX_CACHE_DIR switches the cache off. They are code: a directory that another user owns or
may write to is not used. A file that cannot be read, is damaged or does not load is compiled anew;
a directory that cannot be written is no error.

Where jax's own compilation cache is on it serves instead: what was read from it cannot be
serialised again (it would load, and then miss functions).

Deliberately absent: other backends than CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import stat
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax.experimental import serialize_executable

MAX_FILES = 200  # about 0.7 MB each for 30 layers; the oldest are deleted


class Program:
    """A jitted function whose executables are kept, in this process and on disk.

    Args:
        function: of arrays; traceable.
        static: its first so many arguments are Python values, part of the program.
        donate: the argument, counted with the static ones, whose memory the results may take.
    """

    def __init__(
        self, function: Callable[..., Any], *, static: int = 0, donate: int | None = None
    ) -> None:
        self.jitted = jax.jit(
            function,
            static_argnums=tuple(range(static)),
            donate_argnums=() if donate is None else donate,
        )
        self._static = static
        self._compiled: dict[Any, tuple[Callable[..., Any], Any]] = {}

    def __call__(self, *arguments: Any) -> Any:
        """The function's result."""
        return self.compiled(*arguments)(*arguments[self._static :])

    def __len__(self) -> int:
        """How many programs were compiled or read: one for each shape of arguments."""
        return len(self._compiled)

    def compiled(self, *arguments: Any) -> Callable[..., Any]:
        """The program for such arguments (arrays, or their shapes), to call without the static."""
        return self._prepared(arguments)[0]

    def shapes(self, *arguments: Any) -> Any:
        """Compile for such arguments (arrays, or their shapes); returns the shape of the result."""
        return self._prepared(arguments)[1]

    def _prepared(self, arguments: tuple[Any, ...]) -> tuple[Callable[..., Any], Any]:
        leaves, structure = jax.tree.flatten(arguments[self._static :])
        kinds = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        key = arguments[: self._static], structure, kinds
        if key not in self._compiled:
            lowered = self.jitted.lower(*arguments)
            folder = directory() if _may_be_stored(leaves) else None
            run = _stored(folder, lowered) if folder else lowered.compile()
            self._compiled[key] = run, lowered.out_info
            del lowered
            _return_freed_memory()
        return self._compiled[key]


def directory() -> Path | None:
    """Where executables are stored; None when that is switched off or there is no such place."""
    chosen = os.environ.get("BITJAX_CACHE_DIR")
    if chosen is not None:
        return Path(chosen) if chosen else None
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(base) / "bitjax" if base else Path.home() / ".cache" / "bitjax"
    except RuntimeError:  # no home directory
        return None


def _return_freed_memory() -> None:
    """Give back what a compilation took: tens of MB that glibc would keep beside the weights."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _may_be_stored(leaves: Sequence[Any]) -> bool:
    """Whether a program of such arguments runs on the first device, a CPU, without jax's cache."""
    first, settings = jax.local_devices()[0], jax.config.values
    return (
        first.platform == "cpu"
        and jax.config.jax_default_device is None  # type: ignore[attr-defined]
        and not (settings["jax_compilation_cache_dir"] and settings["jax_enable_compilation_cache"])
        and all(leaf.devices() == {first} for leaf in leaves if isinstance(leaf, jax.Array))
    )


def _stored(folder: Path, lowered: jax.stages.Lowered) -> Callable[..., Any]:
    """The executable of a lowered program: read, or compiled and written."""
    # An argument that the program does not use is in no line of it, but checked at every call.
    about = f"{_surroundings()}\n{lowered.args_info}\n{lowered.as_text()}"
    path = folder / hashlib.sha256(about.encode()).hexdigest()
    content = _read(path)
    if content is not None:
        # Whatever this raises, and jax promises no type: compiling is always right.
        with contextlib.suppress(Exception):
            return serialize_executable.deserialize_and_load(
                content, lowered.in_tree, lowered.out_tree,
                execution_devices=jax.local_devices()[:1],
            )  # fmt: skip
    compiled = lowered.compile()
    with contextlib.suppress(ValueError):  # a program that cannot be serialised
        _write(path, serialize_executable.serialize(compiled)[0])
    return compiled


def _surroundings() -> str:
    """All that an executable depends on beside the program."""
    return "\n".join(
        map(
            str,
            (
                jax.__version__,
                jaxlib.__version__,
                sorted((name, str(value)) for name, value in jax.config.values.items()),
                os.environ.get("XLA_FLAGS"),
                jax.devices(),
                os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
                _processor(),
            ),
        )
    )


@functools.cache
def _processor() -> str:
    """Model and features, for which XLA generates code."""
    try:
        text = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return platform.platform() + platform.processor()
    kept = ("vendor_id", "model", "cpu family", "stepping", "flags", "CPU ", "Features", "isa")
    return "\n".join(line for line in text.splitlines() if line.startswith(kept))


def _read(path: Path) -> bytes | None:
    """The checked content of an entry, None if there is none that may be trusted."""
    try:
        if not _is_ours(path.parent):
            return None
        content = path.read_bytes()
        os.utime(path)  # the last to be used are the last to be deleted
    except OSError:
        return None
    digest, content = content[:32], content[32:]
    return content if _digest(path, content) == digest else None


def _digest(path: Path, content: bytes) -> bytes:
    return hashlib.sha256(path.name.encode() + content).digest()


def _write(path: Path, content: bytes) -> None:
    """Store an entry, complete or not at all, and delete the oldest beyond `MAX_FILES`."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_ours(path.parent):
            return
        handle, name = tempfile.mkstemp(dir=path.parent, prefix="tmp-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_digest(path, content) + content)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
        by_age = sorted(path.parent.iterdir(), key=lambda entry: entry.stat().st_mtime)
        for entry in by_age[:-MAX_FILES]:
            entry.unlink()


def _is_ours(folder: Path) -> bool:
    about = folder.stat()
    writable_by_others = about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return not hasattr(os, "getuid") or (about.st_uid == os.getuid() and not writable_by_others)
