"""A tokenizer made of a `tokenizers` JSON: GPT-2-like byte-level BPE, or sentencepiece-like.

Encoding is the library's. Decoding is ours, for it has to come in pieces: every token stands for
bytes, whatever its text looks like, and bytes become text when a character is complete.

    byte level        each character of a piece stands for one byte (`BYTE_OF`)
    sentencepiece     U+2581 stands for a space, <0x41> for a byte, the rest for itself
    added tokens      stand for themselves

The library and the JSON are touched when text is, not before: a model that runs on token ids needs
neither.
"""

from __future__ import annotations

import codecs
import dataclasses
import functools
import re
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from bitjax.text import document as documents
from bitjax.text.document import SPACE
from bitjax.tokenizer import utf8

if TYPE_CHECKING:
    import tokenizers

T = TypeVar("T")
MAX_STOP = 64
MAX_TEMPLATE = 1 << 17  # characters; the longest known, with tools, have some 20,000
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_characters() -> dict[int, str]:
    """GPT-2's printable character of each byte.

    Printable bytes of Latin-1 stand for themselves, the others for U+0100 and on, in their order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(0x100 + i) for i, b in enumerate(others)}


CHARACTER_OF = _byte_characters()
BYTE_OF = {character: byte for byte, character in CHARACTER_OF.items()}


@dataclasses.dataclass(frozen=True)
class Specials:
    """What a tokenizer's JSON does not say.

    Attributes:
        bos: begins every text, if `add_bos`.
        stop: end a text when generated; the first is the one that training put at ends.
        add_bos: whether `encode` puts `bos` first.
        chat_template: in Jinja; None without one.
        pre: GGUF's name of the way text is cut into words, if known.

    Raises:
        ValueError: a value of the wrong type, or too long.
    """

    bos: int | None = None
    stop: tuple[int, ...] = ()
    add_bos: bool = False
    chat_template: str | None = None
    pre: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.stop, tuple) or len(self.stop) > MAX_STOP:
            raise ValueError(f"stop={self.stop!r:.60} is not a list of up to {MAX_STOP} tokens")
        ids = self.stop if self.bos is None else (self.bos, *self.stop)
        if not all(type(token) is int and token >= 0 for token in ids):
            raise ValueError(f"bos={self.bos!r:.40} and stop={self.stop!r:.60} are not tokens")
        if not isinstance(self.add_bos, bool) or (self.add_bos and self.bos is None):
            raise ValueError(f"add_bos={self.add_bos!r:.40} with bos={self.bos!r:.40}")
        for name, most in (("chat_template", MAX_TEMPLATE), ("pre", 64)):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and len(value) <= most):
                raise ValueError(f"{name}={value!r:.40} is no text of up to {most:,} characters")


class TextTokenizer:
    """Text to token ids and back, as the model's own tokenizer does it.

    Args:
        json: of the `tokenizers` library, or what reads it.
        special: see `Specials`.
        where: names the source in messages.
        size: number of tokens, where it is known without the JSON; checked when that is read.
    """

    name = "text"

    def __init__(
        self,
        json: str | bytes | Callable[[], bytes],
        special: Specials | None = None,
        where: str = "tokenizer",
        size: int | None = None,
    ) -> None:
        self._json = json
        self._size = size
        self.special = special or Specials()
        self.where = where
        self._lock = threading.Lock()

    @functools.cached_property
    def json(self) -> str:
        """The JSON text.

        Raises:
            ValueError: not UTF-8.
        """
        raw = self._json() if callable(self._json) else self._json
        try:
            return raw if isinstance(raw, str) else raw.decode()
        except UnicodeDecodeError:
            raise ValueError(f"{self.where} is not UTF-8") from None

    @functools.cached_property
    def document(self) -> dict[str, Any]:
        """The parsed JSON, checked.

        Raises:
            ValueError: see `bitjax.text.document`; or special ids that are no tokens.
        """
        found = documents.parse(self.where, self.json)
        size, special = documents.size(self.where, found), self.special
        for token in (special.bos, *special.stop):
            if token is not None and not 0 <= token < size:
                raise ValueError(f"{self.where}: special token {token} is not in 0..{size - 1}")
        if self._size not in (None, size):
            raise ValueError(f"{self.where} has {size} tokens; {self._size} were announced")
        return found

    @functools.cached_property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return self._size or documents.size(self.where, self.document)

    @property
    def stop(self) -> tuple[int, ...]:
        """Tokens that end a generated text."""
        return self.special.stop

    @property
    def chat_template(self) -> str | None:
        """In Jinja; None without one."""
        return self.special.chat_template

    @functools.cached_property
    def control(self) -> dict[str, int]:
        """Tokens that are no text, such as those of a chat's turns, by their names."""
        return {e["content"]: i for i, e in self._added.items() if e.get("special")}

    def check(self) -> TextTokenizer:
        """Read everything now; returns itself.

        Raises:
            ValueError: the JSON cannot be used.
        """
        self._backend  # noqa: B018
        return self

    def encode(self, text: str, *, control: bool = False, bos: bool | None = None) -> np.ndarray:
        """int32 `[T]`.

        Args:
            text: any Unicode.
            control: whether names of control tokens in the text stand for them; else they are text
                like any other, which is what text of unknown origin needs.
            bos: whether to begin with the bos token; by default as the model wants it.

        Raises:
            ValueError: lone surrogates, or an expression of the tokenizer that does not end.
        """
        utf8(text)  # refuses what is no Unicode
        backend = self._backend
        with self._lock:
            backend.encode_special_tokens = not control
            ids = self._guarded(lambda: backend.encode(text, add_special_tokens=False).ids)
        if self._spelled and not control:
            ids = [part for token in ids for part in self._spelled.get(token, (token,))]
        first = self.special.bos
        if first is not None and (self.special.add_bos if bos is None else bos):
            ids = [first, *ids]
        return np.array(ids, np.int32)

    def decode(self, tokens: Iterable[int], *, control: bool = False) -> str:
        """Text of the tokens; malformed UTF-8 becomes U+FFFD.

        Args:
            tokens: any.
            control: whether control tokens show by name; else they are left out.
        """
        decoder = PieceDecoder(self, continues=False, control=control)
        return "".join(map(decoder.feed, map(int, tokens))) + decoder.finish()

    def stream_decoder(self, continues: bool = False) -> PieceDecoder:
        """A decoder for one stream of tokens.

        Args:
            continues: the tokens follow others, so that a space at their beginning is one.
        """
        return PieceDecoder(self, continues, control=False)

    def words(self, text: str) -> list[str]:
        """The words that the pre-tokenizer cuts a text into."""
        cutter = self._backend.pre_tokenizer
        if cutter is None:
            return [text]
        return [word for word, _ in self._guarded(lambda: cutter.pre_tokenize_str(text))]

    def token_bytes(self, token: int) -> bytes | None:
        """The bytes that a token stands for, control tokens by name; None if it is none."""
        if token not in self._bytes:
            self._bytes[token] = self._bytes_of(token)
        return self._bytes[token]

    @functools.cached_property
    def _bytes(self) -> dict[int, bytes | None]:
        return {token: e["content"].encode() for token, e in self._added.items()}

    def _bytes_of(self, token: int) -> bytes | None:
        piece = self._backend.id_to_token(token) if 0 <= token < self.vocab_size else None
        if piece is None:
            return None
        if self._decoded.byte_level:
            if all(character in BYTE_OF for character in piece):
                return bytes(BYTE_OF[character] for character in piece)
            return piece.encode()
        byte = _BYTE_PIECE.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE, " ").encode()

    @functools.cached_property
    def _spelled(self) -> dict[int, list[int]]:
        """Control tokens of a Unigram model, which finds them in any text, by their letters."""
        model = self.document["model"]
        if model.get("type") != "Unigram":
            return {}
        unknown, backend = model.get("unk_id"), self._backend

        def letters(name: str) -> Iterable[int]:
            for letter in name:
                token = backend.token_to_id(letter)
                raw = [backend.token_to_id(f"<0x{byte:02X}>") for byte in letter.encode()]
                known = [token] if token is not None else raw
                yield from (unknown if part is None else part for part in known)

        return {token: [part for part in letters(name) if part is not None]
                for name, token in self.control.items() if token != unknown}  # fmt: skip

    @functools.cached_property
    def _decoded(self) -> documents.Decoded:
        return documents.decoded(self.where, self.document)

    @functools.cached_property
    def _added(self) -> dict[int, dict[str, Any]]:
        return {e["id"]: e for e in documents.added_tokens(self.where, self.document)}

    @functools.cached_property
    def _control_ids(self) -> frozenset[int]:
        return frozenset(self.control.values())

    @functools.cached_property
    def _backend(self) -> tokenizers.Tokenizer:
        import tokenizers

        added = self._added  # checked before the library sees anything
        backend = self._guarded(lambda: tokenizers.Tokenizer.from_str(self.json))
        backend.no_truncation()
        backend.no_padding()
        for token, entry in added.items():
            if backend.token_to_id(entry["content"]) != token:
                raise ValueError(f"{self.where}: {entry['content']!r:.40} does not get id {token}")
        return backend

    def _guarded(self, run: Callable[[], T]) -> T:
        """Run what may raise the library's own exceptions, its panics included."""
        try:
            return run()
        except BaseException as error:
            # A panic derives from BaseException alone, so as not to be caught.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"{self.where}: {error}") from None


class PieceDecoder:
    """Turns tokens into text as they come, never cutting a character in two."""

    def __init__(self, tokenizer: TextTokenizer, continues: bool, control: bool) -> None:
        self._tokenizer = tokenizer
        self._hidden = frozenset() if control else tokenizer._control_ids
        self._strip = tokenizer._decoded.strips and not continues
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """Text completed by this token, possibly none; ids that are no token give U+FFFD."""
        if token in self._hidden:
            return self.finish()
        raw = self._tokenizer.token_bytes(token)
        if raw is None:
            return self.finish() + "\ufffd"
        if self._strip:
            raw, self._strip = raw.removeprefix(b" "), False
        return self._decoder.decode(raw)

    def finish(self) -> str:
        """What an unfinished character at the end leaves."""
        return self._decoder.decode(b"", final=True)
