"""`bitjax eval MODEL --text ...`: running text, documents and corpora, by one model alike."""

import json
from itertools import pairwise

import numpy as np
import pytest
from texts import small_tokenizer
from tiny import tiny_model

from bitjax.cli import main
from bitjax.config import CorpusConfig
from bitjax.corpus import Corpus, build_corpus
from bitjax.evaluate import model_scorer, score_text
from bitjax.evaluate.requests import RequestScorer
from bitjax.evaluate.rolling import score_documents
from bitjax.evaluation_text import TextSettings, score_path
from bitjax.model.files import save_model
from bitjax.tokenizer import BYTES

TEXTS = [f"hello world {i} " * (1 + i % 5) for i in range(40)]


@pytest.fixture(scope="module")
def model():
    made = tiny_model(vocab_size=272, num_layers=1)
    made.tokenizer = small_tokenizer(add_bos=True)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
    """The texts in three forms, a model file, and a corpus of half of them."""
    root = tmp_path_factory.mktemp("texts")
    (root / "a.txt").write_text("##".join(TEXTS))
    (root / "a.jsonl").write_text("".join(json.dumps({"body": t}) + "\n" for t in TEXTS))
    save_model(root / "m.safetensors", model)
    config = CorpusConfig(text_field="body", valid_fraction=0.5)
    build_corpus([root / "a.jsonl"], root / "corpus", model.tokenizer, config)
    return root


def test_documents_of_every_form(folder, model):
    wanted, _ = score_documents(RequestScorer(model), model.tokenizer, TEXTS)
    for name, changes in (("a.txt", {"separator": "##"}), ("a.jsonl", {"field": "body"})):
        settings = TextSettings(str(folder / name), documents=True, **changes)
        score, label = score_path(model, settings)
        assert score == wanted
        assert label == f"{folder / name}, 40 documents"
    assert wanted.bytes == sum(map(len, TEXTS))


def test_the_held_out_part_of_a_corpus(folder, model):
    corpus = Corpus(folder / "corpus")
    starts = corpus.valid.starts.tolist()
    tokens = corpus.valid.windows(np.zeros(1, np.int64), corpus.valid.tokens)[0]
    documents = [tokens[a:b] for a, b in pairwise(starts)]
    assert all((d[0], d[-1]) == (267, 269) for d in documents)
    texts = [model.tokenizer.decode(d) for d in documents]
    assert 5 < len(texts) < 35
    assert set(texts) < set(TEXTS)
    settings = TextSettings(str(folder / "corpus"), documents=True)
    wanted, _ = score_documents(RequestScorer(model), model.tokenizer, texts)
    score, label = score_path(model, settings)
    assert label == f"{folder / 'corpus'}, valid, {len(texts)} documents"
    assert (score.tokens, score.bytes) == (wanted.tokens, wanted.bytes)
    assert score.nats_per_token == pytest.approx(wanted.nats_per_token, rel=1e-6)
    assert score.standard_error == pytest.approx(wanted.standard_error, rel=1e-5)
    running, _ = score_path(model, TextSettings(str(folder / "corpus"), window=16, stride=4))
    size = sum(map(len, texts))  # their first token stands for nothing
    assert running == score_text(model_scorer(model), tokens, 16, 4, scored_bytes=size)


def run(*arguments):
    return main(["eval", *map(str, arguments)])


def test_command_line(folder, capsys, tmp_path, monkeypatch):
    model = folder / "m.safetensors"
    monkeypatch.chdir(folder)  # a short name, which is not cut into lines
    arguments = ["--text", "a.txt", "--documents", "--separator", "\\n"]
    assert run(model, *arguments) == 0
    assert "a.txt, 1 document " in capsys.readouterr().out
    assert run(model, "--text", "corpus") == 0
    assert "corpus, valid" in capsys.readouterr().out
    bytes_, empty = tmp_path / "bytes", tmp_path / "empty"
    build_corpus([folder / "a.txt"], bytes_, BYTES, CorpusConfig(valid_fraction=0))
    build_corpus(
        [folder / "a.txt"], empty, small_tokenizer(add_bos=True), CorpusConfig(valid_fraction=0)
    )
    nothing, binary = tmp_path / "nothing.txt", tmp_path / "binary.txt"
    nothing.touch()
    binary.write_bytes(b"a\xff\0b")
    for arguments, message in (
        (["--text", bytes_], "has other tokens than the model; score its text"),
        (["--text", empty], "empty, valid holds 0 tokens; build it with --valid-fraction"),
        (["--documents", "--stride", 3], "--documents has neither"),
        (["--text", nothing], "nothing.txt is empty"),
        (["--text", nothing, "--documents"], "1 documents hold nothing to score"),
        (["--text", binary], "binary.txt is not UTF-8"),
        (["--text", binary, "--documents"], "binary.txt is not UTF-8: byte 1"),
        (["--text", folder / "none.txt", "--documents"], "none.txt: there is no such file"),
        (["--text", folder / "a.jsonl", "--documents"], "has no text in 'text'"),
    ):
        assert run(model, *arguments) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
