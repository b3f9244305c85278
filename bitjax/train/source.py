"""Where a run's tokens come from: a text, byte by byte, or a corpus of `bitjax corpus build`.

Either is a pure function of (seed, step), so the step is the whole data position.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

from bitjax.config import RunConfig
from bitjax.corpus.loader import Batch, Loader, spread
from bitjax.corpus.store import Corpus, describe_tokenizer, is_corpus, restore_tokenizer
from bitjax.tokenizer import BYTES, Tokenizer
from bitjax.train import data

TOKENIZER = "tokenizer.json"  # in a run's directory, beside config.json, unless tokens are bytes


class Source(Protocol):
    """What the training loop reads.

    Attributes:
        name: for messages.
        identity: a hash; a run is resumed only on data of the same.
        tokenizer: of the tokens.
    """

    name: str
    identity: str
    tokenizer: Tokenizer

    def batch(self, step: int) -> Batch:
        """The batch of one step: `[batch_size, seq_len + 1]`."""

    def valid(self, limit: int) -> Batch:
        """Up to `limit` windows spread over the held-out part: `[n, seq_len + 1]`."""


class TextSource:
    """The bytes of one file; see `Source`."""

    tokenizer: Tokenizer = BYTES

    def __init__(self, config: RunConfig) -> None:
        self._text, self._train = data.load_text(config.data), config.train
        data.require_length(self._text, config.train.seq_len)
        self.name, self.identity = self._text.name, self._text.sha256

    def batch(self, step: int) -> Batch:
        """See `Source`."""
        train = self._train
        return Batch(
            data.batch(self._text.train, step, train.seed, train.batch_size, train.seq_len)
        )

    def valid(self, limit: int) -> Batch:
        """See `Source`."""
        return Batch(data.windows(self._text.valid, self._train.seq_len, limit))


class CorpusSource:
    """A folder of token files; see `Source`. Its own split decides what is held out."""

    def __init__(self, config: RunConfig) -> None:
        corpus, train = Corpus(Path(config.data.text)), config.train
        if corpus.valid.tokens < train.seq_len + 1:
            raise ValueError(
                f"{config.data.text} holds out {corpus.valid.tokens} tokens; sequences of "
                f"{train.seq_len} need {train.seq_len + 1}: build it with a larger --valid-fraction"
            )
        self._apart = config.data.documents == "apart"
        self._loader = Loader(
            [corpus.train], train.seq_len, train.batch_size, train.seed, apart=self._apart
        )
        self._valid, self._seq_len = corpus.valid, train.seq_len
        self.name, self.tokenizer = config.data.text, corpus.tokenizer
        both = f"{self._loader.identity} {corpus.valid.identity}"
        self.identity = hashlib.sha256(both.encode()).hexdigest()

    def batch(self, step: int) -> Batch:
        """See `Source`."""
        return self._loader.batch(step)

    def valid(self, limit: int) -> Batch:
        """See `Source`."""
        return spread(self._valid, self._seq_len, limit, self._apart)


def open_source(config: RunConfig) -> Source:
    """The source that `config.data.text` names: a corpus's folder, a file, or by default the
    packaged text.

    Raises:
        ValueError: it cannot be read or is too short, or its tokens exceed the model's vocabulary.
    """
    corpus = bool(config.data.text) and is_corpus(Path(config.data.text))
    if config.data.documents == "apart" and not corpus:
        raise ValueError(
            "data.documents=apart needs a corpus, which knows where documents end; "
            f"data.text={config.data.text!r} is none"
        )
    source: Source = CorpusSource(config) if corpus else TextSource(config)
    size = source.tokenizer.vocab_size
    if config.model.vocab_size < size:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size}; the tokens of {source.name} need {size}"
        )
    return source


def tokenizer_file(tokenizer: Tokenizer) -> str | None:
    """What a run's directory says of its tokenizer; None of bytes."""
    settings, text = describe_tokenizer(tokenizer)
    return None if text is None else json.dumps({"settings": settings, "json": text})


def read_tokenizer_file(directory: Path) -> Tokenizer:
    """The tokenizer of a run's directory; bytes if it says nothing.

    Raises:
        ValueError: a damaged file.
    """
    path = directory / TOKENIZER
    if not path.exists():
        return BYTES
    try:
        held: Any = json.loads(path.read_text(encoding="utf-8"))
        settings, text = held["settings"], held["json"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no tokenizer of a run: {error}") from None
    return restore_tokenizer(settings, text, str(path))
