"""A corpus: a folder of token files, memory-mapped.

    index.json            see below
    tokenizer.json        of the `tokenizers` library; missing where tokens are bytes
    train-00000.tokens    ids one after the other, little-endian; all shards but a part's last have
    ...                   `shard_tokens` of them
    train.starts          int64, little-endian: where each document begins, and the number of tokens
    train-00000.counted   uint8, for each token of the shard whether it is learned (1) or only read
    ...                   (0); in corpora of conversations and of pairs alone
    valid-00000.tokens    the held-out part, in the same form
    valid.starts

Documents 2i and 2i + 1 of a corpus of pairs are the chosen and the rejected conversation of one.

index.json: {"format": 1, or 2 with .counted files, "kind": "text" | "chat" | "pairs",
"dtype": "uint8" | "uint16" | "uint32", "vocab_size": V, "shard_tokens": n, "tokenizer": "bytes" or
its settings, "tokenizer_sha256": hex or null, "config": {...}, "empty": documents left out,
"parts": {"train": PART, "valid": PART}} with PART = {"documents": n, "tokens": n, "bytes": UTF-8
bytes of the texts, "starts_sha256": hex, "shards": [{"tokens": n, "sha256": hex, and with .counted
files "counted_sha256": hex}, ...]}.
Format 1 may leave out "kind".

It has no times and no paths: the same documents, tokenizer and settings give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bitjax.config import CorpusKind
from bitjax.text import Specials, TextTokenizer
from bitjax.tokenizer import BYTES, ByteTokenizer, Tokenizer

FORMATS = {"text": 1, "chat": 2, "pairs": 2}  # what an index of each kind says
INDEX = "index.json"
TOKENIZER = "tokenizer.json"
PARTS = ("train", "valid")
_DTYPES = {"uint8": "<u1", "uint16": "<u2", "uint32": "<u4"}
_MAX_INDEX = 64 << 20  # bytes; a shard takes about 100, so this is 600,000 of them


def dtype_name(vocab_size: int) -> str:
    """The narrowest type of the ids 0..vocab_size-1."""
    return "uint8" if vocab_size <= 1 << 8 else "uint16" if vocab_size <= 1 << 16 else "uint32"


def shard_name(part: str, number: int, values: str = "tokens") -> str:
    return f"{part}-{number:05}.{values}"


def describe_tokenizer(tokenizer: Tokenizer) -> tuple[Any, str | None]:
    """What the index says of a tokenizer, and its JSON.

    Raises:
        ValueError: a kind that a corpus cannot hold.
    """
    if isinstance(tokenizer, ByteTokenizer):
        return BYTES.name, None
    if not isinstance(tokenizer, TextTokenizer):
        raise ValueError(f"a corpus cannot hold the tokenizer {tokenizer.name!r}")
    return asdict(tokenizer.special), tokenizer.json


def restore_tokenizer(about: Any, text: str | None, where: str) -> Tokenizer:
    """The tokenizer that `describe_tokenizer` described.

    Raises:
        ValueError: malformed settings; naming `where`.
    """
    if about == BYTES.name:
        return BYTES
    if not isinstance(about, dict) or text is None:
        raise ValueError(f"{where}: unknown tokenizer {about!r:.60}")
    try:
        return TextTokenizer(text, Specials(**about | {"stop": tuple(about["stop"])}), where)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: the tokenizer's settings are malformed: {error}") from None


class Part:
    """The training or validation tokens of a corpus.

    Attributes:
        name: of corpus and part, for messages.
        kind: of the corpus: "text", "chat" or "pairs".
        identity: changes when any token does.
        tokens, documents: their numbers.
        starts: int64 `[documents + 1]`; document i is tokens starts[i] to starts[i + 1].
        vocab_size: every id is below it; checked when read.
    """

    def __init__(self, folder: Path, part: str, index: dict[str, Any]) -> None:
        about = index["parts"][part]
        self.name = f"{folder}, {part}"
        self.kind: CorpusKind = index.get("kind", "text")
        self.vocab_size: int = index["vocab_size"]
        self.tokens: int = about["tokens"]
        self.documents: int = about["documents"]
        said = [index["dtype"], index["vocab_size"], index["tokenizer_sha256"], about]
        self.identity = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
        self._shard_tokens: int = index["shard_tokens"]
        dtype = np.dtype(_DTYPES[index["dtype"]])
        self.paths = [folder / shard_name(part, i) for i in range(len(about["shards"]))]
        self._shards = [
            _mapped(path, dtype, shard["tokens"])
            for path, shard in zip(self.paths, about["shards"], strict=True)
        ]
        self.counted_paths = [
            folder / shard_name(part, i, "counted")
            for i in range(len(about["shards"]) if self.kind != "text" else 0)
        ]
        self._counted = [
            _mapped(path, np.dtype("u1"), shard["tokens"])
            for path, shard in zip(self.counted_paths, about["shards"], strict=False)
        ]
        self.starts_path = folder / f"{part}.starts"
        self.starts = _mapped(self.starts_path, np.dtype("<i8"), self.documents + 1)
        counts = [shard["tokens"] for shard in about["shards"]]
        full = all(count == self._shard_tokens for count in counts[:-1])
        if sum(counts) != self.tokens or not full or max(counts, default=0) > self._shard_tokens:
            raise ValueError(f"{folder / INDEX}: the shards of {part} do not add up")
        if self.starts[0] != 0 or self.starts[-1] != self.tokens:
            raise ValueError(f"{self.starts_path} does not fit the {self.tokens:,} tokens")
        if self.kind == "pairs" and self.documents % 2:
            raise ValueError(f"{folder / INDEX}: {self.documents} documents are no pairs")

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Tokens from each start on: int32 `[n, length]`, over shards' ends.

        Raises:
            ValueError: an id beyond the vocabulary: the file was damaged.
        """
        made = self._read(self._shards, starts, length)
        if made.size and not 0 <= made.min() <= made.max() < self.vocab_size:
            raise ValueError(
                f"{self.name} holds token {made.max()}; the vocabulary has {self.vocab_size}"
            )
        return made

    def _read(self, shards: list[np.ndarray], starts: np.ndarray, length: int) -> np.ndarray:
        made = np.empty((len(starts), length), np.int32)
        for row, start in zip(made, starts.tolist(), strict=True):
            done = 0
            while done < length:
                shard, first = divmod(start + done, self._shard_tokens)
                piece = shards[shard][first : first + length - done]
                row[done : done + len(piece)] = piece.astype(np.int32)
                done += len(piece)
        return made

    def counted(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Which tokens of `windows` are learned: bool, same shape; all of a text.

        Raises:
            ValueError: a value that is not 0 or 1: the file was damaged.
        """
        if self.kind == "text":
            return np.ones((len(starts), length), bool)
        made = self._read(self._counted, starts, length)
        if made.size and made.max() > 1:
            raise ValueError(f"{self.name}: a .counted file holds {made.max()}, not 0 or 1")
        return made.astype(bool)

    def segments(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The document of each token of `windows`, counted from 1 in its row: int32, same shape."""
        positions = starts[:, None] + np.arange(length)
        documents = np.searchsorted(self.starts, positions, side="right")
        return (documents - documents[:, :1] + 1).astype(np.int32)

    def check(self, about: dict[str, Any]) -> None:
        """Read everything: checksums, ids, and the order of the documents' starts."""
        sums = [shard["sha256"] for shard in about["shards"]]
        sums += [shard.get("counted_sha256") for shard in about["shards"][: len(self._counted)]]
        sums.append(about["starts_sha256"])
        paths = [*self.paths, *self.counted_paths, self.starts_path]
        arrays = [*self._shards, *self._counted, self.starts]
        for path, wanted, array in zip(paths, sums, arrays, strict=True):
            found = hashlib.sha256(array.data).hexdigest()
            if found != wanted:
                raise ValueError(f"{path} is damaged: its sha256 is {found}; it should be {wanted}")
        for path, shard in zip(self.paths, self._shards, strict=True):
            if shard.size and shard.max() >= self.vocab_size:
                raise ValueError(
                    f"{path} holds token {shard.max()}; the vocabulary has {self.vocab_size}"
                )
        if (np.diff(self.starts) <= 0).any():
            raise ValueError(f"{self.starts_path}: the documents' starts do not ascend")


class Corpus:
    """An open corpus.

    Args:
        folder: written by `bitjax.corpus.build`.
        check: read and check everything: checksums and ids. Without it sizes alone are checked, and
            ids as they are read.

    Attributes:
        index: the parsed index.json.
        train, valid: its parts.
        identity: changes when anything but the folder's name does.

    Raises:
        ValueError: no corpus, of another version, or damaged; naming the file.
    """

    def __init__(self, folder: Path, check: bool = False) -> None:
        self.folder = folder
        self.index = _read_index(folder / INDEX)
        self.tokenizer = self._tokenizer()
        try:
            self.train, self.valid = (Part(folder, part, self.index) for part in PARTS)
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{folder / INDEX} is malformed: {error!r:.80}") from None
        said = f"{self.train.identity} {self.valid.identity}"
        self.identity = hashlib.sha256(said.encode()).hexdigest()
        if check:
            self.train.check(self.index["parts"]["train"])
            self.valid.check(self.index["parts"]["valid"])

    def _tokenizer(self) -> Tokenizer:
        wanted, path, text = self.index.get("tokenizer_sha256"), self.folder / TOKENIZER, None
        if wanted is not None:
            try:
                raw = path.read_bytes()
            except OSError as error:
                raise ValueError(f"cannot read {path}: {error.strerror}") from None
            if hashlib.sha256(raw).hexdigest() != wanted:
                raise ValueError(f"{path} is not the tokenizer of this corpus: its sha256 differs")
            text = raw.decode()
        tokenizer = restore_tokenizer(self.index.get("tokenizer"), text, str(path))
        if tokenizer.vocab_size != self.index.get("vocab_size"):
            raise ValueError(
                f"{path} has {tokenizer.vocab_size} tokens; "
                f"{INDEX} says {self.index.get('vocab_size')!r:.20}"
            )
        return tokenizer


def is_corpus(path: Path) -> bool:
    """Whether a path is a folder with an index."""
    return (path / INDEX).is_file()


def _read_index(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        index = json.loads(path.read_bytes()) if size <= _MAX_INDEX else None
    except OSError as error:
        raise ValueError(f"{path.parent} is no corpus: {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    found = index.get("format") if isinstance(index, dict) else None
    if not isinstance(index, dict) or found not in FORMATS.values():
        raise ValueError(f"{path} has format {found!r:.20}; this version reads 1 and 2")
    kind = index.get("kind", "text")
    if not isinstance(kind, str) or FORMATS.get(kind) != found:
        raise ValueError(f"{path} is malformed: kind {kind!r:.40} in format {found}")
    if index.get("dtype") not in _DTYPES or not _count(index.get("shard_tokens"), 1):
        raise ValueError(f"{path} is malformed: dtype or shard_tokens")
    parts = index.get("parts")
    if not isinstance(parts, dict) or set(parts) != set(PARTS):
        raise ValueError(f"{path} is malformed: its parts are not {' and '.join(PARTS)}")
    for part, about in parts.items():
        shards = about.get("shards") if isinstance(about, dict) else None
        if not isinstance(shards, list) or not all(isinstance(shard, dict) for shard in shards):
            raise ValueError(f"{path} is malformed: {part} has no list of shards, each an object")
        counts = [about.get("tokens"), about.get("documents")]
        counts += [shard.get("tokens") for shard in shards]
        if not all(_count(count, 0) for count in counts):
            raise ValueError(f"{path} is malformed: a count is not a number")
    return index


def _count(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


def _mapped(path: Path, dtype: np.dtype[Any], count: int) -> np.ndarray:
    """A file of exactly `count` values, mapped."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    if size != count * dtype.itemsize:
        raise ValueError(
            f"{path} has {size:,} bytes; its index says {count * dtype.itemsize:,}: it is damaged "
            "or cut short"
        )
    return np.memmap(path, dtype, "r") if count else np.empty(0, dtype)
