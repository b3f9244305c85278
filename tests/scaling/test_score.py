import dataclasses
import math

import numpy as np
import pytest
from studies import BASE, text_file
from tiny import tiny_model

from bitjax.config import DataConfig
from bitjax.evaluate import model_scorer, score_text
from bitjax.model import bit_linears
from bitjax.quant import int4_grouped
from bitjax.scaling.rounding import INT4_GROUP, rounded_model
from bitjax.scaling.score import HeldOut, held_out, score
from bitjax.train import Trainer


def held(count, ends, size=None):
    tokens = np.random.default_rng(1).integers(0, 256, count).astype(np.int32)
    return HeldOut(tokens, np.array(ends), size or count, "bytes", "d", "v", 1, 16)


@pytest.fixture(scope="module")
def model():
    return tiny_model(weights="float", activations="float")


@pytest.mark.parametrize("count", [17, 18, 600])  # a whole window, one token more, many batches
def test_the_mean_is_that_of_bitjax_eval(model, count):
    made = score(model, held(count, [count]))
    wanted = score_text(model_scorer(model), held(count, [count]).tokens, 16, stride=16)
    assert made.loss == pytest.approx(wanted.nats_per_token, rel=1e-6)
    assert made.tokens == [count - 1]
    assert made.nats[0] == pytest.approx(made.loss * (count - 1))
    assert made.bits_per_byte == pytest.approx(made.loss / math.log(2))


def test_every_document_has_its_own_tokens(model):
    """Against sums over single tokens, cut by hand."""
    text = held(200, [1, 40, 41, 130, 200], size=400)
    made = score(model, text)
    scorer, each = model_scorer(model), [0.0]
    for first in range(0, 199, 16):
        window = np.zeros((1, 17), np.int32)
        part = text.tokens[first : first + 17]
        window[0, : len(part)] = part
        each += scorer(window)[0][: len(part) - 1].tolist()
    assert made.tokens == [0, 39, 1, 89, 70]
    sums = [sum(each[a:b]) for a, b in ((0, 1), (1, 40), (40, 41), (41, 130), (130, 200))]
    assert made.nats == pytest.approx(sums, rel=1e-5)
    mean = sum(sums) / 199
    squares = sum((s - mean * n) ** 2 for s, n in zip(sums, made.tokens, strict=True))
    assert made.error == pytest.approx(math.sqrt(squares * 5 / 4) / 199, rel=1e-4)
    assert made.bits_per_byte == pytest.approx(mean / math.log(2) / 2, rel=1e-5)


def test_identity_follows_text_and_windows(tmp_path):
    config = dataclasses.replace(BASE, data=DataConfig(text=text_file(tmp_path)))
    found = held_out(config)
    assert (len(found.tokens), found.bytes, found.train_tokens) == (222, 222, 2000)
    assert found.ends.tolist() == [*range(8, 221, 8), 222]  # windows: there is one document
    longer = dataclasses.replace(
        config, train=dataclasses.replace(config.train, seq_len=4)
    )  # fmt: skip
    assert held_out(longer).identity != found.identity
    assert held_out(longer).data == found.data
    (tmp_path / "text.txt").write_bytes((tmp_path / "text.txt").read_bytes()[:-1] + b"!")
    assert held_out(config).identity != found.identity
    (tmp_path / "text.txt").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"holds out 0 tokens; windows of 8 need 9"):
        held_out(config)
    mixed = dataclasses.replace(config, data=DataConfig(mixture=("a=1",)))
    with pytest.raises(ValueError, match=r"a study is of one corpus; data.mixture names several"):
        held_out(mixed)


def test_a_corpus_is_scored_by_its_documents(tmp_path):
    from bitjax.config import CorpusConfig
    from bitjax.corpus import build_corpus
    from bitjax.tokenizer import BYTES

    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"document {i} of some" + " words" * (i % 5) for i in range(99)))
    settings = CorpusConfig(separator="\n\n", valid_fraction=0.4)
    build_corpus([path], tmp_path / "corpus", BYTES, settings, 1)
    config = dataclasses.replace(BASE, data=DataConfig(text=str(tmp_path / "corpus")))
    found = held_out(config)
    assert len(found.ends) > 20
    starts = [0, *found.ends[:-1]]
    assert all(bytes(found.tokens[s : s + 9].astype(np.uint8)) == b"document " for s in starts)
    assert found.ends[-1] == len(found.tokens) == found.bytes


FLOAT = dataclasses.replace(BASE, model=BASE.model.full_precision_twin())


@pytest.fixture(scope="module")
def floats():
    """Parameters of a float run, and its linear layers' weights by name."""
    trainer = Trainer(FLOAT)
    params = trainer.init().params
    return params, weights(trainer.model(params))


def weights(model):
    return {name: np.array(layer.weight[...]) for name, layer in bit_linears(model)}


def test_weights_of_8_bits(floats):
    params, before = floats
    for name, q in weights(rounded_model(FLOAT, params, "int8")).items():
        step = np.abs(before[name]).max(axis=1, keepdims=True) / np.float32(127)
        np.testing.assert_allclose(q, np.rint(before[name] / step) * step, rtol=1e-6)
        assert not np.array_equal(q, before[name])
    after = weights(Trainer(FLOAT).model(params))
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_weights_of_4_bits(floats):
    params, before = floats
    for name, q in weights(rounded_model(FLOAT, params, "int4")).items():
        codes, multipliers, scales = int4_grouped(before[name], INT4_GROUP)
        for (row, col), value in np.ndenumerate(q):
            step = float(multipliers[row, col // INT4_GROUP]) * float(scales[row])
            assert value == pytest.approx(codes[row, col] * step, rel=1e-6)
        assert 0.03 < np.std(q - before[name]) / np.std(before[name]) < 0.12


def test_a_rounded_ternary_model_is_a_ternary_run_with_these_weights(floats):
    params, before = floats
    made = rounded_model(FLOAT, params, "ternary")
    assert made.config == BASE.model
    assert {layer.weights for _, layer in bit_linears(made)} == {"ternary"}
    assert all(np.array_equal(w, before[name]) for name, w in weights(made).items())
