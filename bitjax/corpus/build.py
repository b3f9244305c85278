"""Build a corpus: documents tokenised by several processes, written in their own order.

This process reads and writes; the others tokenise batches of documents. Batches come back in the
order they were sent, so the result is the same bytes for any number of workers.

A document is held out for validation if a hash of its text says so,

    blake2b(text, key=salt) < valid_fraction * 2^64        (8 bytes, little-endian)

so the split does not depend on the order of files, and equal texts are always on one side.

Everything is written into FOLDER.partial, which becomes FOLDER when it is complete. A build that
was stopped, by whatever, leaves no corpus, and the same call goes on where it was
(`bitjax.corpus.writer`): what had been read is read again, to see that it has not changed, but not
tokenised again. Other files, settings or texts begin anew, and say so.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
import warnings
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
)
from bitjax.corpus.writer import PROGRESS, Journal, PartWriter
from bitjax.tokenizer import Tokenizer, utf8

_BATCH_CHARACTERS = 1 << 20  # of a batch: about 0.1 s of BPE, long against sending it
_BATCH_DOCUMENTS = 4096
_SAVE_EVERY = 16  # batches: seconds of BPE; what a build that is killed may have to do again
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
    try:
        partial.mkdir(parents=True, exist_ok=True)
        index = _Build(partial, files, tokenizer, config).run(workers, encode, on_progress)
        if output.exists():
            shutil.rmtree(output)
        partial.rename(output)
    except OSError as error:
        raise ValueError(f"cannot write {output}: {error.strerror or error}") from None
    finally:
        if not (partial / PROGRESS).exists():  # nothing that a later build could go on from
            shutil.rmtree(partial, ignore_errors=True)
    return index


class _Build:
    """A build in its folder, begun or gone on with."""

    def __init__(
        self, folder: Path, files: list[Path], tokenizer: Tokenizer, config: CorpusConfig
    ) -> None:
        self._folder, self._files, self._tokenizer, self._config = folder, files, tokenizer, config
        self._about, self._text = describe_tokenizer(tokenizer)
        decisive = [
            FORMATS[config.kind], asdict(config), self._about, self._text,
            [_BATCH_CHARACTERS, _BATCH_DOCUMENTS], [str(path.absolute()) for path in files],
        ]  # fmt: skip
        build = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()
        self._journal = Journal(folder, build)
        if self._journal.other:
            warnings.warn(
                f"{folder} is of a build with other files or settings; it begins anew", stacklevel=4
            )

    def run(
        self, workers: int, encode: Encode, on_progress: Callable[[int, int], None]
    ) -> dict[str, Any]:
        """See `build_corpus`; returns the index, which is written."""
        texts = _Texts(_batches(self._files, self._config, on_progress))
        held, writers = self._journal.held, None
        if held is not None:
            if texts.skip(held["batches"]) == held["texts"]:
                writers = self._writers(held)
            if writers is None:
                warnings.warn(
                    f"the texts have changed, or {self._folder} has, since a build was stopped; "
                    "it begins anew",
                    stacklevel=3,
                )
                texts = _Texts(_batches(self._files, self._config, on_progress))
        if writers is None:
            shutil.rmtree(self._folder)
            self._folder.mkdir()
            held, writers = None, self._writers(None)
        batches = _encoded(texts, self._tokenizer, self._config, workers, encode)
        return self._write(batches, texts, writers or {}, held["empty"] if held else 0)

    def _writers(self, held: dict[str, Any] | None) -> dict[str, PartWriter] | None:
        """Of both parts; None if the files do not hold what they should."""
        dtype, config = dtype_name(self._tokenizer.vocab_size), self._config
        made: dict[str, PartWriter] = {}
        self._journal.sweep()
        try:
            for part in PARTS:
                made[part] = PartWriter(
                    self._folder, part, dtype, config.shard_tokens, config.kind != "text",
                    held and held["parts"][part],
                )  # fmt: skip
        except (ValueError, OSError):
            for writer in made.values():
                writer.close()
            if held is None:
                raise
            return None
        return made

    def _write(
        self, batches: Iterator[Encoded], texts: _Texts, writers: dict[str, PartWriter], empty: int
    ) -> dict[str, Any]:
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
                written, digest = texts.written()
                if written % _SAVE_EVERY == 0:
                    self._journal.save(written, digest, empty, writers)
            parts = {part: writer.finish() for part, writer in writers.items()}
        finally:
            for writer in writers.values():
                writer.close()
        try:
            _require_documents(parts, empty, self._config)
            return self._write_index(parts, empty)
        finally:
            self._journal.finish()

    def _write_index(self, parts: dict[str, Any], empty: int) -> dict[str, Any]:
        config, text = self._config, self._text
        index = {
            "format": FORMATS[config.kind], "kind": config.kind,
            "dtype": dtype_name(self._tokenizer.vocab_size),
            "vocab_size": self._tokenizer.vocab_size, "shard_tokens": config.shard_tokens,
            "tokenizer": self._about,
            "tokenizer_sha256": hashlib.sha256(text.encode()).hexdigest() if text else None,
            "config": asdict(config), "empty": empty, "parts": parts,
        }  # fmt: skip
        if text is not None:
            (self._folder / TOKENIZER).write_bytes(text.encode())
        (self._folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
        return index


class _Texts:
    """Batches of documents, with a hash of all texts up to each of them."""

    def __init__(self, batches: Iterator[list[Document]]) -> None:
        self._batches, self._sums = batches, hashlib.blake2b(digest_size=16)
        self._digests: deque[str] = deque()  # of batches read and not yet written
        self._written = 0

    def __iter__(self) -> Iterator[list[Document]]:
        return self

    def __next__(self) -> list[Document]:
        batch = next(self._batches)
        for document in batch:
            raw = document.text.encode("utf-8", "surrogatepass")
            self._sums.update(len(raw).to_bytes(8, "little"))
            self._sums.update(raw)
        self._digests.append(self._sums.hexdigest())
        return batch

    def skip(self, batches: int) -> str:
        """Read so many batches, which are written already; the hash of their texts, or nothing if
        there are not so many."""
        for _ in range(batches):
            if next(self, None) is None:
                return ""
        digest = ""
        while self._digests:
            self._written, digest = self.written()
        return digest

    def written(self) -> tuple[int, str]:
        """How many batches are written, one more than before, and the hash of their texts."""
        self._written += 1
        return self._written, self._digests.popleft()


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
