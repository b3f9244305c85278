"""sentencepiece `.model` files: a small protobuf of pieces with scores.

    ModelProto       1 pieces   2 trainer_spec   3 normalizer_spec
    piece            1 text   2 score (float)   3 type: 1 normal, 2 unknown, 3 control,
                     4 user defined, 5 unused, 6 byte
    trainer_spec     3 model_type: 1 Unigram, 2 BPE   35 byte_fallback
                     40 unk_id   41 bos_id   42 eos_id
    normalizer_spec  2 precompiled_charsmap   3 add_dummy_prefix   4 remove_extra_whitespaces
                     5 escape_whitespaces

Source: sentencepiece_model.proto of github.com/google/sentencepiece. Read here rather than by the
protobuf library, which would be a dependency for three messages.

Where a model maps characters (`precompiled_charsmap`; Llama 2's does not), the tokenizers library
looks at what a person sees as one character, sentencepiece at the longest match: a carriage return
before a new line, or a letter with marks that do not combine, may come out differently. Where there
are user-defined pieces, spaces at both ends of a text are not removed.
"""

from __future__ import annotations

import base64
import dataclasses
import math
import struct
from collections.abc import Iterator
from typing import Any

from bitjax.interop.tokenizers.documents import (
    Added,
    bpe_model,
    end_tokens,
    merges_by_score,
    require_short,
    sentencepiece,
    tokenizer_of,
    unigram_model,
)
from bitjax.text import Specials, TextTokenizer
from bitjax.text.document import MAX_TOKENS

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_UNIGRAM, _BPE = 1, 2


@dataclasses.dataclass(frozen=True)
class _Piece:
    text: str
    score: float
    kind: int


def tokenizer_from_sentencepiece(raw: bytes, where: str = "sentencepiece model") -> TextTokenizer:
    """The tokenizer of a sentencepiece model file.

    Raises:
        ValueError: malformed, or neither BPE nor Unigram.
    """
    pieces, trainer, normalizer = _read_model(raw, where)
    vocabulary = {piece.text: i for i, piece in enumerate(pieces)}
    if len(vocabulary) != len(pieces):
        raise ValueError(f"{where} holds a piece twice")
    require_short(where, [piece.text for piece in pieces])
    added = [
        Added(i, piece.text, control=piece.kind != USER_DEFINED)
        for i, piece in enumerate(pieces)
        if piece.kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    unknown = next((i for i, piece in enumerate(pieces) if piece.kind == UNKNOWN), None)
    fallback = bool(trainer.get(35, 0))
    kind = trainer.get(3, _UNIGRAM)
    if kind == _BPE:
        scores = {piece.text: piece.score for piece in pieces if piece.kind == NORMAL}
        model = bpe_model(
            vocabulary, merges_by_score(scores),
            None if unknown is None else pieces[unknown].text, fallback,
        )  # fmt: skip
    elif kind == _UNIGRAM:
        model = unigram_model(((p.text, p.score) for p in pieces), unknown, fallback)
    else:
        raise ValueError(f"{where}: the model type is {kind}; supported are Unigram and BPE")
    if not normalizer.get(5, 1):
        raise ValueError(f"{where} keeps spaces as they are, which is not supported")
    parts = any(piece.kind == USER_DEFINED for piece in pieces)  # of a text, between such pieces
    document = sentencepiece(
        model, added, bool(normalizer.get(3, 1)), _normalizers(normalizer, trim=not parts),
        # A space at the beginning would hide the one that is put there.
        once=parts and bool(normalizer.get(4, 1)),
    )  # fmt: skip

    def token(field: int, default: int) -> int | None:
        found = trainer.get(field, default)
        found -= (found >= 1 << 63) << 64  # -1 is none
        return found if 0 <= found < len(pieces) else None

    bos, eos = token(41, 1), token(42, 2)
    control = {a.content: a.token for a in added if a.control}
    return tokenizer_of(
        where, document,
        Specials(bos, end_tokens([] if eos is None else [eos], control), add_bos=bos is not None),
    )  # fmt: skip


def _normalizers(spec: dict[int, Any], trim: bool) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = []
    if spec.get(2):
        charsmap = base64.b64encode(spec[2]).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if spec.get(4, 1):  # spaces at both ends, and all but one elsewhere
        for pattern, content in ((r"\A +| +\z", ""), (" {2,}", " "))[not trim :]:
            steps.append({"type": "Replace", "pattern": {"Regex": pattern}, "content": content})
    return steps


def _read_model(raw: bytes, where: str) -> tuple[list[_Piece], dict[int, Any], dict[int, Any]]:
    pieces: list[_Piece] = []
    specs: dict[int, dict[int, Any]] = {2: {}, 3: {}}
    for field, value in _fields(raw, where):
        if field not in (1, 2, 3):
            continue
        if not isinstance(value, bytes):
            raise ValueError(f"{where}: field {field} is no message")
        content = dict(_fields(value, where))
        if field != 1:
            specs[field] = content
            continue
        if len(pieces) == MAX_TOKENS:
            raise ValueError(f"{where} has more than {MAX_TOKENS:,} pieces")
        pieces.append(_piece(content, f"{where}: piece {len(pieces)}"))
    if not pieces:
        raise ValueError(f"{where} is not a sentencepiece model: it has no pieces")
    for spec, kinds in ((specs[2], {3: int, 35: int, 41: int, 42: int}),
                        (specs[3], {2: bytes, 3: int, 4: int, 5: int})):  # fmt: skip
        for field, kind in kinds.items():
            if not isinstance(spec.get(field, kind()), kind):
                raise ValueError(f"{where}: setting {field} is malformed")
    return pieces, specs[2], specs[3]


def _piece(content: dict[int, Any], where: str) -> _Piece:
    text, score, kind = content.get(1, b""), content.get(2, 0.0), content.get(3, NORMAL)
    try:
        piece = _Piece(text.decode(), float(score), kind)
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"{where} is malformed") from None
    if not piece.text or not math.isfinite(piece.score) or kind not in range(1, 7):
        raise ValueError(f"{where} ({text[:40]!r}, score {score}, type {kind}) is malformed")
    return piece


def _fields(raw: bytes, where: str) -> Iterator[tuple[int, Any]]:
    """(number, value) of a message's fields: int, float (of 4 bytes), or bytes."""
    at = 0
    while at < len(raw):
        key, at = _varint(raw, at, where)
        wire, value = key & 7, None  # type: int, Any
        if wire == 0:
            value, at = _varint(raw, at, where)
        elif wire in (1, 2, 5):
            size = 8 if wire == 1 else 4
            if wire == 2:
                size, at = _varint(raw, at, where)
            if size > len(raw) - at:
                raise ValueError(f"{where} is cut short or no sentencepiece model")
            value, at = raw[at : at + size], at + size
            if wire == 5:
                (value,) = struct.unpack("<f", value)
        else:
            raise ValueError(f"{where} is not a sentencepiece model")
        yield key >> 3, value


def _varint(raw: bytes, at: int, where: str) -> tuple[int, int]:
    value = 0
    for i, byte in enumerate(raw[at : at + 10]):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value, at + i + 1
    raise ValueError(f"{where} is cut short or no sentencepiece model")
