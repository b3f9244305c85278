"""Documents out of files: text, JSON lines, Parquet, Arrow, and folders of them.

    *.txt[.gz|.xz|.zst]      UTF-8; one document, or several between a separator
    *.jsonl[.gz|.xz|.zst]    an object on each line, its text in a field; empty lines are skipped.
                             Of conversations and pairs the object itself is the document
    *.parquet, *.arrow       a table with a column of text; *.arrow in the stream format, which is
                             how `datasets` saves to a folder

A folder gives its files of these kinds, sub-folders included, in the order of their names, so that
a folder of a Hugging Face dataset is read as it is. Files are read as streams: memory holds one
document, one line, or one batch of rows.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from bitjax.config.corpus import CorpusConfig
from bitjax.corpus.streams import COMPRESSIONS, open_bytes, readable, require_package

MAX_DOCUMENT = 1 << 30  # bytes: a limit on what a small compressed file may unfold to in memory
_CHUNK = 1 << 20  # bytes decoded at once
_ROWS = 1024  # of a table at once
_KINDS = (".txt", ".jsonl", ".parquet", ".arrow")


@dataclass(frozen=True)
class Document:
    """One text, and where it comes from for messages."""

    text: str
    where: str


def find_files(inputs: Iterable[Path]) -> list[Path]:
    """The files of all inputs, folders opened.

    Raises:
        ValueError: an input that is missing, of an unknown kind, or a folder without such files.
    """
    found: list[Path] = []
    for path in inputs:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if _kind(p) and p.is_file())
            if not inside:
                raise ValueError(f"the folder {path} has no file of the kinds {', '.join(_KINDS)}")
            found += inside
        elif not path.exists():
            raise ValueError(f"cannot read {path}: there is no such file")
        elif _kind(path):
            found.append(path)
        else:
            raise ValueError(
                f"{path} is of no known kind; its name should end in {', '.join(_KINDS)}, or the "
                f"first two with {', '.join(COMPRESSIONS)}"
            )
    return found


def _kind(path: Path) -> str | None:
    name = path.name.lower()
    for compression in COMPRESSIONS:
        if name.endswith(compression):
            inner = Path(name.removesuffix(compression)).suffix
            return inner if inner in (".txt", ".jsonl") else None
    return Path(name).suffix if Path(name).suffix in _KINDS else None


def read_documents(
    path: Path, config: CorpusConfig, on_bytes: Callable[[int], None] = lambda count: None
) -> Iterator[Document]:
    """The documents of one file, in order; empty ones too.

    Args:
        path: of a kind that `find_files` gives.
        config: names the field, and the separator.
        on_bytes: told the file's bytes as they are read; they add up to its size.

    Raises:
        ValueError: what cannot be read, naming the file and the line or row.
    """
    kind = _kind(path)
    if config.kind != "text" and kind != ".jsonl":
        raise ValueError(f"{path} is no file of JSON lines; a corpus of {config.kind} needs them")
    if kind in (".parquet", ".arrow"):
        yield from _table(path, kind, config.text_field, on_bytes)
        return
    with open_bytes(path, on_bytes) as file:
        if kind == ".jsonl":
            field = config.text_field if config.kind == "text" else None
            yield from _json_lines(path, file, field)
        else:
            yield from _text(path, file, config.separator)


def _text(path: Path, file: IO[bytes], separator: str) -> Iterator[Document]:
    """Documents between separators; text that ends with one has no empty document behind it."""
    rest, count = "", 0
    for piece in _decoded(path, file):
        if "\0" in piece:
            raise ValueError(f"{path} is binary: it has a NUL character")
        parts = (rest + piece).split(separator) if separator else [rest + piece]
        for part in parts[:-1]:
            count += 1
            yield Document(part, f"{path}, document {count}")
        rest = parts[-1]
        _check_size(f"{path}, document {count + 1}", len(rest))
    if rest or not count:
        yield Document(rest, f"{path}, document {count + 1}" if separator else str(path))


def _decoded(path: Path, file: IO[bytes]) -> Iterator[str]:
    decoder, position = codecs.getincrementaldecoder("utf-8")(), 0
    while True:
        raw = file.read(_CHUNK)
        held = len(decoder.getstate()[0])  # bytes of a character begun in the last chunk
        try:
            yield decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            at = position - held + error.start
            raise ValueError(f"{path} is not UTF-8: byte {at}: {error.reason}") from None
        if not raw:
            return
        position += len(raw)


def _json_lines(path: Path, file: IO[bytes], field: str | None) -> Iterator[Document]:
    """The texts of a field; without one the lines themselves."""
    number = 0
    while line := file.readline(MAX_DOCUMENT + 1):
        number += 1
        where = f"{path}, line {number}"
        _check_size(where, len(line))
        if not line.strip():
            continue
        try:
            found = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise ValueError(f"{where} is not UTF-8: {error.reason}") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON: {error}") from None
        if not isinstance(found, dict):
            raise ValueError(f"{where} is not an object: {found!r:.40}")
        if field is None:
            yield Document(line.decode().strip(), where)
            continue
        if not isinstance(found.get(field), str):
            raise ValueError(
                f"{where} has no text in {field!r:.40}; its fields are {_names(found)}"
            )
        yield Document(found[field], where)


def _table(
    path: Path, kind: str, field: str, on_bytes: Callable[[int], None]
) -> Iterator[Document]:
    arrow = require_package("pyarrow")
    with readable(path):
        size = path.stat().st_size
    row = done = 0
    try:
        for column, part in _columns(path, kind, field):
            for value in column.to_pylist():
                row += 1
                if not isinstance(value, str):
                    raise ValueError(f"{path}, row {row} has no text in {field!r}: {value!r:.40}")
                _check_size(f"{path}, row {row}", len(value))
                yield Document(value, f"{path}, row {row}")
            on_bytes(int(size * part) - done)
            done = int(size * part)
    except (arrow.ArrowException, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{path} is damaged or cut short: {lines[0]}") from None
    on_bytes(size - done)


def _columns(path: Path, kind: str, field: str) -> Iterator[tuple[Any, float]]:
    """Batches of the column, each with the part of the table that ends with it (0 to 1)."""
    if kind == ".arrow":
        with require_package("pyarrow.ipc").open_stream(str(path)) as stream:
            _require_column(path, stream.schema.names, field)
            for batch in stream:
                yield batch.column(field), 0.0  # their number is unknown before the end
        return
    with require_package("pyarrow.parquet").ParquetFile(path) as file:
        _require_column(path, file.schema_arrow.names, field)
        seen, rows = 0, max(1, file.metadata.num_rows)
        for batch in file.iter_batches(_ROWS, columns=[field]):
            seen += batch.num_rows
            yield batch.column(0), seen / rows


def _require_column(path: Path, names: list[str], field: str) -> None:
    if field not in names:
        raise ValueError(f"{path} has no column {field!r:.40}; its columns are {_names(names)}")


def _names(names: Iterable[str]) -> str:
    shown = [repr(name)[:40] for name in names]
    return ", ".join(shown[:10]) + (" ..." if len(shown) > 10 else "") or "none"


def _check_size(where: str, size: int) -> None:
    if size > MAX_DOCUMENT:
        raise ValueError(f"{where} is longer than {MAX_DOCUMENT:,} bytes")
