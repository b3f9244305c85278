"""Files as streams of bytes, decompressed by their names: .gz, .xz and .zst.

Damage raises ValueError wherever it shows, and so does an end that comes too early: zstandard's own
reader takes a file that was cut short for a whole one.
"""

from __future__ import annotations

import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

COMPRESSIONS = (".gz", ".xz", ".zst")
_CHUNK = 1 << 20  # bytes read at once


class _Counted(io.FileIO):
    """A file that tells how many bytes were read of it."""

    def __init__(self, path: Path, on_bytes: Callable[[int], None]) -> None:
        super().__init__(path)
        self._on_bytes = on_bytes

    def readinto(self, buffer: Any) -> int:
        count = super().readinto(buffer) or 0
        self._on_bytes(count)
        return count


class _Zstandard(io.RawIOBase):
    """The bytes of one or several zstandard frames; a frame without its end is an error."""

    def __init__(self, file: IO[bytes]) -> None:
        self._library = require_package("zstandard")
        self._file = file
        self._frame: Any = None
        self._input = self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._input = self._input or self._file.read(_CHUNK)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("a frame has no end")
                return 0
            if self._frame is None:
                self._frame = self._library.ZstdDecompressor().decompressobj()
            self._ready = self._frame.decompress(self._input)
            self._input = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def require_package(name: str) -> Any:
    """Import a package of the extra `data`.

    Raises:
        ValueError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        package = name.partition(".")[0]
        raise ValueError(f"this needs the package {package}: pip install 'bitjax[data]'") from None


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what a missing, damaged or shortened file raises into one sentence.

    Raises:
        ValueError: naming the file.
    """
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # zstandard's own, without importing it
        if type(error).__name__ != "ZstdError":
            raise
        raise ValueError(f"{path} is damaged or cut short: {error}") from None


@contextmanager
def open_bytes(path: Path, on_bytes: Callable[[int], None]) -> Iterator[IO[bytes]]:
    """The decompressed bytes of a file.

    Args:
        path: decompressed if its name ends as one of `COMPRESSIONS`.
        on_bytes: told the compressed bytes as they are read.

    Raises:
        ValueError: the file is missing, damaged, or cut short.
    """
    with readable(path), io.BufferedReader(_Counted(path, on_bytes), _CHUNK) as raw:
        if path.suffix == ".gz":
            with gzip.open(raw) as opened:
                yield opened  # type: ignore[misc]
        elif path.suffix == ".xz":
            with lzma.open(raw) as opened:
                yield opened
        elif path.suffix == ".zst":
            yield io.BufferedReader(_Zstandard(raw), _CHUNK)
        else:
            yield raw
