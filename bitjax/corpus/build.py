"""Build a corpus: documents tokenised by several processes, written in their own order.

This process reads and writes; the others tokenise batches of documents. Batches come back in the
order they were sent, so the result is the same bytes for any number of workers.

A document is held out for validation if a hash of its text says so,

    blake2b(text, key=salt) < valid_fraction * 2^64        (8 bytes, little-endian)

so the split does not depend on the order of files, and equal texts are always on one side.

Everything is written into FOLDER.partial, which becomes FOLDER when it is complete: a build that
was stopped leaves no corpus, and the next one begins anew.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitjax.config.corpus import CorpusConfig
from bitjax.corpus.sources import Document, find_files, read_documents
from bitjax.corpus.store import (
    FORMATS,
    INDEX,
    PARTS,
    TOKENIZER,
    describe_tokenizer,
    dtype_name,
    restore_tokenizer,
    shard_name,
)
from bitjax.tokenizer import Tokenizer, utf8

_BATCH_CHARACTERS = 1 << 20  # of a batch: about 0.1 s of BPE, long against sending it
_BATCH_DOCUMENTS = 4096
_AHEAD = 3  # batches in flight for each worker: none waits, and memory stays bounded


@dataclass(frozen=True)
class Encoded:
    """A batch of documents: all ids in one array; length, bytes and part of each document.

    `counted`, uint8, is 1 for the ids that are to be learned; None of texts, where all are.
    """

    ids: np.ndarray
    lengths: list[int]
    sizes: list[int]
    valid: list[bool]
    counted: np.ndarray | None = None


Encode = Callable[[Sequence[Document], Tokenizer, CorpusConfig], Encoded]


def is_valid(raw: bytes, config: CorpusConfig) -> bool:
    """Whether the document of these UTF-8 bytes is held out."""
    digest = hashlib.blake2b(raw, digest_size=8, key=config.salt.encode()).digest()
    return int.from_bytes(digest, "little") < config.valid_fraction * 2.0**64


def encode_batch(batch: Sequence[Document], tokenizer: Tokenizer, config: CorpusConfig) -> Encoded:
    """Tokenise documents; each ends with the tokenizer's first stop token, if it has one.

    Raises:
        ValueError: a text that is not Unicode, or ids beyond the vocabulary; naming the document.
    """
    dtype = np.dtype(dtype_name(tokenizer.vocab_size))
    end = np.array(tokenizer.stop[:1], np.int32)
    ids, made = [np.empty(0, dtype)], Encoded(np.empty(0, dtype), [], [], [])
    for document in batch:
        try:
            raw = utf8(document.text)
            found = np.concatenate([tokenizer.encode(document.text), end])
        except ValueError as error:
            raise ValueError(f"{document.where}: {error}") from None
        if not 0 <= found.min(initial=0) <= found.max(initial=0) < tokenizer.vocab_size:
            raise ValueError(
                f"{document.where}: the tokenizer gave token {found.max()}; its vocabulary has "
                f"{tokenizer.vocab_size}"
            )
        ids.append(found.astype(dtype))
        made.lengths.append(len(found))
        made.sizes.append(len(raw))
        made.valid.append(is_valid(raw, config))
    return Encoded(np.concatenate(ids), made.lengths, made.sizes, made.valid)


_worker: tuple[Encode, Tokenizer, CorpusConfig]  # of a worker process, set as it starts


def _start_worker(about: Any, text: str | None, encode: Encode, config: CorpusConfig) -> None:
    global _worker
    _worker = encode, restore_tokenizer(about, text, "the tokenizer"), config


def _encode_in_worker(batch: Sequence[Document]) -> Encoded:
    encode, tokenizer, config = _worker
    return encode(batch, tokenizer, config)


class PartWriter:
    """Writes one part's shards and starts, and hashes them on the way.

    With `masks` each shard has a file that says which of its tokens are counted.
    """

    def __init__(
        self, folder: Path, part: str, dtype: str, shard_tokens: int, masks: bool = False
    ) -> None:
        self._folder, self._part, self._shard_tokens = folder, part, shard_tokens
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._masks = masks
        # Of the open shard: its sums' names in the index, files and hashes; tokens come first.
        self._open: list[tuple[str, Any, Any]] = []
        self._lengths: list[int] = []
        self.shards: list[dict[str, Any]] = []
        self.bytes = 0

    def write(self, ids: np.ndarray, size: int, counted: np.ndarray | None = None) -> None:
        """Append one document of `size` UTF-8 bytes."""
        self._lengths.append(len(ids))
        self.bytes += size
        values = [ids.astype(self._dtype), *([] if counted is None else [counted.astype("u1")])]
        while len(values[0]):
            if not self._open:
                self._begin_shard()
            room = self._shard_tokens - self.shards[-1]["tokens"]
            for (_, file, sums), array in zip(self._open, values, strict=True):
                piece = array[:room].tobytes()
                file.write(piece)
                sums.update(piece)
            self.shards[-1]["tokens"] += len(values[0][:room])
            values = [array[room:] for array in values]
            if self.shards[-1]["tokens"] == self._shard_tokens:
                self._finish_shard()

    def _begin_shard(self) -> None:
        number = len(self.shards)
        names = {"sha256": shard_name(self._part, number)}
        if self._masks:
            names["counted_sha256"] = shard_name(self._part, number, "counted")
        self._open = [
            (key, (self._folder / name).open("wb"), hashlib.sha256()) for key, name in names.items()
        ]
        self.shards.append({"tokens": 0})

    def _finish_shard(self) -> None:
        for key, file, sums in self._open:
            file.flush()
            os.fsync(file.fileno())
            self.shards[-1][key] = sums.hexdigest()
        self.close()

    def close(self) -> None:
        for _, file, _ in self._open:
            file.close()
        self._open = []

    def finish(self) -> dict[str, Any]:
        """Write what is left; returns the part's entry in the index."""
        self._finish_shard()
        starts = np.concatenate([[0], np.cumsum(self._lengths)]).astype("<i8")
        (self._folder / f"{self._part}.starts").write_bytes(starts.tobytes())
        return {
            "documents": len(self._lengths),
            "tokens": int(starts[-1]),
            "bytes": self.bytes,
            "starts_sha256": hashlib.sha256(starts.tobytes()).hexdigest(),
            "shards": self.shards,
        }


def build_corpus(
    inputs: Iterable[Path],
    output: Path,
    tokenizer: Tokenizer,
    config: CorpusConfig | None = None,
    workers: int = 1,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    encode: Encode = encode_batch,
) -> dict[str, Any]:
    """Write the corpus of all documents of `inputs` to the folder `output`; returns its index.

    Args:
        inputs: files and folders, see `bitjax.corpus.sources`.
        output: a folder that does not exist yet, unless `overwrite`.
        tokenizer: bytes or a `TextTokenizer`.
        config: see `CorpusConfig`.
        workers: processes that tokenise; 1 does it in this one.
        on_progress: told the bytes of input read, and of all.
        encode: makes tokens of documents, in any process; of conversations and pairs see
            `bitjax.chat.examples`.

    Raises:
        ValueError: inputs that cannot be read, no text in them, an empty part, or an output that
            exists.
    """
    config = config or CorpusConfig()
    if (config.kind == "text") != (encode is encode_batch):
        raise ValueError(f"a corpus of {config.kind} is built by bitjax.chat.examples")
    if workers < 1:
        raise ValueError(f"workers={workers} must be 1 or more")
    if output.exists() and not overwrite:
        raise ValueError(f"{output} exists; choose another name or give --overwrite")
    if output.exists() and not (output / INDEX).is_file():
        raise ValueError(f"{output} is no corpus; only a corpus is replaced")
    files = find_files(inputs)
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        batches = _batches(files, config, on_progress)
        index = _write(
            partial, _encoded(batches, tokenizer, config, workers, encode), tokenizer, config
        )
        if output.exists():
            shutil.rmtree(output)
        partial.rename(output)
    except OSError as error:
        raise ValueError(f"cannot write {output}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return index


def _batches(
    files: list[Path], config: CorpusConfig, on_progress: Callable[[int, int], None]
) -> Iterator[list[Document]]:
    total, done = sum(path.stat().st_size for path in files), 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        on_progress(done, total)

    batch: list[Document] = []
    characters = 0
    for path in files:
        for document in read_documents(path, config, on_bytes):
            batch.append(document)
            characters += len(document.text)
            if characters >= _BATCH_CHARACTERS or len(batch) == _BATCH_DOCUMENTS:
                yield batch
                batch, characters = [], 0
    yield batch


def _encoded(
    batches: Iterator[list[Document]],
    tokenizer: Tokenizer,
    config: CorpusConfig,
    workers: int,
    encode: Encode,
) -> Iterator[Encoded]:
    """Batches tokenised, in their order."""
    if workers == 1:
        yield from (encode(batch, tokenizer, config) for batch in batches)
        return
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"),
        _start_worker, (*describe_tokenizer(tokenizer), encode, config),
    )  # fmt: skip
    waiting: deque[Future[Encoded]] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(_encode_in_worker, batch))
            if len(waiting) >= _AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise ValueError("a tokenising process was killed, perhaps for want of memory") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _write(
    folder: Path, batches: Iterator[Encoded], tokenizer: Tokenizer, config: CorpusConfig
) -> dict[str, Any]:
    about, text = describe_tokenizer(tokenizer)
    dtype, empty, masks = dtype_name(tokenizer.vocab_size), 0, config.kind != "text"
    writers = {part: PartWriter(folder, part, dtype, config.shard_tokens, masks) for part in PARTS}
    try:
        for encoded in batches:
            end = np.cumsum(encoded.lengths, dtype=np.int64).tolist()
            for i, size in enumerate(encoded.sizes):
                if not size:
                    empty += 1
                    continue
                writer = writers["valid" if encoded.valid[i] else "train"]
                mine = slice(end[i] - encoded.lengths[i], end[i])
                counted = None if encoded.counted is None else encoded.counted[mine]
                writer.write(encoded.ids[mine], size, counted)
        parts = {part: writer.finish() for part, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.close()
    _require_documents(parts, empty, config)
    index = {
        "format": FORMATS[config.kind], "kind": config.kind, "dtype": dtype,
        "vocab_size": tokenizer.vocab_size, "shard_tokens": config.shard_tokens, "tokenizer": about,
        "tokenizer_sha256": hashlib.sha256(text.encode()).hexdigest() if text else None,
        "config": asdict(config), "empty": empty, "parts": parts,
    }  # fmt: skip
    if text is not None:
        (folder / TOKENIZER).write_bytes(text.encode())
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    return index


def _require_documents(parts: dict[str, Any], empty: int, config: CorpusConfig) -> None:
    train, valid = (parts[part]["documents"] for part in PARTS)
    if not train + valid:
        raise ValueError(f"there is no text in the input: {empty} empty documents")
    if not train or (not valid and config.valid_fraction):
        raise ValueError(
            f"all of the {train + valid} documents fell into the {'valid' if valid else 'train'} "
            "part; cut the text into more documents (--separator), or choose another "
            "--valid-fraction (0 holds out none)"
        )
