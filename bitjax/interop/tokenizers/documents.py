"""Documents of the `tokenizers` library (`bitjax.text.document`), out of vocabularies."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bitjax.text import Specials, TextTokenizer
from bitjax.text.document import SPACE
from bitjax.text.tokenizer import CHARACTER_OF
from bitjax.tokenizer import ByteTokenizer, Tokenizer

# Names of tokens that end an answer or a document. Files often name one of them where a model uses
# two: the end of a turn, and the end of a text.
END_NAMES = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>",
    "<|eom_id|>", "<EOT>", "[EOT]", "<end_of_utterance>", "</s>",
)  # fmt: skip

MAX_CUTS = 1 << 28  # characters copied; Llama 2's 32,000 pieces take 1.5 million

# How GPT-2 and Llama 3 cut text into words; their authors' published expressions.
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class Added:
    """A token found in text before anything else.

    Attributes:
        token: its id.
        content: its text.
        control: it is no text; else it is, and found in any text.
    """

    token: int
    content: str
    control: bool


def byte_level(
    vocabulary: Mapping[str, int],
    merges: Iterable[Sequence[str]],
    added: Iterable[Added],
    words: Sequence[str],
    whole_words: bool,
) -> dict[str, Any]:
    """A document of byte-level BPE, as GPT-2 has it.

    Args:
        vocabulary: piece, in characters that stand for bytes -> id.
        merges: pairs of pieces, the first to be merged first.
        added: tokens.
        words: expressions that cut the text, one after the other; matches and gaps are words.
        whole_words: a word that is a piece is that piece, whatever its merges.
    """
    steps: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in words
    ]
    steps.append(
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    )
    model = _bpe(vocabulary, merges) | {"ignore_merges": whole_words}
    decoder = {
        "type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True,
    }  # fmt: skip
    return _document(added, None, {"type": "Sequence", "pretokenizers": steps}, decoder, model)


def sentencepiece(
    model: dict[str, Any],
    added: Iterable[Added],
    prefix: bool,
    normalizers: Sequence[dict[str, Any]] = (),
    once: bool = False,
) -> dict[str, Any]:
    """A document of a sentencepiece model.

    Args:
        model: see `bpe_model` and `unigram_model`.
        added: tokens.
        prefix: whether texts begin with a space that is not theirs.
        normalizers: steps before spaces become visible.
        once: only a text's beginning gets that space; else text behind an added token does too, as
            in Llama 2 and llama.cpp.
    """
    steps, cut = list(normalizers), None
    if prefix and once:
        cut = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
    elif prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return _document(
        added, {"type": "Sequence", "normalizers": steps}, cut,
        {"type": "Sequence", "decoders": decoders}, model,
    )  # fmt: skip


def bpe_model(
    vocabulary: Mapping[str, int], merges: Iterable[Sequence[str]], unknown: str | None,
    byte_fallback: bool,
) -> dict[str, Any]:  # fmt: skip
    """A BPE model over characters, those it lacks cut into bytes if `byte_fallback`."""
    settings = {"unk_token": unknown, "fuse_unk": True, "byte_fallback": byte_fallback}
    return _bpe(vocabulary, merges) | settings


def unigram_model(
    pieces: Iterable[tuple[str, float]], unknown: int | None, byte_fallback: bool
) -> dict[str, Any]:
    """A Unigram model: pieces with log probabilities, in the order of ids."""
    return {
        "type": "Unigram", "unk_id": unknown, "vocab": [list(entry) for entry in pieces],
        "byte_fallback": byte_fallback,
    }  # fmt: skip


def tokenizer_of(where: str, document: dict[str, Any], special: Specials) -> TextTokenizer:
    """The tokenizer of a document, checked at once.

    Raises:
        ValueError: it cannot be used; naming `where`.
    """
    text = json.dumps(document, ensure_ascii=False)
    return TextTokenizer(text, special, where).check()


def with_bytes_as_text(tokenizer: Tokenizer) -> TextTokenizer:
    """The same tokenizer in the one form: byte tokens become byte-level BPE without merges.

    Raises:
        ValueError: a tokenizer of an unknown kind.
    """
    if isinstance(tokenizer, TextTokenizer):
        return tokenizer
    if not isinstance(tokenizer, ByteTokenizer):
        raise ValueError(f"tokenizer {tokenizer.name!r} has no form for other engines")
    vocabulary = {character: byte for byte, character in CHARACTER_OF.items()}
    document = byte_level(vocabulary, [], [], [GPT2_WORDS], whole_words=False)
    return tokenizer_of("bytes", document, Specials(pre="gpt-2"))


def end_tokens(first: Iterable[int], control: Mapping[str, int]) -> tuple[int, ...]:
    """Ids that end a text: those given, then those of control tokens known to."""
    known = (control[name] for name in END_NAMES if name in control)
    return tuple(dict.fromkeys([*first, *known]))


def merges_by_score(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Merges that do what sentencepiece's BPE does with scores: the best piece is made first.

    Every cut of a piece into two others is a merge; those of one piece stand together.
    """
    found = []
    for piece, score in scores.items():
        cuts = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        found += [(score, cut) for cut in cuts if cut[0] in scores and cut[1] in scores]
    found.sort(key=lambda merge: -merge[0])  # stable: within a piece, the shortest first part first
    return [cut for _, cut in found]


def require_short(where: str, pieces: Iterable[str]) -> None:
    """Refuse pieces whose cuts would take long to list, which takes the square of their lengths.

    Raises:
        ValueError: naming `where`.
    """
    work = sum(len(piece) ** 2 for piece in pieces)
    if work > MAX_CUTS:
        raise ValueError(f"{where}: its tokens are too long to be those of a language model")


def _bpe(vocabulary: Mapping[str, int], merges: Iterable[Sequence[str]]) -> dict[str, Any]:
    return {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
        "ignore_merges": False, "vocab": dict(vocabulary), "merges": [list(m) for m in merges],
    }  # fmt: skip


def _document(
    added: Iterable[Added], normalizer: Any, pre_tokenizer: Any, decoder: Any, model: Any
) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": a.token, "content": a.content, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False, "special": a.control}
            for a in sorted(added, key=lambda a: a.token)
        ],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }  # fmt: skip
