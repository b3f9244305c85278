"""Byte tokens: every byte is its own token, so any text is representable and nothing is trained."""

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
    """Text to token ids and back."""

    name: str
    vocab_size: int

    def encode(self, text: str) -> np.ndarray:
        """int32 `[T]`."""

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of the tokens."""

    def stream_decoder(self) -> StreamDecoder:
        """A decoder for one stream of tokens."""


class ByteTokenizer:
    """UTF-8 bytes as token ids 0..255."""

    name = "bytes"
    vocab_size = 256

    def encode(self, text: str) -> np.ndarray:
        """int32 `[T]`. Lone surrogates, which UTF-8 cannot hold, raise ValueError."""
        try:
            raw = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"the text is not valid Unicode: {error.reason}") from None
        return np.frombuffer(raw, np.uint8).astype(np.int32)

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of the tokens; malformed UTF-8 becomes U+FFFD."""
        decoder = self.stream_decoder()
        return "".join(map(decoder.feed, tokens)) + decoder.finish()

    def stream_decoder(self) -> ByteStreamDecoder:
        """A decoder for one stream of tokens."""
        return ByteStreamDecoder()


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
