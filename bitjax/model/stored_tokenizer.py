"""The tokenizer of a model file.

Metadata has "tokenizer": "bytes", or else its settings, `bitjax.text.Specials` among them,

    {"kind": "text", "vocab_size": n, "bos": id or null, "stop": [ids], "add_bos": true or false,
     "chat_template": text or null, "pre": text or null}

and a tensor `tokenizer.json`, uint8, holds the JSON of the `tokenizers` library in UTF-8. It stays
in the memory-mapped file until there is text to encode.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from bitjax.text import Specials, TextTokenizer
from bitjax.text.document import MAX_BYTES
from bitjax.tokenizer import BYTES, ByteTokenizer, Tokenizer

TENSOR = "tokenizer.json"


def stored_tokenizer(tokenizer: Tokenizer) -> tuple[Any, np.ndarray | None]:
    """What metadata says of a tokenizer, and the tensor, if there is to be one.

    Raises:
        ValueError: a tokenizer that files cannot hold.
    """
    if isinstance(tokenizer, ByteTokenizer):
        return BYTES.name, None
    if not isinstance(tokenizer, TextTokenizer):
        raise ValueError(f"a model file cannot hold the tokenizer {tokenizer.name!r}")
    about = {"kind": tokenizer.name, "vocab_size": tokenizer.vocab_size}
    raw = np.frombuffer(tokenizer.json.encode(), np.uint8)
    return about | dataclasses.asdict(tokenizer.special), raw


def read_tokenizer(path: Path, about: Any, raw: np.ndarray | None, vocab_size: int) -> Tokenizer:
    """The tokenizer of a file; its JSON is checked when it is needed.

    Args:
        path: of the file, for messages.
        about: what metadata says of it.
        raw: the tensor.
        vocab_size: of the model.

    Raises:
        ValueError: malformed settings, or more tokens than the model has.
    """
    if about == BYTES.name:
        return BYTES
    if not isinstance(about, dict) or about.get("kind") != TextTokenizer.name:
        raise ValueError(
            f"{path}: unknown tokenizer {about!r:.60}; this version has 'bytes' and 'text'"
        )
    if raw is None or raw.dtype != np.uint8 or raw.ndim != 1 or raw.size > MAX_BYTES:
        raise ValueError(f"{path}: {TENSOR} is missing or not up to {MAX_BYTES:,} bytes")
    size, rest = about.get("vocab_size"), dict(about)
    for key in ("kind", "vocab_size"):
        rest.pop(key, None)
    if type(size) is not int or not 0 < size <= vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has {size!r:.40} tokens; the model has {vocab_size}"
        )
    if isinstance(rest.get("stop"), list):
        rest["stop"] = tuple(rest["stop"])
    try:
        special = Specials(**rest)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: the tokenizer's settings are malformed: {error}") from None
    return TextTokenizer(raw.tobytes, special, f"{path}: {TENSOR}", size)
