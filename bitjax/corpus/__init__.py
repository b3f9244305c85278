"""Files of text to token files and batches: sources, build, store, loader."""

from bitjax.corpus.build import build_corpus
from bitjax.corpus.loader import Loader
from bitjax.corpus.rows import Batch
from bitjax.corpus.store import Corpus, Part

__all__ = ["Batch", "Corpus", "Loader", "Part", "build_corpus"]
