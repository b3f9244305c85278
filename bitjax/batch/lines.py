"""The prompts of a file, one at a time: whatever is wrong with one is a message, not an end.

    *.jsonl[.gz|.xz|.zst]    a text, or an object of fields, on each line; empty lines are skipped
    *.txt[.gz|.xz|.zst]      a prompt on each line
    *.csv[.gz|.xz|.zst]      a header with names of fields, then rows
    *.parquet                columns of fields

Memory holds one line, or one batch of rows. In tables, cells without a value (null; in CSV empty)
are fields left out, and a CSV cell of a field that is no text is JSON.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from bitjax.corpus.streams import COMPRESSIONS, open_bytes, readable, require_package

MAX_LINE = 1 << 26  # bytes; ten times the longest prompt that any context of ours could hold
TEXTS = ("prompt", "id")  # fields whose CSV cells are the text itself
KINDS = (".jsonl", ".txt", ".csv", ".parquet")
_ROWS = 256  # of a table at once; each may hold a long conversation


@dataclass(frozen=True)
class Line:
    """What one line or row holds.

    Attributes:
        index: among those of its file, from 0; empty lines do not count.
        value: a prompt, or fields; None where there is an error.
        error: what is wrong with it, or empty.
    """

    index: int
    value: str | dict[str, Any] | None
    error: str = ""


@dataclass(frozen=True)
class Source:
    """A file of prompts.

    Attributes:
        path: of the file.
        prompts: the column of a table that holds prompts.
        kept: columns of a table that are no fields of a request.

    Raises:
        ValueError: it is missing, or of no known kind.
    """

    path: Path
    prompts: str = "prompt"
    kept: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.path.is_file():
            raise ValueError(f"cannot read {self.path}: there is no such file")
        if self.kind not in KINDS:
            raise ValueError(
                f"{self.path} is of no known kind; its name should end in {', '.join(KINDS)}, or "
                f"the first three with {', '.join(COMPRESSIONS)}"
            )

    @property
    def kind(self) -> str:
        """The ending that decides how it is read."""
        name = Path(self.path.name.lower())
        inner = Path(name.stem).suffix if name.suffix in COMPRESSIONS else name.suffix
        return "" if name.suffix in COMPRESSIONS and inner == ".parquet" else inner

    def digest(self) -> str:
        """SHA-256 of the file, hexadecimal."""
        with readable(self.path), self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def state(self) -> tuple[int, int, int]:
        """What changes with the file: its inode, size in bytes, and time of change in ns."""
        with readable(self.path):
            found = self.path.stat()
        return found.st_ino, found.st_size, found.st_mtime_ns

    def count(self) -> int:
        """How many lines `read` will give."""
        if self.kind == ".parquet":
            with _parquet(self.path) as table:
                return int(table.metadata.num_rows)
        if self.kind == ".csv":
            return sum(1 for _ in self._rows(()))
        with open_bytes(self.path, lambda count: None) as file:
            return sum(1 for raw in _raw_lines(file) if self._counts(raw))

    def read(self, fields: Collection[str] = ()) -> Iterator[Line]:
        """All lines, in order.

        Args:
            fields: that a request may have; a table with other columns is refused.

        Raises:
            ValueError: damage that leaves no next line, or columns that mean nothing.
        """
        if self.kind == ".parquet":
            yield from self._table(fields)
        elif self.kind == ".csv":
            yield from self._rows(fields)
        else:
            with open_bytes(self.path, lambda count: None) as file:
                lines = (raw for raw in _raw_lines(file) if self._counts(raw))
                for index, raw in enumerate(lines):
                    yield _parsed(index, raw, json_lines=self.kind == ".jsonl")

    def _counts(self, raw: bytes | None) -> bool:
        return self.kind == ".txt" or raw is None or bool(raw.strip())

    def _require_columns(self, columns: Collection[str], fields: Collection[str]) -> None:
        if not fields:
            return
        if self.prompts not in columns and "messages" not in columns and "body" not in columns:
            raise ValueError(
                f"{self.path} has no column {self.prompts!r}; its columns are {_names(columns)}"
            )
        for name in columns:
            if name != self.prompts and name not in self.kept and name not in fields:
                raise ValueError(
                    f"{self.path}: column {name!r:.60} is no setting of a request; keep it in the "
                    f"output with --keep, or name the column of prompts with --field"
                )

    def _field(self, column: str) -> str:
        return "prompt" if column == self.prompts else column

    def _rows(self, fields: Collection[str]) -> Iterator[Line]:
        with open_bytes(self.path, lambda count: None) as file:
            text = io.TextIOWrapper(
                file, "utf-8-sig", errors="surrogateescape", newline=""
            )  # fmt: skip
            before = csv.field_size_limit(MAX_LINE)
            try:
                rows = csv.reader(text, strict=True)
                try:
                    columns = next(rows, [])
                except csv.Error as error:
                    raise ValueError(f"{self.path}: no header of columns: {error}") from None
                if len(set(columns)) < len(columns):
                    raise ValueError(f"{self.path}: two columns of one name: {_names(columns)}")
                self._require_columns(columns, fields)
                index = 0
                while (line := self._row(rows, index, columns)) is not None:
                    if line.value is None and not line.error:
                        continue  # an empty line
                    yield line
                    index += 1
            finally:
                csv.field_size_limit(before)
                text.detach()

    def _row(self, rows: Any, index: int, columns: list[str]) -> Line | None:
        """The next row; one without value and error for an empty line, None behind the last."""
        try:
            row = next(rows)
        except StopIteration:
            return None
        except csv.Error as error:
            return Line(index, None, f"line {rows.line_num}: {error}")
        if not row:
            return Line(index, None)
        where = f"line {rows.line_num}"
        if len(row) != len(columns):
            return Line(index, None, f"{where} has {len(row)} cells under {len(columns)} columns")
        found: dict[str, Any] = {}
        for column, cell in zip(columns, row, strict=True):
            if any("\udc80" <= c <= "\udcff" for c in cell):
                return Line(index, None, f"{where} is not UTF-8 under {column!r:.60}")
            if cell == "" and column != self.prompts:
                continue
            name = self._field(column)
            found[name] = cell if name in TEXTS or column in self.kept else _value(cell)
        if found.get("prompt") == "" and ("messages" in found or "body" in found):
            del found["prompt"]
        return Line(index, found)

    def _table(self, fields: Collection[str]) -> Iterator[Line]:
        index = 0
        with _parquet(self.path) as table:
            self._require_columns(table.schema_arrow.names, fields)
            for batch in table.iter_batches(_ROWS):
                for row in range(batch.num_rows):
                    yield self._table_row(index, batch, row)
                    index += 1

    def _table_row(self, index: int, batch: Any, row: int) -> Line:
        found: dict[str, Any] = {}
        for column, cells in zip(batch.schema.names, batch.columns, strict=True):
            try:
                value = cells[row].as_py()
                if isinstance(value, bytes):
                    value = value.decode()
            except UnicodeDecodeError as error:
                return Line(index, None, f"row {index + 1} is not UTF-8 under {column!r:.60}: "
                                         f"{error.reason}")  # fmt: skip
            if value is None:
                continue
            name = self._field(column)
            if name in ("messages", "body") and isinstance(value, str):
                value = _value(value)
            found[name] = plain_json(value) if column in self.kept else _without_nulls(value)
        return Line(index, found)


class _parquet:  # noqa: N801  # a context manager
    """An open Parquet file; what its library raises becomes one sentence."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Any:
        self._arrow = require_package("pyarrow")
        try:
            self._file = require_package("pyarrow.parquet").ParquetFile(self._path)
        except (self._arrow.ArrowException, OSError) as error:
            self._refuse(error)
        return self._file

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._file.close()
        if isinstance(error, self._arrow.ArrowException | OSError):
            self._refuse(error)

    def _refuse(self, error: BaseException) -> None:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{self._path} is damaged or cut short: {said[0]}") from None


def _raw_lines(file: IO[bytes]) -> Iterator[bytes | None]:
    """Lines without their ends; None for one that is too long, which is never held whole."""
    first = True
    while raw := file.readline(MAX_LINE + 1):
        if len(raw) > MAX_LINE and not raw.endswith(b"\n"):
            while raw and not raw.endswith(b"\n"):
                raw = file.readline(MAX_LINE)
            yield None
        else:
            yield (raw.removeprefix(codecs.BOM_UTF8) if first else raw).rstrip(b"\r\n")
        first = False


def _parsed(index: int, raw: bytes | None, json_lines: bool) -> Line:
    if raw is None:
        return Line(index, None, f"the line is longer than {MAX_LINE:,} bytes")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        return Line(index, None, f"not UTF-8: {error.reason} at byte {error.start} of the line")
    return from_json(index, text) if json_lines else Line(index, text)


def from_json(index: int, text: str) -> Line:
    """A line of JSON: a text, or an object of fields."""
    try:
        found = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        return Line(index, None, f"not JSON: {error}")
    if not isinstance(found, str | dict):
        return Line(index, None, f"neither a text nor an object: {found!r:.40}")
    return Line(index, found)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _value(cell: str) -> Any:
    """What a cell says in JSON, or the cell itself, of which a check will say what is wrong."""
    try:
        return json.loads(cell, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return cell


def plain_json(value: Any) -> Any:
    """A value as JSON can say it: NaN and infinity are null, dates and the like are texts."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, dict):
        return {str(k): plain_json(v) for k, v in value.items()}
    return [plain_json(v) for v in value] if isinstance(value, list | tuple) else str(value)


def _without_nulls(value: Any) -> Any:
    """Objects without the fields that a table gives to all of them because some have them."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _names(names: Collection[str], most: int = 10) -> str:
    shown = [repr(name)[:40] for name in names]
    return ", ".join(shown[:most]) + (" ..." if len(shown) > most else "") or "none"
