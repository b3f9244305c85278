"""Records on the disk, each once, whatever ends the process: kill -9, a full disk, a power cut.

Three files, of which the last two are ours:

    OUT            a record a line, appended by whole lines; a line that was cut short is dropped
    OUT.job        a line that says of what job, one more when it is complete; locked while it runs
    OUT.ahead      in the input's order alone: records that wait for those before them

A record counts as done once its line is in OUT or OUT.ahead, and its line of the input is then
never run again.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from bitjax.batch.requests import index_of

SYNC_SECONDS = 1.0  # between the moments at which the disk, not only the system, has everything
_SLACK = 1 << 22  # bytes of lines already moved to OUT, before OUT.ahead is written anew


class Results:
    """The records of one job; a context manager, which holds the lock.

    Args:
        path: OUT.
        job: what decides the records, JSON; another job's files are refused.
        total: lines of the input.
        ordered: whether OUT has the input's order.
        overwrite: whether files that are there are replaced.

    Attributes:
        complete: whether the job was complete when it was opened.
        done: records, errors among them.

    Raises:
        ValueError: the files are of another job, damaged, or in use.
    """

    def __init__(
        self, path: Path, job: Mapping[str, Any], total: int, ordered: bool, overwrite: bool = False
    ) -> None:
        self.path = path
        self._total = total
        self._ordered = ordered
        self._has = bytearray(total)
        self.done = 0
        self.complete = False
        self._next = 0  # of an ordered output
        self._ahead: dict[int, bytes] = {}
        self._synced = time.monotonic()
        with contextlib.ExitStack() as stack:
            self._job = stack.enter_context(_Appended(beside(path, "job"), lock=True))
            self._begin(dict(job), overwrite)
            self._out = stack.enter_context(_Appended(path))
            self._waiting = (
                stack.enter_context(_Appended(beside(path, "ahead"))) if ordered else None
            )
            if overwrite:
                for file in (self._out, self._waiting):
                    if file is not None:
                        file.truncate(0)
            self._read()
            self.complete = self.complete and self.done == total
            self._stack = stack.pop_all()

    def _begin(self, job: dict[str, Any], overwrite: bool) -> None:
        lines = list(self._job.whole_lines())
        if overwrite or not lines:
            if not overwrite and self.path.exists() and self.path.stat().st_size:
                raise ValueError(f"{self.path} exists; choose another name or give --overwrite")
            self._job.truncate(0)
            self._job.append(line_of(job))
            self._job.sync()
            return
        try:
            before = json.loads(lines[0])
            self.complete = len(lines) > 1 and bool(json.loads(lines[1])["complete"])
            keys = [key for key in {**before, **job} if before.get(key) != job.get(key)]
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{self._job.path} is damaged; remove it and {self.path.name}, or "
                             "give --overwrite") from None  # fmt: skip
        if keys:
            raise ValueError(
                f"{self.path} was begun with another {' and another '.join(keys)}; choose another "
                "name or give --overwrite"
            )

    def _read(self) -> None:
        for number, raw in enumerate(self._out.whole_lines(), 1):
            self._take(self._out, number, raw)
        self._next = self._first_missing(0)
        if self._waiting is None:
            return
        if self._ordered and self._next != self.done:
            raise ValueError(f"{self.path} is damaged: its records are not in the input's order")
        for raw in self._waiting.whole_lines():
            # Those of a line in OUT were moved there just before the end.
            index = self._index(self._waiting, raw)
            if not self._has[index]:
                self._has[index] = 1
                self.done += 1
                self._ahead[index] = raw + b"\n"
        self._move()

    def _take(self, file: _Appended, number: int, raw: bytes) -> None:
        index = self._index(file, raw)
        if self._has[index]:
            raise ValueError(
                f"{file.path} is damaged: line {number:,} is a second record of {index}"
            )
        self._has[index] = 1
        self.done += 1

    def _index(self, file: _Appended, raw: bytes) -> int:
        try:
            index = index_of(json.loads(raw))
            if 0 <= index < self._total:
                return index
        except (ValueError, RecursionError):
            pass
        raise ValueError(f"{file.path} is damaged: {raw[:40]!r} is no record of this job")

    def __contains__(self, index: object) -> bool:
        return isinstance(index, int) and bool(self._has[index])

    def __len__(self) -> int:
        return self._total

    @property
    def lead(self) -> int:
        """Of an ordered output the line that all behind it wait for; of another 0."""
        return self._next if self._ordered else 0

    @property
    def ahead(self) -> int:
        """Records that wait for those before them."""
        return len(self._ahead)

    def add(self, records: Mapping[int, Mapping[str, Any]]) -> None:
        """Append records by the index of their lines, in one piece.

        Raises:
            OSError: the disk is full, or gone; nothing of the last piece is left then.
        """
        lines = {index: line_of(record) for index, record in records.items()}
        assert not any(self._has[index] for index in lines)
        if self._waiting is None:
            self._out.append(b"".join(lines.values()))
        else:
            # Straight to OUT what nothing is missing before; the rest waits, on the disk.
            self._ahead.update(lines)
            ready = self._first_missing(self._next, lines)
            late = b"".join(raw for index, raw in lines.items() if index >= ready)
            if late:
                self._waiting.append(late)
        for index in lines:
            self._has[index] = 1
        self.done += len(lines)
        self._move()
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()

    def _first_missing(self, start: int, more: Mapping[int, object] | None = None) -> int:
        more = more or {}
        while start < self._total and (self._has[start] or start in more):
            start += 1
        return start

    def _move(self) -> None:
        """What nothing is missing before goes from waiting to OUT."""
        if self._waiting is None:
            return
        ready = self._first_missing(self._next)
        moved = b"".join(self._ahead.pop(index) for index in range(self._next, ready))
        if moved:
            self._out.append(moved)
        self._next = ready
        left = sum(map(len, self._ahead.values())) if self._waiting.size > _SLACK else 0
        if self._waiting.size and (not self._ahead or self._waiting.size - left > _SLACK):
            self._out.sync()  # before it is forgotten here
            self._waiting.replace(b"".join(self._ahead.values()))

    def sync(self) -> None:
        """Have the disk take everything."""
        self._out.sync()
        if self._waiting is not None:
            self._waiting.sync()
        self._synced = time.monotonic()

    def finish(self) -> None:
        """Say that the job is complete."""
        assert self.done == self._total
        self.sync()
        self._job.append(line_of({"complete": True}))
        self._job.sync()
        if self._waiting is not None:
            self._waiting.path.unlink()
        self.complete = True

    def close(self) -> None:
        """Let go of the files."""
        self._stack.close()

    def __enter__(self) -> Results:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()


class _Appended:
    """A file of lines that grows at its end, always by whole pieces."""

    def __init__(self, path: Path, lock: bool = False) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        self.size = os.fstat(self._file).st_size
        if lock:
            import fcntl

            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(self._file)
                raise ValueError(f"another process is writing this job: {path} is locked") from None

    def whole_lines(self) -> Iterator[bytes]:
        """The lines without their ends, behind which the file is cut off."""
        whole = 0
        with open(self.path, "rb") as file:
            for raw in file:
                if not raw.endswith(b"\n"):
                    break
                whole += len(raw)
                yield raw[:-1]
        if whole != self.size:
            self.truncate(whole)

    def append(self, raw: bytes) -> None:
        view = memoryview(raw)
        try:
            while view:
                view = view[os.write(self._file, view) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self.size)
            raise
        self.size += len(raw)

    def replace(self, raw: bytes) -> None:
        """Other content, all or nothing."""
        fresh = beside(self.path, "new")
        with fresh.open("wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, self.path)
        os.close(self._file)
        self._file = os.open(self.path, os.O_RDWR | os.O_APPEND)
        self.size = len(raw)

    def truncate(self, size: int) -> None:
        os.ftruncate(self._file, size)
        self.size = size

    def sync(self) -> None:
        os.fsync(self._file)

    def __enter__(self) -> _Appended:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)


def beside(path: Path, ending: str) -> Path:
    """A file that goes with another."""
    return path.with_name(f"{path.name}.{ending}")


def line_of(record: object) -> bytes:
    """A record, or what is in one, as a line of JSON, in UTF-8 where it can be said so."""
    try:
        return (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except UnicodeEncodeError:  # a lone surrogate of a field that is only passed on
        return (json.dumps(record, allow_nan=False) + "\n").encode()
