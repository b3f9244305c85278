"""Model files with a tokenizer."""

import json

import numpy as np
import pytest
from texts import small_tokenizer
from tiny import tiny_model

from bitjax.infer import pack_model
from bitjax.model import files
from bitjax.model.files import load_model, save_model, tensor_table
from bitjax.model.stored_tokenizer import TENSOR
from bitjax.tokenizer import BYTES

SMALL = small_tokenizer(add_bos=True, pre="gpt-2")


@pytest.fixture
def path(tmp_path):
    model = tiny_model(vocab_size=272, num_layers=1)
    model.tokenizer = SMALL
    save_model(tmp_path / "model.safetensors", pack_model(model))
    return tmp_path / "model.safetensors"


def rewritten(path, change):
    """The file with another account of its tokenizer."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    about = json.loads(header["__metadata__"]["bitjax"])
    about["tokenizer"] = change(about["tokenizer"])
    header["__metadata__"]["bitjax"] = json.dumps(about)
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + raw[8 + length :])


def test_round_trip(path):
    loaded = load_model(path).tokenizer
    assert loaded.special == SMALL.special
    assert loaded.document == SMALL.document
    assert loaded.encode("hello world").tolist() == SMALL.encode("hello world").tolist()
    # The tensor does not move the others: they lie before it, at their alignment.
    *others, last = tensor_table(path)
    assert last == (TENSOR, "U8", (len(SMALL.json.encode()),), len(SMALL.json.encode()))
    assert TENSOR not in {name for name, *_ in others}


def test_the_json_is_read_with_the_first_text(path, monkeypatch):
    model = load_model(path)
    assert (model.tokenizer.vocab_size, model.tokenizer.stop) == (272, (269,))
    monkeypatch.setattr("json.loads", lambda *_, **__: pytest.fail("read"))
    assert model.tokenizer.chat_template == SMALL.chat_template


def test_bytes_need_nothing(tmp_path):
    save_model(tmp_path / "model.safetensors", tiny_model(num_layers=1))
    assert load_model(tmp_path / "model.safetensors").tokenizer is BYTES
    assert TENSOR not in {name for name, *_ in tensor_table(tmp_path / "model.safetensors")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda about: "bytes", "holds tensors that its configuration has no place for: tokenizer"),
        (lambda about: "bpe", "unknown tokenizer 'bpe'; this version has 'bytes' and 'text'"),
        (lambda about: {}, "unknown tokenizer {}"),
        (lambda about: about | {"kind": "x"}, "unknown tokenizer"),
        (lambda about: about | {"vocab_size": 273}, "tokenizer has 273 tokens; the model has 272"),
        (lambda about: about | {"vocab_size": 0}, "tokenizer has 0 tokens"),
        (lambda about: about | {"vocab_size": "9"}, "tokenizer has '9' tokens"),
        (lambda about: about | {"stop": 3}, "settings are malformed: stop=3"),
        (lambda about: about | {"stop": [-3]}, "settings are malformed: bos="),
        (lambda about: about | {"chat_template": 3}, "settings are malformed: chat_template=3"),
        (lambda about: about | {"colour": 3}, "settings are malformed: .*'colour'"),
    ],
)
def test_malformed_settings(path, change, message):
    rewritten(path, change)
    with pytest.raises(ValueError, match=message):
        load_model(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda about: about | {"vocab_size": 271}, f"{TENSOR} has 272 tokens; 271 were announced"),
        (lambda about: about | {"stop": [272]}, r"special token 272 is not in 0\.\.271"),
    ],
)
def test_settings_that_the_json_contradicts(path, change, message):
    rewritten(path, change)
    tokenizer = load_model(path).tokenizer
    with pytest.raises(ValueError, match=message):
        tokenizer.encode("a")


@pytest.mark.parametrize("text", [None, np.zeros((2, 2), np.uint8), np.zeros(3, np.float32)])
def test_a_tensor_that_is_none(tmp_path, monkeypatch, text):
    """The file says "text", but its tensor is missing, or of another shape or type."""
    about, _ = files.stored_tokenizer(SMALL)
    monkeypatch.setattr(files, "stored_tokenizer", lambda _: (about, text))
    save_model(tmp_path / "model.safetensors", tiny_model(vocab_size=272, num_layers=1))
    with pytest.raises(ValueError, match=r"tokenizer.json is missing or not up to 67,108,864 byte"):
        load_model(tmp_path / "model.safetensors")


def test_an_unknown_kind_cannot_be_stored(tmp_path):
    model = tiny_model(num_layers=1)
    model.tokenizer = type("Other", (), {"name": "runes"})()
    with pytest.raises(ValueError, match="a model file cannot hold the tokenizer 'runes'"):
        save_model(tmp_path / "model.safetensors", model)


def test_damaged_json(path):
    raw = bytearray(path.read_bytes())
    at = raw.rindex(b'"added_tokens"')
    raw[at] = 0xFF
    path.write_bytes(raw)
    tokenizer = load_model(path).tokenizer
    with pytest.raises(ValueError, match=r"model.safetensors: tokenizer.json is not UTF-8"):
        tokenizer.encode("a")
