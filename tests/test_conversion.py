"""`bitjax convert` between all formats, and loading of each; what cannot be is said in advance."""

import dataclasses
import json
import os

import numpy as np
import pytest
from tiny import tiny_config, tiny_model

from bitjax.api import load
from bitjax.cli import main
from bitjax.interop.checkpoint import Ternary
from bitjax.interop.formats import format_of, open_checkpoint
from bitjax.interop.huggingface import write_huggingface
from bitjax.interop.model_file import build_model, checkpoint_of
from bitjax.model.files import save_model

# Rows of 256, as TQ2_0 needs them, and heads of hidden_size / num_heads.
SHAPE = {
    "num_layers": 1, "hidden_size": 256, "intermediate_size": 256, "num_heads": 4,
    "num_kv_heads": 2, "head_dim": 64, "activation": "silu", "sub_norm": False,
    "init_std": 0.05,
}  # fmt: skip
TOKENS = np.arange(65, 74, dtype=np.int32)[None]
TARGETS = ["bitjax", "hf", "hf-bf16", "gguf-tq2_0", "gguf-tq1_0", "gguf-i2_s", "gguf-f16"]


def run(*arguments):
    return main([str(a) for a in arguments])


def fails(capsys, message, *arguments):
    assert run(*arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("bitjax: ")
    assert error.count("\n") == 1
    assert message in error


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "float.safetensors"
    save_model(path, tiny_model(**SHAPE))
    return path


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "full.safetensors"
    save_model(path, tiny_model(**SHAPE, weights="float", activations="float"))
    return path


def matrices(source):
    checkpoint = open_checkpoint(source)
    names = [f"blocks.0.{n}" for n in ("attention.q", "attention.k", "attention.o", "ffn.down")]
    return {name: checkpoint.read(name) for name in names}


@pytest.mark.parametrize("target", TARGETS)
def test_there_and_back(trained, tmp_path, target, capsys):
    """Codes survive every format (but rounding of master weights), and text comes out of each."""
    there, back = tmp_path / "there", tmp_path / "back.safetensors"
    assert run("convert", trained, "-o", there, "--to", target) == 0
    assert f"{there}: " in capsys.readouterr().out
    assert format_of(there) == {"b": "bitjax", "h": "huggingface", "g": "gguf"}[target[0]]
    assert run("convert", there, "-o", back, "--bits", "1.6") == 0
    wanted = matrices(tmp_path / "back.safetensors") if target == "bitjax" else None
    for name, value in matrices(back).items():
        assert isinstance(value, Ternary)
        reference = wanted[name] if wanted else quantised(trained, name)
        different = (value.codes != reference.codes).mean()
        assert different <= (0.01 if target == "hf-bf16" else 0)
        np.testing.assert_allclose(value.scale, reference.scale, rtol=2e-3)
    tokens = [np.asarray(load(source)(TOKENS)) for source in (there, back)]
    # Read directly or from the model file made of it, the same model; packed layers to the bit.
    np.testing.assert_allclose(*tokens, atol=1e-4)
    assert run("generate", there, "--prompt", "ab", "--max-new-tokens", 2) == 0
    assert "2 tokens" in capsys.readouterr().out


def quantised(path, name):
    return matrices_of_model(load(path), name)


def matrices_of_model(model, name):
    from bitjax.infer import pack_model

    return checkpoint_of(pack_model(model)).read(name)


def test_suffix_and_kind_choose_the_format(trained, full, tmp_path):
    for source, kind in ((trained, "TQ2_0"), (full, "F16")):
        path = tmp_path / f"{kind}.gguf"
        assert run("convert", source, "-o", path) == 0
        assert path.read_bytes()[:4] == b"GGUF"
        from bitjax.interop.gguf.container import open_container

        stored = open_container(path).tensors["blk.0.ffn_down.weight"]
        assert stored.type.name == kind
    assert run("convert", trained, "-o", tmp_path / "model") == 0
    assert format_of(tmp_path / "model") == "bitjax"


def test_quantisation_after_training(full, tmp_path, capsys):
    fails(capsys, "has float weights, which are not packed: give --float to keep them, or "
          "--quantize ternary", "convert", full, "-o", tmp_path / "m")  # fmt: skip
    assert run("convert", full, "-o", tmp_path / "m", "--quantize", "ternary") == 0
    got, original = load(tmp_path / "m"), load(full)
    assert (got.config.weights, got.config.activations) == ("ternary", "int8")
    assert dataclasses.replace(got.config, weights="float", activations="float") == original.config
    layer = original.blocks[0].ffn.down
    layer.weights, layer.activations = "ternary", "int8"
    x = np.random.default_rng(0).normal(size=(3, 256)).astype(np.float32)
    np.testing.assert_array_equal(got.blocks[0].ffn.down(x), layer(x))
    fails(capsys, "has ternary weights already", "convert", tmp_path / "m", "-o", tmp_path / "n",
          "--quantize", "ternary")  # fmt: skip
    assert run("convert", full, "-o", tmp_path / "f", "--float", "--tables", "bfloat16") == 0
    assert str(load(tmp_path / "f").blocks[0].ffn.down.weight[...].dtype) == "bfloat16"


def test_int8_activations_on_demand(tmp_path):
    save_model(tmp_path / "m", tiny_model(num_layers=1, activations="float"))
    for options, wanted in ((), "float"), (("--activations", "int8"), "int8"):
        path = tmp_path / wanted
        assert run("convert", tmp_path / "m", "-o", path, *options) == 0
        assert load(path).config == tiny_config(num_layers=1, activations=wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--to", "hf", "--bits", "1.6"), "--bits 1.6 is for model files of bitjax; hf has no"),
        (("--to", "hf", "--columns"), "--columns is for model files"),
        (("--to", "gguf-i2_s", "--layer-bits", "*.down=2"), "--layer-bits is for model files"),
        (("--to", "hf-bf16", "--float"), "--float is for model files"),
        (("--to", "hf", "--tables", "int4"), "--tables int4 is not a form of Hugging Face folders"),
        (("--to", "gguf-f16", "--tables", "screened"), "--tables screened is not a form of GGUF"),
        (("--i2s-group", "64"), "is no GGUF file, so it has no groups of I2_S"),
        (("--columns",), "columns skip activations that are zero"),
    ],
)
def test_options_that_contradict(trained, tmp_path, capsys, options, message):
    fails(capsys, message, "convert", trained, "-o", tmp_path / "m", *options)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("target", ["bitjax", "hf", "gguf-tq2_0"])
def test_nothing_is_replaced_unless_told(trained, tmp_path, capsys, target):
    path = tmp_path / "m"
    assert run("convert", trained, "-o", path, "--to", target) == 0
    fails(capsys, "exists; choose another name", "convert", trained, "-o", path, "--to", target)
    assert run("convert", trained, "-o", path, "--to", target, "--overwrite") == 0


@pytest.mark.filterwarnings("default")
def test_a_model_without_tokenizer_says_so(tmp_path, capsys):
    """And generates from bytes, which is all that can be done."""
    checkpoint = dataclasses.replace(checkpoint_of(tiny_model(**SHAPE)), tokenizer=None)
    write_huggingface(tmp_path / "hf", checkpoint)
    assert open_checkpoint(tmp_path / "hf").tokenizer is None
    assert run("convert", tmp_path / "hf", "-o", tmp_path / "m") == 0
    assert "has no tokenizer" in capsys.readouterr().err
    assert build_model(open_checkpoint(tmp_path / "hf")).tokenizer.name == "bytes"


def test_what_cannot_be_read(tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    fails(capsys, "is neither a run", "inspect", tmp_path / "folder")
    for name, start in {"a.bin": b"\x80\x02}q\x00.", "b.pt": b"PK\x03\x04data.pkl"}.items():
        (tmp_path / name).write_bytes(start)
        fails(capsys, "a Python pickle", "inspect", tmp_path / name)
    (tmp_path / "empty").touch()
    fails(capsys, "empty is empty", "inspect", tmp_path / "empty")
    fails(capsys, "the name of the model is empty", "inspect", "")
    (tmp_path / "no.gguf").write_bytes(b"<html>")
    fails(capsys, "no.gguf is not a GGUF file", "inspect", tmp_path / "no.gguf")
    (tmp_path / "short").write_bytes(b"GG")
    fails(capsys, "is not a safetensors file", "inspect", tmp_path / "short")
    (tmp_path / "folder" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    fails(capsys, "config.json", "inspect", tmp_path / "folder")
    os.mkfifo(tmp_path / "pipe")
    fails(capsys, "is no file", "inspect", tmp_path / "pipe")
    fails(capsys, "does not exist; give a model file", "inspect", tmp_path / "no" / "where" / "x")
