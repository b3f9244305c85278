"""Text from files, made fit for a terminal."""

from __future__ import annotations


def printable(text: str, keep: str = "") -> str:
    r"""Text without control characters, which could move a terminal's cursor and more.

    Each becomes its escape, such as `\x1b`, but for those to `keep`.
    """
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)
