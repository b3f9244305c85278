"""What a tokenizer's JSON may hold, checked before any of it is used.

The form is that of the `tokenizers` library (`tokenizer.json`): a normalizer, a pre-tokenizer that
cuts text into words, a model (BPE or Unigram) that cuts words into pieces, a decoder, and added
tokens, which are found in text before all of this.

Such files come from anywhere. Bounded here: sizes, the number of steps, and how much longer a text
can become on its way (a chain of sixteen replacements of one letter by sixteen would make 2^64 of
it). The library checks the rest; see `bitjax.text.tokenizer` for how its panics are met.

Deliberately absent: WordPiece and word-level models, which no generative model here has.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

MAX_BYTES = 64 << 20  # of a JSON; those of 128,256 tokens take 9 to 17 MB
MAX_TOKENS = 1 << 20
MAX_PIECE = 4096  # characters of one token
MAX_STEPS = 16  # of a normalizer, a pre-tokenizer or a decoder
MAX_PATTERN = 4096  # characters of a regular expression
MAX_GROWTH = 256  # of a text, by all replacements together
SPACE = "\u2581"  # sentencepiece's visible space

_STEPS = {
    "normalizer": (
        "Prepend", "Replace", "Precompiled", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip",
        "StripAccents", "Nmt",
    ),
    "pre_tokenizer": (
        "ByteLevel", "Split", "Digits", "Metaspace", "Punctuation", "Whitespace",
        "WhitespaceSplit",
    ),
    "decoder": ("ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"),
}  # fmt: skip
_PARTS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}


def parse(where: str, raw: str | bytes) -> dict[str, Any]:
    """The checked document of a JSON text.

    Raises:
        ValueError: not such a document; `where` and the entry are named.
    """
    if len(raw) > MAX_BYTES:
        raise ValueError(f"{where} has {len(raw):,} bytes; a tokenizer may have {MAX_BYTES:,}")
    try:
        document = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not a tokenizer's JSON: {error}") from None
    check(where, document)
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; a key given twice may mean one thing here and another to the library."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("an object has a key twice")
    return made


def check(where: str, document: Any) -> None:
    """Refuse a document that is malformed, too large or of a kind not supported.

    Raises:
        ValueError: naming `where` and the entry.
    """
    if not isinstance(document, dict) or not isinstance(document.get("model"), dict):
        raise ValueError(f"{where} is not a tokenizer: it has no model")
    vocabulary, added = pieces(where, document), added_tokens(where, document)
    if len(vocabulary) + len(added) > 2 * MAX_TOKENS:
        raise ValueError(f"{where} has more than {MAX_TOKENS:,} tokens")
    ids: dict[int, str] = {}
    for piece, token in [*vocabulary, *((entry["content"], entry["id"]) for entry in added)]:
        if not isinstance(piece, str) or not 0 < len(piece) <= MAX_PIECE:
            raise ValueError(f"{where}: token {token!r:.40} is {piece!r:.40}, not a short string")
        if type(token) is not int or not 0 <= token < MAX_TOKENS:
            raise ValueError(f"{where}: {piece!r:.40} has the id {token!r:.40}")
        if ids.setdefault(token, piece) != piece:
            raise ValueError(f"{where}: id {token} is both {ids[token]!r:.40} and {piece!r:.40}")
    if not ids or len(ids) != max(ids) + 1:
        missing = next((i for i in range(len(ids)) if i not in ids), 0)
        raise ValueError(f"{where}: there is no token {missing}; ids must be 0 to n-1")
    for stage in _STEPS:
        _check_steps(where, stage, steps(where, document, stage))
    byte_levels = [s for s in steps(where, document, "pre_tokenizer") if s["type"] == "ByteLevel"]
    if len(byte_levels) > 1:
        raise ValueError(f"{where}: the pre_tokenizer maps bytes more than once")
    decoded(where, document)
    if document["model"].get("dropout"):
        raise ValueError(f"{where}: a model with dropout cuts text at random")


def pieces(where: str, document: dict[str, Any]) -> list[tuple[Any, Any]]:
    """(piece, id) of every entry of the model's vocabulary.

    Raises:
        ValueError: not a BPE or Unigram model.
    """
    model = document["model"]
    # Files of before 2023 leave the type out.
    kind = model.get("type", "BPE" if "merges" in model else "none")
    vocabulary = model.get("vocab")
    if kind == "BPE" and isinstance(vocabulary, dict):
        return list(vocabulary.items())
    if kind == "Unigram" and isinstance(vocabulary, list):
        if not all(isinstance(entry, list) and len(entry) == 2 for entry in vocabulary):
            raise ValueError(f"{where}: the vocabulary is not a list of pieces with scores")
        return [(entry[0], i) for i, entry in enumerate(vocabulary)]
    raise ValueError(f"{where}: the model is {kind!r:.40}; supported are BPE and Unigram")


def added_tokens(where: str, document: dict[str, Any]) -> list[dict[str, Any]]:
    """The added tokens: `id`, `content`, `special` and how they are found in text.

    Raises:
        ValueError: one of them is malformed, or there are two of one content.
    """
    added = document.get("added_tokens") or []
    wanted = {"id", "content"}
    if not isinstance(added, list) or not all(
        isinstance(entry, dict) and wanted <= entry.keys() for entry in added
    ):
        raise ValueError(f"{where}: added_tokens is not a list of tokens")
    if len({str(entry["content"]) for entry in added}) != len(added):
        raise ValueError(f"{where}: added_tokens holds a token twice")
    return added


def steps(where: str, document: dict[str, Any], stage: str) -> list[dict[str, Any]]:
    """The steps of a stage, sequences taken apart.

    Raises:
        ValueError: malformed, nested deeply or too many.
    """

    def walk(step: Any, depth: int) -> Iterator[dict[str, Any]]:
        if step is None:
            return
        if not isinstance(step, dict) or not isinstance(step.get("type"), str) or depth > 4:
            raise ValueError(f"{where}: the {stage} is malformed")
        if step["type"] != "Sequence":
            yield step
            return
        parts = step.get(_PARTS[stage])
        if not isinstance(parts, list) or len(parts) > MAX_STEPS:
            raise ValueError(f"{where}: the {stage} is not a sequence of up to {MAX_STEPS} steps")
        for part in parts:
            yield from walk(part, depth + 1)

    found = list(walk(document.get(stage), 0))
    if len(found) > MAX_STEPS:
        raise ValueError(f"{where}: the {stage} has {len(found)} steps; up to {MAX_STEPS} may be")
    return found


def size(where: str, document: dict[str, Any]) -> int:
    """Number of tokens."""
    added = [entry["id"] for entry in added_tokens(where, document)]
    return 1 + max([token for _, token in pieces(where, document)] + added)


@dataclasses.dataclass(frozen=True)
class Decoded:
    """How pieces become text.

    Attributes:
        byte_level: each character of a piece stands for a byte.
        strips: a text loses the space that its beginning was given.
    """

    byte_level: bool
    strips: bool


def decoded(where: str, document: dict[str, Any]) -> Decoded:
    """What the decoder does.

    Raises:
        ValueError: a decoder of another kind.
    """
    found = steps(where, document, "decoder")
    kinds = [step["type"] for step in found]
    if kinds == ["ByteLevel"]:
        return Decoded(byte_level=True, strips=False)
    if "ByteLevel" in kinds or not {"Replace", "Metaspace"} & set(kinds):
        raise ValueError(f"{where}: the decoder {' + '.join(kinds) or 'none'} is not supported")
    for step in found:
        pattern, content = step.get("pattern"), step.get("content")
        if step["type"] == "Replace" and (pattern, content) != ({"String": SPACE}, " "):
            raise ValueError(f"{where}: the decoder replaces {pattern} by {content!r:.40}")
        if step["type"] == "Metaspace" and step.get("replacement") != SPACE:
            raise ValueError(f"{where}: the decoder's space is not U+2581")
    return Decoded(byte_level=False, strips=any(map(_strips, found)))


def _strips(step: dict[str, Any]) -> bool:
    if step["type"] == "Metaspace":
        scheme = step.get("prepend_scheme")
        return scheme != "never" if scheme else bool(step.get("add_prefix_space", True))
    return step["type"] == "Strip" and bool(step.get("start"))


def _check_steps(where: str, stage: str, found: list[dict[str, Any]]) -> None:
    growth = 1
    for step in found:
        kind = step["type"]
        if kind not in _STEPS[stage]:
            raise ValueError(
                f"{where}: the {stage} {kind!r:.40} is not supported; "
                f"supported are {', '.join(_STEPS[stage])}"
            )
        pattern = step.get("pattern")
        if isinstance(pattern, dict):
            pattern = next(iter(pattern.values()), None)
        if pattern is not None and not (isinstance(pattern, str) and len(pattern) <= MAX_PATTERN):
            raise ValueError(f"{where}: a pattern of the {stage} is no string, or too long")
        if kind == "Precompiled":
            growth *= _charsmap_growth(where, step.get("precompiled_charsmap"))
        elif kind in ("Prepend", "Replace") and stage == "normalizer":
            text = step.get("prepend" if kind == "Prepend" else "content")
            if not isinstance(text, str):
                raise ValueError(f"{where}: a {kind} without its text")
            growth *= max(1, len(text))
    if growth > MAX_GROWTH:
        raise ValueError(f"{where}: the {stage} may make a text {growth} times as long")


def _charsmap_growth(where: str, encoded: Any) -> int:
    """Characters of the longest replacement in a sentencepiece character map.

    It is a trie (its size in bytes as uint32 first), then replacements, each ended by a zero byte.
    """
    try:
        raw = base64.b64decode(encoded, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise ValueError(f"{where}: the character map is not base64") from None
    trie = int.from_bytes(raw[:4], "little")
    if len(raw) < 4 or trie % 4 or 4 + trie > len(raw):
        raise ValueError(f"{where}: the character map is cut short")
    replacements = raw[4 + trie :].split(b"\0")
    return max(1, *(len(text.decode("utf-8", "replace")) for text in replacements))
