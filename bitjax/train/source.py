"""Where a run's tokens come from: a text, byte by byte, or a corpus of `bitjax corpus build`.

Either is a pure function of (seed, step), so the step is the whole data position.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from bitjax.config import CorpusKind, RunConfig
from bitjax.corpus.loader import Loader
from bitjax.corpus.rows import Batch, Rows, joined, rows_of
from bitjax.corpus.store import Corpus, describe_tokenizer, is_corpus, restore_tokenizer
from bitjax.tokenizer import BYTES, Tokenizer
from bitjax.train import data
from bitjax.train.objective import make_objective

TOKENIZER = "tokenizer.json"  # in a run's directory, beside config.json, unless tokens are bytes


class Source(Protocol):
    """What the training loop reads.

    Attributes:
        name: for messages.
        identity: a hash; a run is resumed only on data of the same.
        tokenizer: of the tokens.
        kind: of the corpus; "text" without one.
        rows: of a corpus, those of training and those held out.
    """

    name: str
    identity: str
    tokenizer: Tokenizer
    kind: CorpusKind
    rows: Sequence[Rows]

    def batch(self, step: int) -> Batch:
        """The batch of one step: `[batch_size, seq_len + 1]`."""

    def valid(self, limit: int) -> Batch:
        """About `limit` rows at most, spread over the held-out part: `[n, seq_len + 1]`."""


class TextSource:
    """The bytes of one file; see `Source`."""

    tokenizer: Tokenizer = BYTES
    kind: CorpusKind = "text"
    rows: Sequence[Rows] = ()

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
    """A folder of token files, or a mixture of several; see `Source`.

    A corpus's own split decides what is held out; of a mixture each gives its share by weight.
    """

    def __init__(self, config: RunConfig) -> None:
        data, train = config.data, config.train
        corpora = [Corpus(Path(path)) for path in data.weights() or (data.text,)]
        self._weights = list(data.weights().values()) or [1.0]
        first = corpora[0]
        for corpus in corpora:
            valid = corpus.valid
            if valid.kind == "text" and valid.tokens < train.seq_len + 1:
                raise ValueError(
                    f"{corpus.folder} holds out {valid.tokens} tokens; sequences of "
                    f"{train.seq_len} need {train.seq_len + 1}: build it with a larger "
                    "--valid-fraction"
                )
            if corpus.index["tokenizer_sha256"] != first.index["tokenizer_sha256"]:
                raise ValueError(
                    f"{corpus.folder} has another tokenizer than {first.folder}: a mixture needs "
                    "one"
                )
        apart, parts = data.documents == "apart", [corpus.train for corpus in corpora]
        self._loader = Loader(
            parts, train.seq_len, train.batch_size, train.seed,
            self._weights if data.mixture else None, apart,
        )  # fmt: skip
        self._valid = [rows_of(corpus.valid, train.seq_len, apart) for corpus in corpora]
        self.rows: Sequence[Rows] = [*self._loader.rows, *self._valid]
        self.name, self.tokenizer = data.text or ", ".join(data.mixture), first.tokenizer
        self.kind = first.train.kind
        both = " ".join([self._loader.identity, *(corpus.valid.identity for corpus in corpora)])
        self.identity = hashlib.sha256(both.encode()).hexdigest()
        self._tell_cuts(train.seq_len)

    def _tell_cuts(self, seq_len: int) -> None:
        cut, left_out = (sum(getattr(r, of) for r in self.rows) for of in ("cut", "left_out"))
        if cut:
            every = sum(rows.part.documents for rows in self.rows)
            warnings.warn(
                f"{cut} of {every} conversations of {self.name} have more than {seq_len + 1} "
                f"tokens (train.seq_len + 1) and are cut there; {left_out} are left out, because "
                "no answer remains of them or of their partner in a pair",
                stacklevel=2,
            )

    def batch(self, step: int) -> Batch:
        """See `Source`."""
        return self._loader.batch(step)

    def valid(self, limit: int) -> Batch:
        """See `Source`."""
        total = sum(self._weights)
        found = [
            rows.spread(max(rows.per_entry, round(limit * weight / total)))
            for rows, weight in zip(self._valid, self._weights, strict=True)
        ]
        return joined(found)


def open_source(config: RunConfig) -> Source:
    """The source that `config.data` names: a corpus's folder, several, a file, or by default the
    packaged text.

    Raises:
        ValueError: it cannot be read or is too short, its tokens exceed the model's vocabulary, or
            it is not what the objective learns from.
    """
    corpus = bool(config.data.text) and is_corpus(Path(config.data.text))
    corpus = corpus or bool(config.data.mixture)
    if config.data.documents == "apart" and not corpus:
        raise ValueError(
            "data.documents=apart needs a corpus, which knows where documents end; "
            f"data.text={config.data.text!r} is none"
        )
    source: Source = CorpusSource(config) if corpus else TextSource(config)
    kinds = make_objective(config.train).kinds
    if source.kind not in kinds:
        raise ValueError(
            f"train.objective={config.train.objective} learns from a corpus of the kind "
            f"{' or '.join(kinds)}; {source.name} is of the kind {source.kind}"
        )
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
