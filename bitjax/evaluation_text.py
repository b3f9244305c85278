"""The table of `bitjax eval MODEL --text ...`: bits per byte and perplexity."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bitjax import terminal
from bitjax.api import load
from bitjax.config import CorpusConfig, DataConfig
from bitjax.corpus import Corpus
from bitjax.corpus.sources import find_files, read_documents
from bitjax.corpus.store import describe_tokenizer, is_corpus
from bitjax.evaluate import TextScore, model_scorer, score_text, tokens_of
from bitjax.evaluate.requests import RequestScorer
from bitjax.evaluate.rolling import score_corpus_documents, score_documents
from bitjax.model import Transformer
from bitjax.tokenizer import utf8
from bitjax.train.data import load_text, read_tokens


@dataclass(frozen=True)
class TextSettings:
    """What is scored, and how.

    Attributes:
        path: of a text, a corpus, or with `documents` any file that a corpus is built of; empty
            for the packaged Shakespeare, of which the held-out tenth is scored.
        window: predictions in a window; the model's context if None.
        stride: predictions between windows; half a window if None.
        documents: each by itself, see `bitjax.evaluate.rolling`, instead of windows over all.
        separator, field: see `CorpusConfig`.
    """

    path: str = ""
    window: int | None = None
    stride: int | None = None
    documents: bool = False
    separator: str = ""
    field: str = "text"


def evaluate_text(path: str, settings: TextSettings) -> TextScore:
    """Score a text with the model of a path, and print the table.

    Raises:
        ValueError: settings that do not go together, or a text that cannot be scored.
    """
    if settings.documents and (settings.window is not None or settings.stride is not None):
        raise ValueError("--window and --stride are of running text; --documents has neither")
    if settings.window is not None and settings.window < 1:
        raise ValueError(f"--window {settings.window} is below 1")
    model = load(path)
    score, name = score_path(model, settings)
    unit = "byte" if model.tokenizer.name == "bytes" else "token"
    terminal.table(
        ("text", f"{unit}s scored", "bits per byte", f"perplexity per {unit}"),
        [(
            name, f"{score.tokens:,}",
            f"{score.bits_per_byte:.4f} ± {score.bits_per_byte_error:.4f}",
            f"{score.perplexity:,.3f}",
        )],
    )  # fmt: skip
    return score


def score_path(model: Transformer, settings: TextSettings) -> tuple[TextScore, str]:
    """The score of what the settings name, and its name.

    Raises:
        ValueError: see `evaluate_text`.
    """
    if settings.path and is_corpus(Path(settings.path)):
        return _corpus(model, settings)
    if settings.documents:
        return _documents(model, settings)
    text, name = read_tokens(settings.path)
    if not settings.path:
        text, name = load_text(DataConfig()).valid, f"{name}, held-out tenth"
    tokens, size = tokens_of(model.tokenizer, text.tobytes(), name)
    return _running(model, settings, tokens, size), name


def _running(
    model: Transformer, settings: TextSettings, tokens: np.ndarray, size: int
) -> TextScore:
    window = model.config.max_seq_len if settings.window is None else settings.window
    return score_text(model_scorer(model), tokens, window, settings.stride, scored_bytes=size)


def _documents(model: Transformer, settings: TextSettings) -> tuple[TextScore, str]:
    config = CorpusConfig(text_field=settings.field, separator=settings.separator)
    if settings.path:
        files = find_files([Path(settings.path)])
        texts = [made.text for file in files for made in read_documents(file, config)]
        name = settings.path
    else:
        raw, name = load_text(DataConfig()).valid, "tiny Shakespeare (packaged), held-out tenth"
        text = raw.tobytes().decode(errors="replace")
        texts = text.split(settings.separator) if settings.separator else [text]
    score, each = score_documents(RequestScorer(model), model.tokenizer, texts)
    return score, f"{name}, {_number(each)}"


def _corpus(model: Transformer, settings: TextSettings) -> tuple[TextScore, str]:
    corpus = Corpus(Path(settings.path))
    theirs, ours = describe_tokenizer(corpus.tokenizer), describe_tokenizer(model.tokenizer)
    if theirs[1] != ours[1]:  # their JSON: what else there is does not change a token
        raise ValueError(f"the corpus {settings.path} has other tokens than the model; "
                         "score its text")  # fmt: skip
    part, size = corpus.valid, corpus.index["parts"]["valid"]["bytes"]
    if part.tokens < 2:
        raise ValueError(f"{part.name} holds {part.tokens} tokens; build it with --valid-fraction")
    if settings.documents:
        score, each = score_corpus_documents(RequestScorer(model), part, model.tokenizer, size)
        return score, f"{part.name}, {_number(each)}"
    tokens = part.windows(np.zeros(1, np.int64), part.tokens)[0]
    size -= len(utf8(model.tokenizer.decode(tokens[:1])))
    return _running(model, settings, tokens, max(1, size)), part.name


def _number(each: list[float]) -> str:
    return f"{len(each):,} document{'s' if len(each) != 1 else ''}"
