"""The vocabulary inside a GGUF file, to and from the one JSON form.

    tokenizer.ggml.model        "gpt2" (byte-level BPE) or "llama" (sentencepiece BPE)
    tokenizer.ggml.pre          of gpt2: the name of the way text is cut into words
    tokenizer.ggml.tokens       every piece, in the order of ids
    tokenizer.ggml.token_type   1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte
    tokenizer.ggml.merges       of gpt2: "left right"
    tokenizer.ggml.scores       of llama: the higher, the earlier a piece is made
    tokenizer.ggml.{bos,eos,eot,eom}_token_id, add_bos_token, add_space_prefix
    tokenizer.chat_template

Expressions of `pre` are facts of llama.cpp's `llama-vocab.cpp`, checked against it by running it.
Deliberately absent: its other vocabularies (WordPiece, Unigram, RWKV, PLaMo).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from bitjax.interop.tokenizers.documents import (
    GPT2_WORDS,
    LLAMA3_WORDS,
    Added,
    bpe_model,
    byte_level,
    end_tokens,
    merges_by_score,
    require_short,
    sentencepiece,
    tokenizer_of,
    with_bytes_as_text,
)
from bitjax.text import Specials, TextTokenizer
from bitjax.text import document as documents
from bitjax.text.document import MAX_TOKENS, SPACE
from bitjax.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_QWEN2_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
_FALCON_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|`]+"
# name -> expressions, whether whole words that are pieces stay whole, whether bos is the default
WORDS: dict[str, tuple[tuple[str, ...], bool, bool]] = {
    "gpt-2": ((GPT2_WORDS,), False, False),
    "llama-bpe": ((LLAMA3_WORDS,), True, True),
    "glm4": ((LLAMA3_WORDS,), True, False),
    "smollm": ((r"\p{N}", GPT2_WORDS), False, False),
    "qwen2": ((_QWEN2_WORDS,), False, False),
    "dbrx": ((LLAMA3_WORDS,), False, False),
    "falcon": ((_FALCON_PUNCTUATION, GPT2_WORDS, "[0-9][0-9][0-9]"), False, False),
    "default": (
        (_FALCON_PUNCTUATION.replace("`", ""), GPT2_WORDS, r"\p{N}+", "[0-9][0-9][0-9]"),
        False,
        False,
    ),
}
_ALIASES = {
    "gpt-2": (
        "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4", "gigachat",
        "mellum", "a.x-4.0", "modern-bert",
    ),
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "lfm2", "midm-2.0"),
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    "qwen2": ("deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"),
    "dbrx": ("smaug-bpe", "chatglm-bpe"),
}  # fmt: skip
PRE_NAMES = {name: name for name in WORDS} | {
    alias: name for name, aliases in _ALIASES.items() for alias in aliases
}


def tokenizer_from_gguf(metadata: Mapping[str, Any], where: str = "GGUF") -> TextTokenizer:
    """The tokenizer that a GGUF file's metadata describes.

    Args:
        metadata: key -> value; strings as str or bytes, arrays as sequences.
        where: names the file in messages.

    Raises:
        ValueError: none there, one of a kind not supported, or a malformed one.
    """
    entries = _Entries(metadata, where)
    kind = entries.text("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ValueError(
            f"{where}: tokenizer.ggml.model is {kind!r:.40}; supported are 'gpt2' and 'llama'"
        )
    pieces = entries.strings("tokenizer.ggml.tokens")
    if not 0 < len(pieces) <= MAX_TOKENS:
        raise ValueError(f"{where}: tokenizer.ggml.tokens has {len(pieces):,} entries")
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    if len(vocabulary) != len(pieces):
        i, piece = next((i, p) for i, p in enumerate(pieces) if vocabulary[p] != i)
        raise ValueError(
            f"{where}: tokenizer.ggml.tokens {i} and {vocabulary[piece]} are both {piece!r:.40}"
        )
    types = entries.numbers("tokenizer.ggml.token_type", len(pieces))
    if types is None:
        types = np.full(len(pieces), NORMAL)
    added = [
        Added(i, pieces[i], control=bool(types[i] != USER_DEFINED))
        for i in np.flatnonzero(np.isin(types, (UNKNOWN, CONTROL, USER_DEFINED))).tolist()
    ]
    pre, bos_default = None, kind == "llama"
    if kind == "gpt2":
        # Files of before there was a name: llama.cpp takes the default, and warns.
        pre = entries.text("tokenizer.ggml.pre", "default")
        if pre not in PRE_NAMES:
            raise ValueError(
                f"{where}: tokenizer.ggml.pre is {pre!r:.40}, a way to cut text into words that is "
                f"not known here; known are {', '.join(sorted(PRE_NAMES))}"
            )
        words, whole_words, bos_default = WORDS[PRE_NAMES[pre]]
        merges = _merges(where, entries.strings("tokenizer.ggml.merges"))
        document = byte_level(vocabulary, merges, added, words, whole_words)
    else:
        document = _sentencepiece(entries, pieces, types, added)
    control = {a.content: a.token for a in added if a.control}
    ends = [entries.token(f"tokenizer.ggml.{name}_token_id", len(pieces))
            for name in ("eos", "eot", "eom")]  # fmt: skip
    bos = entries.token("tokenizer.ggml.bos_token_id", len(pieces))
    if kind == "llama":  # sentencepiece's own defaults
        bos = control.get("<s>") if bos is None else bos
        ends[0] = control.get("</s>") if ends[0] is None else ends[0]
    special = Specials(
        bos=bos,
        stop=end_tokens([end for end in ends if end is not None], control),
        add_bos=entries.flag("tokenizer.ggml.add_bos_token", bos_default) and bos is not None,
        chat_template=entries.text("tokenizer.chat_template", "") or None,
        pre=pre,
    )
    return tokenizer_of(where, document, special)


class _Entries:
    """Metadata by key and type."""

    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        self._metadata = metadata
        self.where = where

    def text(self, key: str, default: str | None = None) -> str:
        value = self._metadata.get(key, default)
        if value is None:
            raise ValueError(f"{self.where}: {key} is missing")
        return self._str(key, value)

    def strings(self, key: str) -> list[str]:
        value = self._metadata.get(key)
        if value is None or isinstance(value, str | bytes) or not isinstance(value, Iterable):
            raise ValueError(f"{self.where}: {key} is missing or no list of strings")
        return [self._str(f"{key}[{i}]", item) for i, item in enumerate(value)]

    def numbers(self, key: str, count: int) -> np.ndarray | None:
        value = self._metadata.get(key)
        if value is None:
            return None
        try:
            array = np.asarray(value)
            if array.shape == (count,) and array.dtype.kind in "iuf" and np.isfinite(array).all():
                return array
        except (ValueError, TypeError):
            pass
        raise ValueError(f"{self.where}: {key} is not a list of {count:,} finite numbers")

    def token(self, key: str, count: int) -> int | None:
        value = self._metadata.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or not (
            0 <= value < count
        ):  # fmt: skip
            raise ValueError(f"{self.where}: {key} is {value!r:.40}, not a token of 0..{count - 1}")
        return int(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._metadata.get(key, default)
        if not isinstance(value, bool | np.bool_):
            raise ValueError(f"{self.where}: {key} is {value!r:.40}, not true or false")
        return bool(value)

    def _str(self, key: str, value: Any) -> str:
        try:
            text = value.decode() if isinstance(value, bytes) else value
        except UnicodeDecodeError:
            raise ValueError(f"{self.where}: {key} is not UTF-8") from None
        if not isinstance(text, str):
            raise ValueError(f"{self.where}: {key} is {text!r:.40}, not a string")
        return text


def _merges(where: str, lines: list[str]) -> list[tuple[str, str]]:
    """Pairs out of "left right"; a space in the left piece is never its first character."""
    pairs = []
    for i, line in enumerate(lines):
        at = line.find(" ", 1)
        if at < 0 or at + 1 == len(line):
            raise ValueError(f"{where}: tokenizer.ggml.merges[{i}] is {line!r:.40}, not two pieces")
        pairs.append((line[:at], line[at + 1 :]))
    return pairs


def _sentencepiece(
    entries: _Entries, pieces: list[str], types: np.ndarray, added: list[Added]
) -> dict[str, Any]:
    scores = entries.numbers("tokenizer.ggml.scores", len(pieces))
    if scores is None:
        raise ValueError(f"{entries.where}: tokenizer.ggml.scores is missing")
    require_short(entries.where, pieces)
    merged = {pieces[i]: float(scores[i]) for i in np.flatnonzero(types == NORMAL).tolist()}
    unknown = [pieces[i] for i in np.flatnonzero(types == UNKNOWN).tolist()]
    model = bpe_model(
        {piece: i for i, piece in enumerate(pieces)},
        merges_by_score(merged),
        unknown[0] if unknown else None,
        byte_fallback=bool((types == BYTE).any()),
    )
    prefix = entries.flag("tokenizer.ggml.add_space_prefix", True)
    return sentencepiece(model, added, prefix)


def gguf_metadata(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a GGUF file says of a tokenizer: str, int, bool, lists of str, NumPy arrays.

    Raises:
        ValueError: GGUF cannot express it; saying why.
    """
    text = with_bytes_as_text(tokenizer)
    where, document, special = text.where, text.document, text.special
    pieces = _pieces(where, document)
    types = np.full(len(pieces), NORMAL, np.int32)
    for entry in documents.added_tokens(where, document):
        types[entry["id"]] = CONTROL if entry.get("special") else USER_DEFINED
    about: dict[str, Any]
    if documents.decoded(where, document).byte_level:
        about = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": _pre_of(text),
            "tokenizer.ggml.merges": [" ".join(pair) for pair in _pairs(document)],
        }
        if documents.steps(where, document, "normalizer"):
            raise ValueError(f"{where}: GGUF's gpt2 vocabularies have no normalizer; this one has")
    else:
        about = _llama_entries(where, document, pieces, types)
    about |= {"tokenizer.ggml.tokens": pieces, "tokenizer.ggml.token_type": types}
    if special.bos is not None:
        about["tokenizer.ggml.bos_token_id"] = special.bos
    if special.stop:
        about["tokenizer.ggml.eos_token_id"] = special.stop[0]
    about["tokenizer.ggml.add_bos_token"] = special.add_bos
    if special.chat_template:
        about["tokenizer.chat_template"] = special.chat_template
    return about


def _pieces(where: str, document: dict[str, Any]) -> list[str]:
    by_id = {token: piece for piece, token in documents.pieces(where, document)}
    by_id |= {e["id"]: e["content"] for e in documents.added_tokens(where, document)}
    return [by_id[i] for i in range(len(by_id))]


def _pairs(document: dict[str, Any]) -> list[list[str]]:
    """The merges, of which older files have each in one string."""
    return [m.split(" ") if isinstance(m, str) else m for m in document["model"]["merges"]]


def _llama_entries(
    where: str, document: dict[str, Any], pieces: list[str], types: np.ndarray
) -> dict[str, Any]:
    model = document["model"]
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"{where}: a Unigram vocabulary has no place in GGUF's llama kind")
    prefix = any(
        step["type"] == "Prepend" for step in documents.steps(where, document, "normalizer")
    )
    for step in documents.steps(where, document, "normalizer"):
        spaces = step["type"] == "Replace" and step.get("pattern") == {"String": " "}
        if not spaces and (step["type"], step.get("prepend")) != ("Prepend", SPACE):
            raise ValueError(f"{where}: GGUF's llama kind has no normalizer {step['type']}")
    for step in documents.steps(where, document, "pre_tokenizer"):
        if step["type"] != "Metaspace" or step.get("split", True):
            raise ValueError(f"{where}: GGUF's llama kind has no pre_tokenizer {step['type']}")
        prefix = step.get("prepend_scheme", "always") != "never"
    ids = {piece: i for i, piece in enumerate(pieces)}
    scores = np.full(len(pieces), -1.0e6, np.float32)  # pieces that nothing makes
    made = dict.fromkeys(left + right for left, right in _pairs(document))
    for rank, piece in enumerate(made):
        scores[ids[piece]] = -rank
    for byte in range(256):
        if (token := ids.get(f"<0x{byte:02X}>")) is not None:
            types[token] = BYTE
    if model.get("unk_token") in ids:
        types[ids[model["unk_token"]]] = UNKNOWN
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


# Where the ways to cut text differ: cases, contractions, runs of digits, punctuation beside
# backticks, ends of lines, other scripts.
_PROBE = (
    "I'll we'VE 12 1234567 a1b22 x=y+z <p> `a` ~^| (b),c!? \t\t d\n\n e \r\n\r\n  f   g ١٢٣٤ ½²"
    " Ünïcödé ภาษาไทย 漢字かな한국어 naïve… “q” don't _u_ e\u0301 \u200b\u00a0z !\n\n ''s"
)


def _pre_of(tokenizer: TextTokenizer) -> str:
    """GGUF's name of the way a tokenizer cuts text: the one that cuts a probe alike."""
    whole = bool(tokenizer.document["model"].get("ignore_merges"))
    names = [tokenizer.special.pre] if tokenizer.special.pre in PRE_NAMES else []
    cut = tokenizer.words(_PROBE)
    for name in itertools.chain(names, WORDS):
        words, whole_words, _ = WORDS[PRE_NAMES[name]]
        if whole_words == whole and _words(words) == cut:
            return name
    raise ValueError(
        f"{tokenizer.where} cuts text into words in a way that has no name in GGUF; known are "
        f"{', '.join(sorted(WORDS))}"
    )


def _words(expressions: Iterable[str]) -> list[str]:
    document = byte_level({"a": 0}, [], [], list(expressions), whole_words=False)
    return tokenizer_of("GGUF", document, Specials()).words(_PROBE)
