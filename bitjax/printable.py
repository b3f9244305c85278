"""Text from files, made fit for a terminal."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

# Escapes and other controls of a terminal, which a model must not send; tabs and new lines stay.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str, keep: str = "") -> str:
    r"""Text without control characters, which could move a terminal's cursor and more.

    Each becomes its escape, such as `\x1b`, but for those to `keep`.
    """
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


def without_controls(text: str) -> str:
    """A model's text as a terminal may get it: tabs and new lines are the only controls."""
    return _CONTROLS.sub("", text)


def html_table(headings: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> str:
    """A table for notebooks, of texts that may hold anything."""

    def line(cells: Sequence[object], tag: str) -> str:
        return "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells)

    caption = f"<caption>{html.escape(title)}</caption>" if title else ""
    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f"<table>{caption}<tr>{line(headings, 'th')}</tr>{body}</table>"
