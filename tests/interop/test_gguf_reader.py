"""GGUF files as checkpoints: shapes, number formats, order of rows, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest
from gguf_files import (
    ARRAY,
    BOOL,
    F32,
    STRING,
    U32,
    entry,
    model_file,
    model_shapes,
    model_tensors,
)  # fmt: skip

from bitjax.config import ModelConfig, RopeScaling, to_json
from bitjax.interop.checkpoint import Ternary, tensor_shapes
from bitjax.interop.gguf import blocks, read_gguf
from bitjax.interop.gguf.blocks import BY_NAME

rng = np.random.default_rng(1)
PARTS = {
    "attention_norm": "attn_norm", "attention.q": "attn_q", "attention.k": "attn_k",
    "attention.v": "attn_v", "attention.sub_norm": "attn_sub_norm",
    "attention.o": "attn_output", "ffn_norm": "ffn_norm", "ffn.gate": "ffn_gate",
    "ffn.up": "ffn_up", "ffn.sub_norm": "ffn_sub_norm", "ffn.down": "ffn_down",
}  # fmt: skip


def read(tmp_path, raw, **arguments):
    path = tmp_path / "file.gguf"
    path.write_bytes(raw)
    return read_gguf(path, **arguments)


def refused(tmp_path, raw, message):
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path, raw)
    assert "file.gguf" in str(caught.value)


def name_there(name):
    block, _, part = name.removeprefix("blocks.").partition(".")
    whole = {"embedding": "token_embd", "norm": "output_norm", "head": "output"}
    return f"{whole[name]}.weight" if name in whole else f"blk.{block}.{PARTS[part]}.weight"


def permuted(rows, heads):
    """As llama.cpp's converter does it for the architecture llama (conversion/llama.py)."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def test_every_tensor_of_a_llama_file(tmp_path):
    true = model_tensors(head=True)
    stored = {
        name: permuted(values, 2 if "attn_q" in name else 1)
        if name.endswith(("attn_q.weight", "attn_k.weight")) else values
        for name, values in true.items()
    }  # fmt: skip
    checkpoint = read(tmp_path, model_file(tensors=stored))
    config = checkpoint.config
    assert config == ModelConfig(
        vocab_size=5, hidden_size=8, intermediate_size=12, num_layers=2, num_heads=2,
        num_kv_heads=1, head_dim=4, max_seq_len=16, activation="silu", sub_norm=False,
        tie_embeddings=False, weights="float", activations="float",
    )  # fmt: skip
    assert checkpoint.tokenizer is None
    assert len(tensor_shapes(config)) == len(true)
    for name in tensor_shapes(config):
        np.testing.assert_array_equal(checkpoint.read(name), true[name_there(name)])
    with pytest.raises(ValueError, match=r"file.gguf has no tensor 'blocks.2.ffn_norm'"):
        checkpoint.read("blocks.2.ffn_norm")


@pytest.mark.parametrize(
    ("architecture", "activation"),
    [("bitnet", "silu"), ("bitnet-b1.58", "relu2"), ("bitnet-25", "relu2"),
     ("bitnet2b_2501", "relu2")],
)  # fmt: skip
def test_bitnet_files_are_not_permuted(tmp_path, architecture, activation):
    true = model_tensors(architecture)
    checkpoint = read(tmp_path, model_file(architecture, tensors=true))
    assert checkpoint.config.activation == activation
    assert checkpoint.config.sub_norm
    assert checkpoint.config.tie_embeddings
    # Float matrices of a BitNet are master weights.
    assert (checkpoint.config.weights, checkpoint.config.activations) == ("ternary", "int8")
    for name in tensor_shapes(checkpoint.config):
        np.testing.assert_array_equal(checkpoint.read(name), true[name_there(name)])


def test_settings(tmp_path):
    sizes = {"D": 8, "H": 12, "G": 6}
    raw = model_file(
        tensors=model_tensors(**sizes),
        **{
            "attention.key_length": 6, "attention.value_length": 6, "rope.dimension_count": 6,
            "rope.freq_base": 5e5, "rope.scaling.type": "linear", "rope.scaling.factor": 4.0,
            "attention.layer_norm_rms_epsilon": 1e-6, "attention.head_count_kv": (U32, [1, 1]),
        },
    )  # fmt: skip
    config = read(tmp_path, raw).config
    assert (config.head_dim, config.rope_theta, config.norm_eps) == (6, 5e5, 1e-6)
    assert config.rope_scaling == RopeScaling("linear", 4.0)
    for neutral in ({"rope.scaling.factor": 1.0}, {"rope.scaling.type": "none"}):
        assert read(tmp_path, model_file(**neutral)).config.rope_scaling == RopeScaling()


def llama3_factors(h, theta, factor, context):
    """As llama.cpp's converter (conversion/llama.py, generate_extra_tensors)."""
    factors = []
    for i in range(h // 2):
        wavelength = 2 * np.pi * theta ** (2 * i / h)
        if wavelength < context / 4:
            factors.append(1)
        elif wavelength > context / 1:
            factors.append(factor)
        else:
            smooth = (context / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def test_llama3_factors(tmp_path):
    D, h, theta = 64, 32, 10_000.0
    tensors = model_tensors(D=D, H=64, G=32)

    def config(factors, **changes):
        held = tensors | {"rope_freqs.weight": np.asarray(factors, np.float32)}
        values = {"embedding_length": D, "rope.freq_base": theta} | changes
        return read(tmp_path, model_file(tensors=held, **values)).config

    for factor, context in ((8.0, 8192), (32.0, 8192)):
        factors = llama3_factors(h, theta, factor, context)
        assert ((factors > 1) & (factors < factor)).sum() > 0
        assert config(factors).rope_scaling == RopeScaling("llama3", factor, 1.0, 4.0, context)
    factors = llama3_factors(h, theta, 4.0, 512)
    stated = config(factors, **{"rope.scaling.original_context_length": 512}).rope_scaling
    assert stated == RopeScaling("llama3", 4.0, 1.0, 4.0, 512)
    assert config(factors, context_length=2048).rope_scaling == stated
    assert config(np.ones(16)).rope_scaling == RopeScaling()
    for wrong in (factors, factors[::-1], np.full(16, np.nan), np.zeros(16)):
        with pytest.raises(ValueError, match=r"rope_freqs.weight are not Llama 3's factors"):
            config(wrong)
    with pytest.raises(ValueError, match="beside linear rotary scaling"):
        config(factors, **{"rope.scaling.factor": 2.0})


# A model of rows of 256, for the ternary types: heads of 128 dimensions.
WIDE = {"D": 256, "F": 256, "H": 256, "G": 128}
WIDE_SETTINGS = {"embedding_length": 256, "feed_forward_length": 256}


def encoded(name, codes, scale):
    """(type number, bytes) of codes in a ternary type; blocks may have scales of their own."""
    kind = BY_NAME[name]
    if name == "I2_S":
        return kind.number, blocks.encode_i2s(codes, scale).tobytes()
    scales = np.broadcast_to(np.asarray(scale, np.float16), (len(codes), codes.shape[1] // 256))
    return kind.number, blocks.encode_blockwise(kind, codes, scales).tobytes()


def ternary_parts(kind, scale=0.25, architecture="bitnet-b1.58", sizes=WIDE):
    """Codes of a model's matrices by name, and the matrices as they are stored."""
    codes = {
        name: rng.integers(-1, 2, shape, np.int8)
        for name, shape in model_shapes(architecture, **sizes).items()
        if len(shape) == 2 and name.startswith("blk")
    }
    return codes, {name: encoded(kind, values, scale) for name, values in codes.items()}


@pytest.mark.parametrize("kind", blocks.TERNARY)
def test_ternary_types(tmp_path, kind):
    codes, stored = ternary_parts(kind)
    tensors = model_tensors("bitnet-b1.58", **WIDE)
    tensors["blk.0.attn_q.scale"] = np.array([3.0], np.float32)
    raw = model_file("bitnet-b1.58", tensors=tensors, stored=stored, **WIDE_SETTINGS)
    checkpoint = read(tmp_path, raw, i2s_group=128)
    assert (checkpoint.config.weights, checkpoint.config.activations) == ("ternary", "int8")
    for name in tensor_shapes(checkpoint.config):
        value = checkpoint.read(name)
        if name_there(name) not in codes:
            np.testing.assert_array_equal(value, tensors[name_there(name)])
            continue
        assert isinstance(value, Ternary)
        assert value.scale.shape == ()
        assert value.scale == (0.75 if name == "blocks.0.attention.q" else 0.25)
        np.testing.assert_array_equal(value.codes, codes[name_there(name)])


def test_rows_of_q_and_k_keep_their_scales(tmp_path):
    codes, stored = ternary_parts("TQ2_0", architecture="llama")
    scales = np.arange(256, dtype=np.float32)[:, None]
    for part, heads in (("q", 2), ("k", 1)):
        for i in range(2):
            name = f"blk.{i}.attn_{part}.weight"
            order = scales[: heads * 128]
            stored[name] = encoded("TQ2_0", permuted(codes[name], heads), permuted(order, heads))
    raw = model_file(tensors=model_tensors(**WIDE), stored=stored, **WIDE_SETTINGS)
    checkpoint = read(tmp_path, raw)
    for part, heads in (("q", 2), ("k", 1)):
        value = checkpoint.read(f"blocks.1.attention.{part}")
        expected = scales[: heads * 128]
        np.testing.assert_array_equal(value.scale, expected[:, 0])
        true = codes[f"blk.1.attn_{part}.weight"] * (expected != 0)
        np.testing.assert_array_equal(value.codes, true)


def test_scales_of_blocks(tmp_path):
    """One scale in a row is ternary whatever its sign; a file whose rows have several is float."""
    sizes = WIDE | {"D": 512}
    settings = WIDE_SETTINGS | {
        "embedding_length": 512,
        "attention.key_length": 128,
        "attention.value_length": 128,
        "rope.dimension_count": 128,
    }
    codes, stored = ternary_parts("TQ1_0", architecture="llama", sizes=sizes)
    tensors = model_tensors(**sizes)

    def checkpoint(name, scale):
        changed = stored | {name: encoded("TQ1_0", codes[name], scale)}
        return read(tmp_path, model_file(tensors=tensors, stored=changed, **settings))

    name, gate = "blk.0.ffn_gate.weight", codes["blk.0.ffn_gate.weight"]
    value = checkpoint(name, -0.5).read("blocks.0.ffn.gate")
    assert value.scale == 0.5
    np.testing.assert_array_equal(value.codes, -gate)
    value = checkpoint(name, [0.0, 0.5]).read("blocks.0.ffn.gate")
    assert value.scale == 0.5
    np.testing.assert_array_equal(value.codes, np.where(np.arange(512) < 256, 0, gate))
    for scale in (0.0, [0.0, 0.0]):
        value = checkpoint(name, scale).read("blocks.0.ffn.gate")
        assert value.scale == 0
        assert not value.codes.any()
    mixed = checkpoint(name, [0.25, 0.5])
    assert (mixed.config.weights, mixed.config.activations) == ("float", "float")
    expected = gate * np.where(np.arange(512) < 256, 0.25, 0.5).astype(np.float32)
    np.testing.assert_array_equal(mixed.read("blocks.0.ffn.gate"), expected)
    later = checkpoint("blk.1.ffn_gate.weight", [0.25, 0.5])
    with pytest.raises(ValueError, match=r"file.gguf: tensor 'blk.1.ffn_gate.weight' is in TQ1_0"):
        later.read("blocks.1.ffn.gate")
    for scale in (np.inf, np.nan):
        endless = checkpoint("blk.1.ffn_gate.weight", scale)
        with pytest.raises(ValueError, match=r"'blk.1.ffn_gate.weight' (is in|has a scale that)"):
            endless.read("blocks.1.ffn.gate")


@pytest.mark.parametrize("kind", ["TQ2_0", "I2_S"])
def test_the_fourth_code_is_refused(tmp_path, kind):
    _, stored = ternary_parts(kind)
    number, raw = stored["blk.1.ffn_up.weight"]
    stored["blk.1.ffn_up.weight"] = number, b"\xff" + raw[1:]
    raw = model_file(
        "bitnet-b1.58", tensors=model_tensors("bitnet-b1.58", **WIDE), stored=stored,
        **WIDE_SETTINGS,
    )  # fmt: skip
    checkpoint = read(tmp_path, raw, i2s_group=128)
    with pytest.raises(ValueError, match=r"'blk.1.ffn_up.weight' holds the code 3"):
        checkpoint.read("blocks.1.ffn.up")


@pytest.mark.parametrize("architecture", ["llama", "bitnet"])
@pytest.mark.parametrize("per_row", [False, True])
def test_float_matrices_of_ternary_values(tmp_path, architecture, per_row):
    """Requantised they would get another scale: the mean of magnitudes counts zeros too."""
    tensors = model_tensors(architecture)
    codes = {}
    for name, values in tensors.items():
        if values.ndim == 2 and name.startswith("blk"):
            codes[name] = rng.integers(-1, 2, values.shape)
            codes[name][:, 0] = 1
            scale = np.arange(1, 1 + len(values))[:, None] if per_row else 0.3
            tensors[name] = (codes[name] * scale).astype(np.float32)
    checkpoint = read(tmp_path, model_file(architecture, tensors=tensors))
    assert (checkpoint.config.weights, checkpoint.config.activations) == ("ternary", "int8")
    value = checkpoint.read("blocks.1.ffn.down")
    assert isinstance(value, Ternary)
    np.testing.assert_array_equal(value.codes, codes["blk.1.ffn_down.weight"])
    expected = np.arange(1, 9) if per_row else np.float32(0.3)
    np.testing.assert_array_equal(value.scale, expected)


def test_float_layers(tmp_path):
    _, stored = ternary_parts("TQ2_0", architecture="llama")
    for name in ("blk.0.ffn_down", "blk.1.attn_q", "blk.1.attn_k", "blk.1.attn_v"):
        del stored[f"{name}.weight"]
    tensors = model_tensors(**WIDE)
    checkpoint = read(tmp_path, model_file(tensors=tensors, stored=stored, **WIDE_SETTINGS))
    assert checkpoint.config.weights == "ternary"
    assert checkpoint.config.float_layers == ("blocks.0.ffn.down", "blocks.1.attention.qkv")
    np.testing.assert_array_equal(
        checkpoint.read("blocks.0.ffn.down"), tensors["blk.0.ffn_down.weight"]
    )
    assert isinstance(checkpoint.read("blocks.1.ffn.down"), Ternary)
    del stored["blk.1.ffn_up.weight"]
    refused(
        tmp_path, model_file(tensors=tensors, stored=stored, **WIDE_SETTINGS),
        r"blocks.1.ffn.gate_up is stacked of ternary and float matrices",
    )  # fmt: skip


def test_quantised_types_are_floats(tmp_path):
    quants = pytest.importorskip("gguf.quants", reason="package gguf is not installed")
    tensors = model_tensors("bitnet", **WIDE)
    kinds = {"attn_v": "Q8_0", "ffn_gate": "Q4_0", "ffn_down": "Q4_1", "attn_output": "BF16"}
    stored, expected = {}, {}
    for name, values in tensors.items():
        kind = kinds.get(name.split(".")[-2])
        if kind:
            number = quants.GGMLQuantizationType[kind]
            packed = quants.quantize(values, number)
            stored[name] = int(number), packed.tobytes()
            expected[name] = quants.dequantize(packed, number)
    raw = model_file("bitnet", tensors=tensors, stored=stored, **WIDE_SETTINGS)
    checkpoint = read(tmp_path, raw)
    assert (checkpoint.config.weights, checkpoint.config.activations) == ("float", "float")
    for name in tensor_shapes(checkpoint.config):
        there = name_there(name)
        value = checkpoint.read(name).astype(np.float32)
        np.testing.assert_array_equal(value, expected.get(there, tensors[there]))


def test_stated_formats(tmp_path):
    """What bitjax writes beside the standard settings counts; the shape is that of the file."""
    known = ModelConfig(weights="binary", activations="float", float_layers=("*.down",))

    def checkpoint(text):
        return read(tmp_path, model_file(entries=[entry("bitjax.config", STRING, text)]))

    config = checkpoint(to_json(known)).config
    assert (config.weights, config.activations) == ("binary", "float")
    assert config.float_layers == ("*.down",)
    assert config.hidden_size == 8
    many = dataclasses.replace(known, float_layers=tuple(map(str, range(9))))
    for text, message in (
        ("{", "bitjax.config cannot be read"), ('{"weights": "x"}', "model.weights='x' is not one"),
        ("[" * 10_000, "bitjax.config cannot be read"), (to_json(many), "more float layers"),
        (json.dumps({"hidden": 1}), "unknown setting model.hidden"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            checkpoint(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gpt2"}, "architecture 'gpt2' is not known; bitnet,"),
        ({"block_count": None}, "llama.block_count=None is not one number"),
        ({"block_count": 0}, "llama.block_count=0 must be 1 or more"),
        ({"block_count": 2**31}, "20 tensors, too few for 2147483648 layers"),
        ({"block_count": 1}, r"'blk.1.attn_norm.weight' of shape \[8\] has no place"),
        ({"block_count": "2"}, "llama.block_count='2' is not one number"),
        ({"embedding_length": 8.0}, "llama.embedding_length=8.0 must be 1 or more"),
        ({"embedding_length": 2**32 - 1}, "model.head_dim=2147483647 is odd"),
        ({"embedding_length": 16}, r"'token_embd.weight' has shape \[5, 8\]; the metadata make it"),
        ({"feed_forward_length": (U32, [12, 13])}, "feed_forward_length=array.* is not one number"),
        ({"feed_forward_length": (U32, [])}, "feed_forward_length=array.* is not one number"),
        ({"attention.head_count": 3}, r"'blk.0.attn_q.weight' has shape \[8, 8\]; the metadata"),
        ({"attention.head_count_kv": 2}, r"'blk.0.attn_k.weight' has shape \[4, 8\]; the metadata"),
        ({"attention.layer_norm_rms_epsilon": None}, "rms_epsilon=None is not one number"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, "model.norm_eps=nan"),
        ({"attention.value_length": 8}, "value_length=8 differs from the 4 dimensions of a head"),
        ({"rope.dimension_count": 2}, "rope.dimension_count=2 differs from the 4 dimensions"),
        ({"rope.freq_base": 0.0}, "model.rope_theta=0.0 must be above 0"),
        ({"rope.scaling.type": "yarn"}, "rotary scaling of type 'yarn' is not supported"),
        ({"rope.scaling.type": 1}, "llama.rope.scaling.type is not a string"),
        ({"rope.scaling.factor": -2.0}, "rope_scaling.factor=-2.0 must be above 0"),
        ({"expert_count": 8}, "llama.expert_count=8 is not supported"),
        ({"attention.sliding_window": 4096}, "llama.attention.sliding_window=4096 is not supp"),
        ({"attention.causal": False}, "llama.attention.causal=False is not supported"),
        ({"entries": [entry("split.count", U32, 3)]}, "is one of several files of a model"),
        ({"entries": [entry("bitjax.i2s_group", ARRAY, (F32, [1.0]))]}, None),
        ({"entries": [entry("tokenizer.ggml.model", STRING, "no_vocab")]}, None),
        ({"entries": [entry("tokenizer.ggml.model", BOOL, True)]}, "tokenizer.ggml.model"),
        ({"entries": [entry("tokenizer.ggml.model", STRING, "gpt2")]}, "tokenizer.ggml.tokens"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(tmp_path, changes, message):
    if message is None:
        read(tmp_path, model_file(**changes))
        return
    refused(tmp_path, model_file(**changes), message)


def without(name):
    return {key: value for key, value in model_tensors().items() if key != name}


@pytest.mark.parametrize(
    ("tensors", "stored", "message"),
    [
        (without("token_embd.weight"), {}, "has no matrix token_embd.weight"),
        (without("output_norm.weight"), {}, "tensor 'output_norm.weight' is missing"),
        (without("blk.1.ffn_up.weight"), {}, "tensor 'blk.1.ffn_up.weight' is missing"),
        (model_tensors() | {"extra": np.zeros(3, np.float32)}, {}, "'extra' of shape .3. has no"),
        (
            model_tensors() | {"blk.0.attn_q.bias": np.zeros(8, np.float32)}, {},
            "'blk.0.attn_q.bias' of shape .8. has no place in a model of architecture llama",
        ),
        (
            model_tensors() | {"blk.0.attn_q.scale": np.zeros(8, np.float32)}, {},
            "'blk.0.attn_q.scale' of shape .8. has no place",
        ),
        (
            model_tensors(), {"token_embd.weight": (36, bytes(10 + 32))},
            "'token_embd.weight' is in I2_S, which is for linear layers",
        ),
        (
            model_tensors(), {"blk.0.ffn_norm.weight": (36, bytes(2 + 32))},
            "'blk.0.ffn_norm.weight' is a vector of type I2_S",
        ),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(tmp_path, tensors, stored, message):
    refused(tmp_path, model_file(tensors=tensors, stored=stored), message)
