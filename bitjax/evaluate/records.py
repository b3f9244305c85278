"""What a model said to each item, kept as it comes: for resuming, and for paired tests.

A file is JSONL: a header with what was evaluated, then a record a line, appended and flushed to
the disk batch by batch. A line that a crash cut short is dropped. A record is found again by its
item's id, and by a digest of the very tokens that the model was given.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
import numpy as np
from flax import nnx

from bitjax.model import Transformer


@dataclass(frozen=True)
class Record:
    """The result of one item.

    Attributes:
        id: of the item in its task.
        part: see `Item`.
        group: see `Item`.
        digest: of the tokens that the model was given.
        gold: index of the right choice.
        log_likelihoods: of the choices, in nats.
        acc: 1 if right, else 0.
        acc_norm: the same after division by length; None where that means nothing.
        bits_per_byte: of the right choice.
    """

    id: str
    part: str
    group: str
    digest: str
    gold: int
    log_likelihoods: tuple[float, ...]
    acc: float
    acc_norm: float | None
    bits_per_byte: float


@dataclass(frozen=True)
class Answer:
    """What a model wrote to one exercise.

    Attributes:
        id: of the exercise in its task.
        digest: of the prompt and of how texts were drawn.
        texts: of each sample.
        said: of each sample, what was found in it.
        values: of each metric, by its name.
        part, group: always empty; exercises have none.
    """

    id: str
    digest: str
    texts: tuple[str, ...]
    said: tuple[str, ...]
    values: dict[str, float]
    part: str = ""
    group: str = ""


Kept = TypeVar("Kept", Record, Answer)


class Records(Generic[Kept]):
    """The records of one model, task and choice of settings.

    Args:
        folder: of all records; made if need be.
        header: what was evaluated; its digest is in the file's name.
        kind: of the records.

    Attributes:
        path: of the file.

    Raises:
        ValueError: a file there is of something else, or damaged before its last line.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any], kind: type[Kept]) -> None:
        first = json.dumps({"bitjax_records": 1, **header}, sort_keys=True)
        digest = hashlib.sha256(first.encode()).hexdigest()[:12]
        self.path = folder / f"{header['task']}-{digest}.jsonl"
        self._kind: Callable[..., Kept] = kind
        self._known: dict[str, Kept] = {}
        folder.mkdir(parents=True, exist_ok=True)
        whole = self._read(first) if self.path.exists() else 0
        if whole:
            with self.path.open("r+b") as file:
                file.truncate(whole)
        else:
            self._write("w", [first])

    def _read(self, first: str) -> int:
        """Takes in the file; returns the bytes of its whole lines."""
        raw = self.path.read_bytes()
        whole = raw.rfind(b"\n") + 1
        for number, line in enumerate(raw[:whole].splitlines()):
            try:
                if number == 0:
                    if line.decode() != first:
                        raise ValueError
                    continue
                fields = json.loads(line)
                record = self._kind(
                    **{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
                )
            except (ValueError, TypeError, AttributeError):
                raise ValueError(f"{self.path}, line {number + 1:,}: no record of this evaluation; "
                                 "remove the file or choose another folder") from None  # fmt: skip
            self._known[record.id] = record
        return whole

    def find(self, item: str, digest: str) -> Kept | None:
        """The record of an item, if there is one.

        Raises:
            ValueError: it is of other tokens.
        """
        record = self._known.get(item)
        if record is not None and record.digest != digest:
            raise ValueError(f"{self.path} has a record of another item {item}: the task's file "
                             "has changed; choose another folder for its records")  # fmt: skip
        return record

    def append(self, records: Iterable[Kept]) -> None:
        """Write records to the disk."""
        lines = [json.dumps(asdict(record)) for record in records]
        if lines:
            self._write("a", lines)

    def _write(self, mode: str, lines: list[str]) -> None:
        with self.path.open(mode, encoding="utf-8") as file:
            file.write("".join(line + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())


def fingerprint(model: Transformer) -> str:
    """A digest of all parameters and of the configuration."""
    made = hashlib.sha256(repr(model.config).encode())
    for leaf in jax.tree.leaves(nnx.state(model)):
        array = np.asarray(leaf)
        made.update(f"{array.dtype}{array.shape}".encode())
        made.update(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
    return made.hexdigest()[:16]


def sampled_fingerprint(model: Transformer, blocks: int = 64, size: int = 4096) -> str:
    """A digest of the configuration and of blocks of bytes, evenly spread, of each parameter.

    A file of 20 GB need not be read for it; training changes every block.
    """
    made = hashlib.sha256(repr(model.config).encode())
    for leaf in jax.tree.leaves(nnx.state(model)):
        array = np.asarray(leaf)
        made.update(f"{array.dtype}{array.shape}".encode())
        raw = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        for start in np.linspace(0, max(0, raw.size - size), blocks, dtype=np.int64):
            made.update(raw[start : start + size].data)
            if raw.size <= size:
                break
    return made.hexdigest()[:16]
