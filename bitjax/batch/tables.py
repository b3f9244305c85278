"""A job's records as a table, Parquet or CSV: a row for each choice, or for a line's error.

    index, id, choice, text, finish_reason, prompt_tokens, completion_tokens, error, kept fields

In the input's order, whatever that of the records. Two passes over the records: the first finds
where each line of the input begins and what the kept fields hold, so that memory has 8 bytes for
each line of the input, and one batch of rows.
"""

from __future__ import annotations

import csv
import json
import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bitjax.batch.requests import index_of
from bitjax.batch.results import beside, line_of
from bitjax.corpus.streams import require_package

COLUMNS = ("index", "id", "choice", "text", "finish_reason", "prompt_tokens", "completion_tokens",
           "error")  # fmt: skip
_INTEGERS = ("index", "choice", "prompt_tokens", "completion_tokens")
_ROWS = 4096  # written at once
Row = dict[str, Any]


def write_table(records: Path, path: Path, keep: Sequence[str], total: int) -> None:
    """Write the table, all or nothing.

    Args:
        records: JSON lines, a record of each line of the input.
        path: ends in .csv or .parquet.
        keep: names of kept fields.
        total: lines of the input.
    """
    starts, kinds = _survey(records, keep, total)
    fresh = beside(path, "new")
    rows = _rows(records, starts, keep, kinds)
    if path.suffix == ".csv":
        with fresh.open("w", newline="", encoding="utf-8") as file:
            out = csv.DictWriter(file, (*COLUMNS, *keep))
            out.writeheader()
            out.writerows(rows)
            file.flush()
            os.fsync(file.fileno())
    else:
        _write_parquet(fresh, rows, keep, kinds)
    os.replace(fresh, path)


def _survey(
    records: Path, keep: Sequence[str], total: int
) -> tuple[array[int], dict[str, set[type]]]:
    starts, kinds, at = array("q", [0]) * total, {name: set[type]() for name in keep}, 0
    with records.open("rb") as file:
        for raw in file:
            record = json.loads(raw)
            starts[index_of(record)] = at
            at += len(raw)
            for name in keep:
                if record.get(name) is not None:
                    kinds[name].add(_kind(record[name]))
    return starts, kinds


def _rows(
    records: Path, starts: array[int], keep: Sequence[str], kinds: dict[str, set[type]]
) -> Iterator[Row]:
    with records.open("rb") as file:
        for index, start in enumerate(starts):
            if start != file.tell():
                file.seek(start)
            record = json.loads(file.readline())
            kept = {name: _cell(record.get(name), kinds[name]) for name in keep}
            for row in _of(record):
                yield {"index": index, **row, **kept}


def _of(record: dict[str, Any]) -> list[Row]:
    name = record.get("custom_id", record.get("id"))
    body = record
    if "custom_id" in record:
        body = (record["response"] or {}).get("body") or {"error": record["error"]}
    if body.get("error"):
        return [{"id": name, "error": body["error"]["message"]}]
    found: list[Row] = []
    for choice in body.get("choices", [body]):
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        found.append(
            {"id": name, "choice": len(found), "text": text,
             "finish_reason": choice["finish_reason"],
             "prompt_tokens": body["usage"]["prompt_tokens"],
             "completion_tokens": body["usage"]["completion_tokens"]}
        )  # fmt: skip
    return found


def _kind(value: Any) -> type:
    """The type of a kept value; `object` for one that no column of a plain type can hold."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return object
    if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
        return object
    return type(value)


def _cell(value: Any, kinds: set[type]) -> Any:
    """Of a column that holds values of several kinds, or no plain ones, each cell is JSON."""
    if value is None or kinds in ({str}, {bool}, {int}, {float}, {int, float}):
        return value
    return line_of(value).decode().removesuffix("\n")


def _write_parquet(
    path: Path, rows: Iterator[Row], keep: Sequence[str], kinds: dict[str, set[type]]
) -> None:
    arrow = require_package("pyarrow")
    types = {str: arrow.string(), bool: arrow.bool_(), int: arrow.int64(), float: arrow.float64()}
    fields = [(name, arrow.int64() if name in _INTEGERS else arrow.string()) for name in COLUMNS]
    for name in keep:
        found = kinds[name]
        kind = float if found == {int, float} else next(iter(found)) if len(found) == 1 else str
        fields.append((name, types.get(kind, arrow.string())))
    schema = arrow.schema(fields)
    with require_package("pyarrow.parquet").ParquetWriter(path, schema) as out:
        batch: list[Row] = []
        for row in rows:
            batch.append(row)
            if len(batch) == _ROWS:
                out.write_table(arrow.Table.from_pylist(batch, schema))
                batch = []
        if batch:
            out.write_table(arrow.Table.from_pylist(batch, schema))
