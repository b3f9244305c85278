"""tiktoken files: a line for each piece, its bytes in base64 and its rank, which is its id.

tiktoken merges, of all neighbours that together are a piece, those with the lowest rank. A merge
list does the same when it holds every cut of every piece, by rank. A word that is a piece stays
whole. Expressions and special tokens are not in the file; they are known for those below.

    pieces   of
    128,000  Llama 3: 256 special tokens follow
     50,256  GPT-2: <|endoftext|> follows
"""

from __future__ import annotations

import base64
import binascii
import re

from bitjax.interop.tokenizers.documents import (
    GPT2_WORDS,
    LLAMA3_WORDS,
    Added,
    byte_level,
    end_tokens,
    merges_by_score,
    require_short,
    tokenizer_of,
)
from bitjax.text import Specials, TextTokenizer
from bitjax.text.document import MAX_TOKENS
from bitjax.text.tokenizer import CHARACTER_OF

_LLAMA3_SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>", "<|reserved_special_token_2|>", "<|reserved_special_token_3|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(5, 251)),
]  # fmt: skip
_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) ([0-9]{1,7})")


def looks_like_tiktoken(raw: bytes) -> bool:
    """Whether a file begins as tiktoken's do; a sentencepiece model never does."""
    return _LINE.fullmatch(raw[:4096].partition(b"\n")[0].rstrip(b"\r")) is not None


def tokenizer_from_tiktoken(raw: bytes, where: str = "tiktoken file") -> TextTokenizer:
    """The tokenizer of a tiktoken file.

    Raises:
        ValueError: a malformed line, naming it, or a number of pieces that is not known.
    """
    pieces = _read_pieces(raw, where)
    if len(pieces) == 128_000:
        words, names, pre = LLAMA3_WORDS, _LLAMA3_SPECIAL, "llama-bpe"
    elif len(pieces) == 50_256:
        words, names, pre = GPT2_WORDS, ["<|endoftext|>"], "gpt-2"
    else:
        raise ValueError(
            f"{where} has {len(pieces):,} pieces; known are Llama 3's 128,000 and GPT-2's 50,256"
        )
    added = [Added(len(pieces) + i, name, control=True) for i, name in enumerate(names)]
    control = {a.content: a.token for a in added}
    bos = control.get("<|begin_of_text|>")
    special = Specials(bos, end_tokens([], control), add_bos=bos is not None, pre=pre)
    if bos is not None:  # a base model's own end goes before that of turns
        special = Specials(
            bos, (control["<|end_of_text|>"], control["<|eot_id|>"]), add_bos=True, pre=pre
        )
    merges = merges_by_score({piece: -rank for rank, piece in enumerate(pieces)})
    vocabulary = {piece: rank for rank, piece in enumerate(pieces)}
    document = byte_level(vocabulary, merges, added, [words], whole_words=True)
    return tokenizer_of(where, document, special)


def _read_pieces(raw: bytes, where: str) -> list[str]:
    """Pieces by rank, in characters that stand for bytes."""
    lines = [line for line in raw.splitlines() if line]
    if len(lines) > MAX_TOKENS:
        raise ValueError(f"{where} has {len(lines):,} lines")
    ranked: dict[int, str] = {}
    for i, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        try:
            piece = base64.b64decode(match[1], validate=True) if match else b""
        except binascii.Error:
            piece = b""
        if not match or not piece:
            raise ValueError(f"{where}, line {i}: {line[:40]!r} is not base64 and a rank")
        if int(match[2]) in ranked:
            raise ValueError(f"{where}, line {i}: rank {int(match[2])} is there already")
        ranked[int(match[2])] = "".join(CHARACTER_OF[byte] for byte in piece)
    if sorted(ranked) != list(range(len(ranked))):
        raise ValueError(f"{where}: its ranks are not 0 to {len(ranked) - 1}")
    pieces = [ranked[rank] for rank in range(len(ranked))]
    if len(set(pieces)) != len(pieces):
        raise ValueError(f"{where} holds a piece twice")
    require_short(where, pieces)
    return pieces
