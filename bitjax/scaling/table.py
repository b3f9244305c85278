"""The table of finished runs: a CSV file, one row a run.

A row is added by writing the whole file anew beside the old one and renaming it, under a lock: a
process killed at any instant leaves either the old table or the new one, and two processes lose no
row. What is read is checked: columns, types, finite numbers, no run twice.
"""

from __future__ import annotations

import csv
import dataclasses
import fcntl
import io
import json
import math
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitjax.replacing import replace_text

MEANING: dict[str, str] = {
    "run": "name, unique: size, training tokens, seed and arm",
    "arm": "how the model is trained or rounded; see bitjax/scaling/arms.py",
    "hidden_size": "width D of the model",
    "num_layers": "blocks of the model",
    "N": "non-embedding parameters: weights of all linear layers",
    "embedding_parameters": "weights of embedding and head",
    "D": "training tokens, all parts of a continual run together; of a rounded run the float run's",
    "flops": "of training: D (6 (N + head) + 12 layers width sequence), arXiv 2204.02311",
    "seed": "of initial weights and data order; equal in all arms of a cell",
    "learning_rate": "peak, from the arm's and size's sweep",
    "loss": "nats per held-out token at the end of training",
    "loss_se": "standard error of loss over held-out documents (windows, where there are few); "
    "runs are scored on the same ones, so differences of two runs have a smaller one",
    "bits_per_byte": "loss / ln 2, times held-out tokens per byte",
    "tokenizer": "of the data",
    "data": "identity (SHA-256) of the corpus",
    "validation": "identity of what is held out, and of how it is cut into windows",
    "ended": "whether the run came to the end of its learning-rate schedule",
    "status": "finished",
    "seconds": "of training, without compilation where it was resumed, on the machine of the run",
    "commit": "of the code",
    "config": "the whole training configuration as JSON, and what was rounded or started from",
    "curve": "file beside the table: training loss over steps, held-out nats of each document",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One finished run; columns as in `MEANING`."""

    run: str
    arm: str
    hidden_size: int
    num_layers: int
    N: int
    embedding_parameters: int
    D: int
    flops: float
    seed: int
    learning_rate: float
    loss: float
    loss_se: float
    bits_per_byte: float
    tokenizer: str
    data: str
    validation: str
    ended: bool
    status: str
    seconds: float
    commit: str
    config: str
    curve: str

    def __post_init__(self) -> None:
        for name, kind in TYPES.items():
            value = getattr(self, name)
            if kind is float and not math.isfinite(value):
                raise ValueError(f"{name}={value} is not a finite number")
            if kind is str and any(c in value for c in "\r\n\0"):
                raise ValueError(f"{name}={value!r:.60} has more than one line")
        for name in ("N", "D", "hidden_size", "num_layers", "flops", "loss"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        for name in ("loss_se", "seconds", "learning_rate", "seed", "embedding_parameters"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is negative")
        try:
            held = json.loads(self.config)
        except (ValueError, RecursionError):
            held = None
        if not isinstance(held, dict):
            raise ValueError(f"config is no JSON object: {self.config!r:.60}")

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration, parsed."""
        found: dict[str, Any] = json.loads(self.config)
        return found


TYPES: dict[str, type] = typing.get_type_hints(Row)
COLUMNS = tuple(field.name for field in dataclasses.fields(Row))


def read_table(path: Path) -> list[Row]:
    """The rows of a table, in its order.

    Raises:
        ValueError: no table there, a missing column, a damaged line, a NaN, or a run that is there
            twice; naming file and line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason}") from None
    except OSError as error:
        raise ValueError(f"cannot read the table {path}: {error.strerror}") from None
    if not text.endswith("\n"):
        raise ValueError(f"{path} is damaged: its last line is cut short")
    lines = csv.reader(io.StringIO(text), strict=True)
    rows: dict[str, Row] = {}
    try:
        header = next(lines)
        missing = [name for name in COLUMNS if name not in header]
        if missing or len(set(header)) != len(header):
            raise ValueError(f"its columns lack {', '.join(missing) or 'names of their own'}")
        for fields in lines:
            row = _row(header, fields)
            if row.run in rows:
                raise ValueError(f"the run {row.run} is there twice")
            rows[row.run] = row
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}, line {max(1, lines.line_num)}: {error}") from None
    return list(rows.values())


def _row(header: Sequence[str], fields: Sequence[str]) -> Row:
    if len(fields) != len(header):
        raise ValueError(f"{len(fields)} fields instead of {len(header)}: the line is damaged")
    held = dict(zip(header, fields, strict=True))
    return Row(**{name: _value(name, held[name]) for name in COLUMNS})


def _value(name: str, text: str) -> Any:
    kind = TYPES[name]
    if kind is str:
        return text
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError(f"{name}={text!r:.40} is not true or false")
        return text == "true"
    try:
        return kind(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name}={text!r:.40} is not {wanted}") from None


def append_row(path: Path, row: Row) -> None:
    """Add a row, at once or not at all; a table that is not there is begun.

    Raises:
        ValueError: a damaged table, or one that has the run already.
    """
    with locked(path.with_name(path.name + ".lock")):
        rows = read_table(path) if path.exists() else []
        if any(known.run == row.run for known in rows):
            raise ValueError(f"{path} has the run {row.run} already")
        write_table(path, [*rows, row])


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as a table that replaces `path` when it is whole and on the disk."""
    made = io.StringIO()
    out = csv.writer(made, lineterminator="\n")
    out.writerow(COLUMNS)
    out.writerows([_text(getattr(row, name)) for name in COLUMNS] for row in rows)
    replace_text(path, made.getvalue())


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold a lock that ends with the process.

    Raises:
        BlockingIOError: another process holds it, and `wait` is False.
    """
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def card(rows: Sequence[Row]) -> str:
    """What the columns mean and what the rows are, in Markdown."""
    arms: dict[str, int] = {}
    for row in rows:
        arms[row.arm] = arms.get(row.arm, 0) + 1
    lines = ["| column | meaning |", "|---|---|"]
    lines += [f"| {name} | {MEANING[name]} |" for name in COLUMNS]
    lines += ["", f"{len(rows)} rows: " + ", ".join(f"{n} {arm}" for arm, n in arms.items())]
    return "\n".join(lines) + "\n"
