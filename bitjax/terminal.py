"""What a person sees at the command line: progress and tables."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from bitjax.printable import printable
from bitjax.train import Report

WIDTH_OF_FILES = 200  # columns of a table in a file or a pipe, which need not fit a screen


def _console(file: IO[str] | None = None, width: int | None = None) -> Console:
    # Names in files, and texts, may look like markup or names of pictures (:smile:).
    return Console(file=file, width=width, highlight=False, markup=False, emoji=False)


console = _console()


@contextmanager
def training_progress(label: str) -> Iterator[Callable[[Report], None]]:
    """A live bar with step, loss, tokens/s and ETA; plain lines, about 20, when not a terminal."""
    if not console.is_terminal:
        yield _line_reporter(label)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(label, total=None, numbers="compiling")

        def update(report: Report) -> None:
            progress.update(
                task, completed=report.step, total=report.steps, numbers=_numbers(report)
            )

        yield update


@contextmanager
def byte_progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A live bar of bytes done, with rate and ETA; nothing when not a terminal."""
    if not console.is_terminal:
        yield lambda done, total: None
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def job_progress(label: str) -> Iterator[Callable[[int, int, str], None]]:
    """A live bar of things done, of how many, and numbers; about 20 lines when not a terminal."""
    printed = -1

    def line(done: int, total: int, numbers: str) -> None:
        nonlocal printed
        twentieth = 20 * done // max(1, total)
        if twentieth > printed:
            printed = twentieth
            console.print(f"{label}  {done:,}/{total:,}  {numbers}", soft_wrap=True)

    if not console.is_terminal:
        yield line
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[numbers]}"),
        TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(label, total=None, numbers="reading")
        yield lambda done, total, numbers: progress.update(
            task, completed=done, total=total, numbers=f"{done:,}/{total:,}  {numbers}"
        )


def _line_reporter(label: str) -> Callable[[Report], None]:
    printed = -1

    def update(report: Report) -> None:
        nonlocal printed
        twentieth = 20 * report.step // report.steps
        if twentieth > printed or report.valid_loss is not None:
            printed = twentieth
            console.print(f"{label}  {_numbers(report)}", soft_wrap=True)

    return update


def _numbers(report: Report) -> str:
    text = f"step {report.step}/{report.steps}  loss {report.loss:.3f}"
    if report.valid_loss is not None:
        text += f"  valid {report.valid_loss:.3f}"
    return f"{text}  {report.tokens_per_second:,.0f} tok/s  ETA {clock(report.seconds_left)}"


def clock(seconds: float) -> str:
    """`m:ss`, or `h:mm:ss` from an hour on."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str = "") -> None:
    """Print a table; the first column is left-aligned, the others right-aligned."""
    drawn = Table(title=title or None, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        drawn.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        drawn.add_row(*(printable(str(cell), keep="\n") for cell in row))
    wide = not console.is_terminal and "COLUMNS" not in os.environ
    out = _console(console.file, WIDTH_OF_FILES) if wide else console
    out.print(drawn)


def size(count: float) -> str:
    """Bytes for a person: `364.2 kB` (1 kB = 1000 bytes)."""
    power = min(4, int(math.log(max(count, 1), 1000)))
    unit = ("B", "kB", "MB", "GB", "TB")[power]
    return f"{count / 1000**power:.1f} {unit}" if power else f"{count:.0f} B"
