"""What a tokenizer is, and the simplest: every byte its own token, any text, nothing to train.

Those of released models are in `bitjax.text`.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Protocol

import numpy as np


class StreamDecoder(Protocol):
    """Turns one stream of tokens into text as they come."""

    def feed(self, token: int) -> str:
        """Text completed by this token, possibly none; never a part of a character."""

    def finish(self) -> str:
        """What an unfinished character at the end leaves."""


class Tokenizer(Protocol):
    """Text to token ids and back.

    Attributes:
        name: of its kind.
        vocab_size: number of tokens.
        stop: tokens that end a generated text.
        chat_template: in Jinja; None without one.
    """

    name: str

    @property
    def vocab_size(self) -> int: ...

    @property
    def stop(self) -> tuple[int, ...]: ...

    @property
    def chat_template(self) -> str | None: ...

    def encode(self, text: str) -> np.ndarray:
        """int32 `[T]`, with the token that begins a text if there is one."""

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of the tokens."""

    def stream_decoder(self, continues: bool = False) -> StreamDecoder:
        """A decoder for one stream of tokens.

        Args:
            continues: the tokens follow others, so that a space at their beginning is one.
        """


class ByteTokenizer:
    """UTF-8 bytes as token ids 0..255."""

    name = "bytes"
    vocab_size = 256
    stop: tuple[int, ...] = ()
    chat_template: str | None = None

    def encode(self, text: str) -> np.ndarray:
        """int32 `[T]`. Lone surrogates, which UTF-8 cannot hold, raise ValueError."""
        return np.frombuffer(utf8(text), np.uint8).astype(np.int32)

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of the tokens; malformed UTF-8 becomes U+FFFD."""
        decoder = self.stream_decoder()
        return "".join(map(decoder.feed, tokens)) + decoder.finish()

    def stream_decoder(self, continues: bool = False) -> ByteStreamDecoder:
        """A decoder for one stream of tokens; what came before them makes no difference."""
        return ByteStreamDecoder()


BYTES = ByteTokenizer()


def utf8(text: str) -> bytes:
    """The bytes of a text.

    Raises:
        ValueError: lone surrogates, which UTF-8 cannot hold.
    """
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the text is not valid Unicode: {error.reason}") from None


class ByteStreamDecoder:
    """Turns tokens into text as they come, never cutting a UTF-8 character in two."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """Text completed by this token, possibly none; ids that are no byte give U+FFFD."""
        if not 0 <= token < 256:
            return self.finish() + "\ufffd"
        return self._decoder.decode(bytes([token]))

    def finish(self) -> str:
        """What an unfinished character at the end leaves."""
        return self._decoder.decode(b"", final=True)
