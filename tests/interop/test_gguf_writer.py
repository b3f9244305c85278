"""Checkpoints as GGUF files: read back equal, and what a file cannot express refused first."""

import dataclasses

import numpy as np
import pytest
from tiny import tiny_config, tiny_model

from bitjax.config import RopeScaling
from bitjax.interop.checkpoint import Checkpoint, Ternary, tensor_shapes
from bitjax.interop.gguf import check_gguf, gguf_notes, read_gguf, write_gguf
from bitjax.interop.gguf.architecture import matrix_names, rope_factors
from bitjax.interop.gguf.container import open_container
from bitjax.interop.model_file import checkpoint_of
from bitjax.quant import ternary
from bitjax.tokenizer import ByteTokenizer

rng = np.random.default_rng(2)
# Rows of 256, for TQ1_0 and TQ2_0; heads of 64.
WIDE = {
    "hidden_size": 256, "intermediate_size": 256, "num_layers": 1, "num_heads": 4,
    "num_kv_heads": 2, "head_dim": 64, "activation": "silu",
}  # fmt: skip
LLAMA = {"activation": "silu", "sub_norm": False}


def written(tmp_path, checkpoint, kind, **arguments):
    path = tmp_path / "file.gguf"
    write_gguf(path, checkpoint, kind, **arguments)
    return read_gguf(path)


def random_checkpoint(config, scale=None):
    """Random tensors; with a scale, matrices are ternary."""
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        tensors[name] = rng.normal(0, 0.25, shape).astype(np.float32)
    for name in matrix_names(config) if scale is not None else ():
        rows, _ = tensors[name].shape
        codes = rng.integers(-1, 2, tensors[name].shape, np.int8)
        scales = np.asarray(scale(rows) if callable(scale) else scale, np.float32)
        tensors[name] = Ternary(codes, scales)
    return Checkpoint("random", config, tensors.__getitem__)


def assert_equal(found, wanted, *, tables=np.float16):
    """Ternary matrices and vectors to the bit; embedding and head as they were rounded."""
    assert found.config == wanted.config
    for name in tensor_shapes(wanted.config):
        ours, true = found.read(name), wanted.read(name)
        if isinstance(true, Ternary):
            np.testing.assert_array_equal(ours.codes, true.codes)
            np.testing.assert_array_equal(ours.scale, true.scale)
        elif name in ("embedding", "head"):
            np.testing.assert_array_equal(ours.astype(np.float32), true.astype(tables))
        else:
            np.testing.assert_array_equal(ours, true)


@pytest.mark.parametrize("kind", ["TQ2_0", "TQ1_0", "I2_S", "F16", "F32"])
@pytest.mark.parametrize(
    "shape",
    [
        {"activation": "silu"},
        {"activation": "relu2"},
        LLAMA | {"tie_embeddings": False, "rope_scaling": RopeScaling("linear", 2.0)},
    ],
    ids=["bitnet", "bitnet-b1.58", "llama"],
)
def test_ternary_models_come_back(tmp_path, kind, shape):
    config = tiny_config(**(WIDE | shape))
    scale = 0.25 if shape["activation"] != "silu" or not config.sub_norm else 0.1234567
    if kind == "I2_S":
        scale = 0.1234567  # float32 there; float16 elsewhere but in the architecture bitnet
    checkpoint = random_checkpoint(config, scale)
    back = written(tmp_path, checkpoint, kind)
    assert_equal(back, checkpoint, tables=np.float32 if kind == "F32" else np.float16)
    types = {e.type.name for n, e in open_container(tmp_path / "file.gguf").tensors.items()
             if "attn_q.weight" in n}  # fmt: skip
    assert types == {kind}


@pytest.mark.parametrize("kind", ["TQ2_0", "TQ1_0", "F16"])
def test_scales_of_rows_come_back(tmp_path, kind):
    config = tiny_config(**(WIDE | LLAMA))
    checkpoint = random_checkpoint(config, lambda rows: np.arange(rows) / 1024)
    back = written(tmp_path, checkpoint, kind)
    name = "blocks.0.attention.q"
    np.testing.assert_array_equal(back.read(name).scale, checkpoint.read(name).scale)
    assert_equal(back, random_like(checkpoint))


def random_like(checkpoint):
    """Row 0 has the scale 0: its codes do not come back."""

    def read(name):
        value = checkpoint.read(name)
        if not isinstance(value, Ternary):
            return value
        return Ternary(np.where(value.scale[:, None] == 0, 0, value.codes), value.scale)

    return dataclasses.replace(checkpoint, read=read)


def test_master_weights_are_quantised_as_in_training(tmp_path):
    model = tiny_model(**WIDE)
    checkpoint = checkpoint_of(model)
    back = written(tmp_path, checkpoint, "TQ2_0")
    for name in matrix_names(model.config):
        expected = ternary(checkpoint.read(name))
        np.testing.assert_array_equal(back.read(name).codes, expected.codes)
        assert back.read(name).scale == expected.scale


def test_float_models_and_layers(tmp_path):
    config = tiny_config(**LLAMA, weights="float", activations="float")
    checkpoint = random_checkpoint(config)
    assert_equal(written(tmp_path, checkpoint, "F32"), checkpoint, tables=np.float32)
    half = written(tmp_path, checkpoint, "F16", overwrite=True)
    name = "blocks.1.attention.k"
    np.testing.assert_array_equal(half.read(name), checkpoint.read(name).astype(np.float16))
    mixed = tiny_config(**(WIDE | LLAMA), float_layers=("*.down",))
    ternary_too = random_checkpoint(mixed, 0.5)
    plain = rng.normal(0, 1, (256, 256)).astype(np.float16)

    def read(name):
        return plain if name.endswith("down") else ternary_too.read(name)

    checkpoint = dataclasses.replace(ternary_too, read=read)
    assert_equal(written(tmp_path, checkpoint, "TQ2_0", overwrite=True), checkpoint)


@pytest.mark.parametrize("tables", ["F32", "BF16", "Q8_0"])
def test_forms_of_tables(tmp_path, tables):
    checkpoint = random_checkpoint(tiny_config(**WIDE), 0.5)
    back = written(tmp_path, checkpoint, "TQ2_0", tables=tables)
    true = checkpoint.read("embedding")
    error = np.abs(back.read("embedding").astype(np.float32) - true)
    # None; half a unit in the last of 8 bits; half a step of absmax / 127, itself in float16.
    largest = np.abs(true).max()
    bounds = {"F32": 0, "BF16": np.abs(true) * 2.0**-8, "Q8_0": largest * (1 / 254 + 2.0**-11)}
    bound = bounds[tables]
    assert (error <= bound).all()


def test_llama3_factors_come_back(tmp_path):
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    config = tiny_config(**(WIDE | LLAMA), rope_scaling=scaling, rope_theta=5e5)
    checkpoint = random_checkpoint(config, 0.5)
    assert written(tmp_path, checkpoint, "TQ2_0").config == config
    assert 1 < rope_factors(config)[20:].max() == 8


def test_tokenizer(tmp_path):
    checkpoint = random_checkpoint(tiny_config(**WIDE | {"vocab_size": 260}), 0.5)
    checkpoint = dataclasses.replace(checkpoint, tokenizer=ByteTokenizer())
    back = written(tmp_path, checkpoint, "TQ2_0")
    text = "größer\n"
    np.testing.assert_array_equal(back.tokenizer.encode(text), ByteTokenizer().encode(text))
    about = open_container(tmp_path / "file.gguf").metadata
    padding = [f"[PAD{i}]" for i in range(256, 260)]
    assert about["tokenizer.ggml.tokens"][255:] == ["ÿ", *padding]
    assert about["tokenizer.ggml.token_type"].tolist()[-4:] == [5] * 4
    small = dataclasses.replace(
        random_checkpoint(tiny_config(**WIDE | {"vocab_size": 100}), 0.5),
        tokenizer=ByteTokenizer(),
    )
    with pytest.raises(ValueError, match="the tokenizer has 256 tokens, the embedding 100 rows"):
        written(tmp_path, small, "TQ2_0", overwrite=True)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({}, "Q4_0", "kind='Q4_0' is not one of F32, F16, TQ1_0, TQ2_0, I2_S"),
        ({"head_dim": 8}, "TQ2_0", "rows of 32. F16 can hold it"),
        (WIDE | {"intermediate_size": 384}, "TQ1_0", "rows of 384. I2_S or F16 can hold it"),
        (WIDE | {"intermediate_size": 320}, "I2_S", "multiple of 128 values; blocks.0.ffn.down"),
        ({"inner_norm": True}, "F16", "has a norm inside every linear layer"),
        ({"linear_norm_eps": 1e-6}, "F16", "has a norm inside every linear layer"),
        ({"sub_norm": False}, "F16", r"ReLU\^2 without sub-norms"),
        ({"tie_embeddings": False}, "F16", "takes the embedding as head; this model has a head"),
        ({"head_dim": 10}, "F16", "4 heads of 10 and hidden_size=32"),
        (
            {"activation": "silu", "head_dim": 8, "rope_scaling": RopeScaling("llama3", 8.0)},
            "F16", "GGUF's bitnet architecture has no factors for rotary frequencies",
        ),
        (WIDE | {"weights": "float", "activations": "float"}, "I2_S", "this one has float weights"),
    ],
)  # fmt: skip
def test_what_a_file_cannot_express(tmp_path, changes, kind, message):
    config = tiny_config(**changes)
    for call in (
        lambda: check_gguf(config, kind), lambda: gguf_notes(config, kind),
        lambda: write_gguf(tmp_path / "file", Checkpoint("x", config, None), kind),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
    assert list(tmp_path.iterdir()) == []


def test_notes():
    def notes(kind, **changes):
        return " ".join(gguf_notes(tiny_config(**(WIDE | changes)), kind))

    assert "llama.cpp cannot, its bitnet graph has no ReLU^2" in notes("TQ2_0", activation="relu2")
    assert "llama.cpp cannot, it has no I2_S" in notes("I2_S")
    assert "quantise the activations of TQ2_0" in notes("TQ2_0", activations="float")
    assert "a scale for every 256 values" in notes("TQ2_0")
    assert "do not quantise the activations of F16" in notes("F16")
    assert notes("F16", weights="float", activations="float") == ""


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        (
            {"weight_scale": "group", "weight_group": 64},
            r"weight_scale='group' \(weight_group=64\)",
        ),
        ({"activations": "int4"}, "activations='int4'"),
        ({"hadamard": True}, "hadamard=true"),
    ],
)
@pytest.mark.parametrize("kind", ["TQ2_0", "I2_S", "F16"])
def test_quantisers_of_training_alone(tmp_path, changes, setting, kind):
    """Refused before a weight is read."""
    config = tiny_config(**WIDE | changes)
    checkpoint = dataclasses.replace(random_checkpoint(tiny_config(**WIDE), 0.5), config=config)
    checkpoint = dataclasses.replace(checkpoint, read=None)
    with pytest.raises(ValueError, match=f"^GGUF cannot express this model's {setting}$"):
        write_gguf(tmp_path / "file", checkpoint, kind)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_do_not_fit(tmp_path):
    def refused(name, value, message, kind="TQ2_0", **changes):
        config = tiny_config(**(WIDE | changes))
        good = random_checkpoint(config, 0.5)
        bad = dataclasses.replace(good, read=lambda n: value if n == name else good.read(n))
        with pytest.raises(ValueError, match=message):
            write_gguf(tmp_path / "file", bad, kind)
        assert list(tmp_path.iterdir()) == []

    gate, codes = "blocks.0.ffn.gate", np.ones((256, 256), np.int8)
    rows = np.linspace(0.1, 1, 256, dtype=np.float32)
    tiny, nan = np.float32(1e-9), np.full((256, 256), np.nan, np.float32)
    refused("embedding", np.full((256, 256), 1e5, np.float32), "holds 100000, beyond float16's")
    refused(gate, nan, "random: blocks.0.ffn.gate holds 65536 values that are not finite")
    refused("norm", nan[0], "random: norm holds 256 values that are not finite")
    refused(gate, Ternary(codes, np.float32(np.inf)), "ffn.gate's scale holds 1 values")
    refused(gate, Ternary(codes, rows), "has a scale for every row; TQ2_0 in GGUF's bitnet")
    refused(gate, Ternary(codes, rows), "has a scale for every row; I2_S", "I2_S", **LLAMA)
    refused(gate, Ternary(codes, tiny), "scale of 1e-09, which float16 rounds to 0", **LLAMA)
    refused(gate, Ternary(codes, np.float32(1e6)), "beyond float16's 65504", **LLAMA)


def test_tables_are_checked_first(tmp_path):
    checkpoint = random_checkpoint(tiny_config(head_dim=8), 0.5)
    with pytest.raises(ValueError, match="tables='Q6_K' is not one of F32, F16, BF16, Q8_0"):
        write_gguf(tmp_path / "file", checkpoint, "F16", tables="Q6_K")
    odd = random_checkpoint(tiny_config(hidden_size=24, head_dim=6), 0.5)
    with pytest.raises(ValueError, match="Q8_0 needs rows of a multiple of 32 values, not 24"):
        write_gguf(tmp_path / "file", odd, "F16", tables="Q8_0")
