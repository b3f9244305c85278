"""Runs on a corpus: their batches, their tokenizer, and data that changed or do not fit."""

import json

import numpy as np
import pytest
from tiny import tiny_config

from bitjax.api import load
from bitjax.config import CorpusConfig, DataConfig, RunConfig, TrainConfig, override
from bitjax.conversion import Conversion, convert
from bitjax.corpus import Corpus, Loader, build_corpus
from bitjax.corpus.tokenizer_training import train_tokenizer
from bitjax.train import data, train
from bitjax.train.checkpoint import read_run
from bitjax.train.source import open_source

TEXTS = [f"chapter {i}: " + "a bird in the hand " * (i % 5) for i in range(200)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A corpus's folder and its tokenizer."""
    folder = tmp_path_factory.mktemp("corpus")
    text = folder / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": t}) for t in TEXTS))
    tokenizer = train_tokenizer(TEXTS, 280)
    build_corpus([text], folder / "c", tokenizer, CorpusConfig(valid_fraction=0.2))
    return folder / "c", tokenizer


@pytest.fixture(scope="module")
def config(made):
    return RunConfig(
        model=tiny_config(num_layers=1, vocab_size=288),
        data=DataConfig(text=str(made[0])),
        train=TrainConfig(steps=2, batch_size=2, seq_len=8, checkpoint_every=1),
    )


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "a"
    return directory, train(config, directory)


def test_batches_are_the_loaders(made, config):
    corpus, source = Corpus(made[0]), open_source(config)
    wanted = Loader([corpus.train], 8, 2, seed=0)
    for step in (0, 1, 99):
        np.testing.assert_array_equal(source.batch(step).tokens, wanted.batch(step).tokens)
        assert source.batch(step).segments is None
    held_out = corpus.valid.windows(np.array([0]), corpus.valid.tokens)[0]
    windows = np.lib.stride_tricks.sliding_window_view(held_out, 9)
    valid = source.valid(5).tokens
    assert valid.shape == (5, 9)
    assert all((windows == row).all(axis=1).any() for row in valid)
    assert source.identity != open_source(override(config, ["train.seed=1"])).identity


def test_batches_of_a_text_are_those_of_its_bytes(config):
    config = override(config, ["data.text="])
    source, text = open_source(config), data.load_text(config.data)
    np.testing.assert_array_equal(source.batch(3).tokens, data.batch(text.train, 3, 0, 2, 8))
    np.testing.assert_array_equal(source.valid(4).tokens, data.windows(text.valid, 8, 4))
    assert source.identity == text.sha256


def test_documents_apart(made, config, tmp_path):
    apart = override(config, ["data.documents=apart"])
    source, corpus = open_source(apart), Corpus(made[0])
    stop = made[1].stop[0]
    for batch in (source.batch(1), source.valid(6)):
        ends = np.cumsum(batch.tokens == stop, axis=1)  # a document's last token is the stop token
        wanted = 1 + np.pad(ends, ((0, 0), (1, 0)))[:, :-1]
        np.testing.assert_array_equal(batch.segments, wanted)
    assert source.identity != open_source(config).identity
    assert (open_source(apart).valid(6).segments > 1).any()
    assert corpus.train.tokens > 0
    state = train(apart, tmp_path / "run")
    assert int(state.step) == 2
    with pytest.raises(ValueError, match=r"documents=apart needs a corpus.*data\.text='' is none"):
        open_source(override(apart, ["data.text="]))


def test_the_tokenizer_goes_with_the_run_and_what_is_made_of_it(made, run, tmp_path):
    directory, _ = run
    convert(directory, tmp_path / "m.safetensors", Conversion())
    for path in (directory, tmp_path / "m.safetensors"):
        found = load(path).tokenizer
        assert found.json == made[1].json
        assert found.special == made[1].special
        assert found.decode(found.encode(TEXTS[3])) == TEXTS[3]
    (tmp_path / "run").mkdir()
    for item in directory.iterdir():
        (tmp_path / "run" / item.name).symlink_to(item)
    (tmp_path / "run" / "tokenizer.json").unlink()
    (tmp_path / "run" / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer of a run"):
        load(tmp_path / "run")


def test_a_changed_corpus_is_refused(made, config, run, tmp_path):
    changed = tmp_path / "text.jsonl"
    changed.write_text("\n".join(json.dumps({"text": t + "!"}) for t in TEXTS))
    folder = tmp_path / "c"
    build_corpus([changed], folder, made[1], CorpusConfig(valid_fraction=0.2))
    made[0].rename(made[0].with_name("kept"))
    try:
        folder.rename(made[0])
        with pytest.raises(ValueError, match="another version of the training text"):
            train(override(config, ["train.steps=2"]), run[0])
    finally:
        made[0].rename(tmp_path / "changed")
        made[0].with_name("kept").rename(made[0])
    train(config, run[0])  # finished already
    assert read_run(run[0])[1] == 2


def test_what_does_not_fit(made, config, tmp_path):
    with pytest.raises(ValueError, match=r"vocab_size=279; the tokens of .*c need 280"):
        open_source(override(config, ["model.vocab_size=279"]))
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": t}) for t in TEXTS))
    build_corpus([text], tmp_path / "none", made[1], CorpusConfig(valid_fraction=0))
    with pytest.raises(ValueError, match=r"holds out 0 tokens; sequences of 8 need 9"):
        open_source(override(config, [f"data.text={tmp_path / 'none'}"]))
