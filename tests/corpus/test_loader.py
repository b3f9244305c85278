"""Mixtures' proportions, and which document each token is of."""

import json

import numpy as np
import pytest
from tiny import tiny_config

from bitjax.config import CorpusConfig, DataConfig, RunConfig, TrainConfig
from bitjax.corpus import Corpus, Loader, build_corpus
from bitjax.corpus.tokenizer_training import train_tokenizer
from bitjax.tokenizer import BYTES
from bitjax.train.source import open_source


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Folders of three corpora: of the letters a and b, and one of another tokenizer."""
    folder = tmp_path_factory.mktemp("corpora")
    for name in "ab":
        lines = [json.dumps({"text": name * (i + 1)}) for i in range(40)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        config = CorpusConfig(valid_fraction=0.3)
        build_corpus([folder / f"{name}.jsonl"], folder / name, BYTES, config)
    build_corpus([folder / "a.jsonl"], folder / "c", train_tokenizer(["a"], 257), config)
    return folder


def test_segments_count_the_documents_of_a_row(corpora):
    part = Corpus(corpora / "a").train
    of = np.repeat(np.arange(part.documents), np.diff(part.starts))  # document of every token
    starts = np.array([0, 3, part.tokens - 30])
    found = part.segments(starts, 30)
    for row, start in zip(found, starts, strict=True):
        mine = of[start : start + 30]
        np.testing.assert_array_equal(row, mine - mine[0] + 1)
    assert found.max() > 2


def test_a_mixture_has_its_proportions_in_any_stretch(corpora):
    parts = [Corpus(corpora / name).train for name in "ab"]
    loader = Loader(parts, 8, 8, seed=1, weights=(3.0, 1.0))
    for first in (0, 50):
        tokens = np.concatenate([loader.batch(s).tokens for s in range(first, first + 10)])
        rows = (tokens == ord("a")).all(axis=1)
        assert abs(rows.sum() - 60) <= 2  # 3/4 of 80
        assert ((tokens == ord("b")).all(axis=1) != rows).all()
    with pytest.raises(ValueError, match="are not one number of 0 or more for each of the 2"):
        Loader(parts, 8, 8, seed=1, weights=(1.0,))


def run(corpora, *mixture, text=""):
    return RunConfig(
        model=tiny_config(vocab_size=257), data=DataConfig(text=text, mixture=mixture),
        train=TrainConfig(batch_size=8, seq_len=8),
    )  # fmt: skip


def test_a_mixture_of_the_configuration_is_the_loaders(corpora):
    mixture = f"{corpora / 'a'}=3", f"{corpora / 'b'}=1"
    source = open_source(run(corpora, *mixture))
    parts = [Corpus(corpora / name).train for name in "ab"]
    wanted = Loader(parts, 8, 8, seed=0, weights=(3, 1))
    np.testing.assert_array_equal(source.batch(7).tokens, wanted.batch(7).tokens)
    valid = source.valid(16).tokens
    assert [(valid == ord(c)).all(axis=1).sum() for c in "ab"] == [12, 4]
    other = open_source(run(corpora, f"{corpora / 'a'}=2", mixture[1]))
    assert other.identity != source.identity


def test_mixtures_that_are_none(corpora):
    a = f"{corpora / 'a'}"
    for mixture, message in (
        ((a,), "which is not PATH=WEIGHT with a weight above 0"),
        ((f"{a}=0",), "which is not PATH=WEIGHT with a weight above 0"),
        ((f"{a}=nan",), "which is not PATH=WEIGHT with a weight above 0"),
        ((f"{a}=1", f"{a}=2"), "twice"),
    ):
        with pytest.raises(ValueError, match=message):
            run(corpora, *mixture)
    with pytest.raises(ValueError, match="both say where the tokens come from"):
        run(corpora, f"{a}=1", text="b")
    with pytest.raises(ValueError, match="has another tokenizer than"):
        open_source(run(corpora, f"{a}=1", f"{corpora / 'c'}=1"))
    with pytest.raises(ValueError, match="is no corpus"):
        open_source(run(corpora, f"{corpora}=1"))
