"""Folders read without transformers: what is in them is what comes out; every refusal."""

import json

import huggingface_folders as folders
import ml_dtypes
import numpy as np
import pytest
from huggingface_folders import edit, random_checkpoint, write

from bitjax.interop.checkpoint import Ternary, tensor_shapes
from bitjax.interop.huggingface import read_huggingface
from bitjax.quant import ternary

Q, UP = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"
O_PROJ, DOWN = "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"
EMBEDDING = "model.embed_tokens.weight"
BITLINEAR = {"quant_method": "bitnet", "linear_class": "bitlinear"}


@pytest.fixture
def packed(tmp_path):
    return write(tmp_path / "model")


@pytest.fixture
def floats(tmp_path):
    return write(tmp_path / "model", "float32", weights="float", activations="float",
                 sub_norm=False, tie_embeddings=False)  # fmt: skip


def held(folder, name):
    return folders.arrays(folder / "model.safetensors")[name]


def test_every_tensor_of_a_packed_folder(packed):
    expected, found = random_checkpoint(), read_huggingface(packed)
    assert found.origin == str(packed)
    assert found.tokenizer is None
    for name, shape in tensor_shapes(found.config).items():
        value, original = found.read(name), expected.read(name)
        assert value.shape == shape, name
        if isinstance(value, Ternary):
            codes, scale = ternary(original)
            np.testing.assert_array_equal(value.codes, codes)
            assert value.scale == np.reshape(scale, ())
        else:
            np.testing.assert_array_equal(value, original)


def test_shards_are_read_alike(packed):
    whole = read_huggingface(packed).read("blocks.1.ffn.up")
    folders.shard(packed, 3)
    np.testing.assert_array_equal(
        read_huggingface(packed).read("blocks.1.ffn.up").codes, whole.codes
    )


def test_a_scale_divides_or_multiplies(packed):
    scale = held(packed, f"{UP}.weight_scale")
    assert read_huggingface(packed).read("blocks.1.ffn.up").scale == scale
    edit(packed, quantization_config=BITLINEAR)
    assert read_huggingface(packed).read("blocks.1.ffn.up").scale == 1 / scale


def test_packed_codes_as_floats(packed):
    """As transformers 4 saves a packed model that it has loaded."""
    codes = read_huggingface(packed).read("blocks.1.ffn.up").codes
    edit(packed, {f"{UP}.weight": codes.astype(ml_dtypes.bfloat16)})
    np.testing.assert_array_equal(read_huggingface(packed).read("blocks.1.ffn.up").codes, codes)
    edit(packed, {f"{UP}.weight": codes.astype(np.float16) / 2})
    with pytest.raises(ValueError, match=f"{UP}.weight holds other numbers than -1, 0 and 1"):
        read_huggingface(packed).read("blocks.1.ffn.up")


def test_a_tied_head_may_be_there_twice(packed):
    embedding = held(packed, EMBEDDING)
    edit(packed, {"lm_head.weight": embedding})
    read_huggingface(packed)
    embedding[-1, -1] += 1
    edit(packed, {"lm_head.weight": embedding})
    with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        read_huggingface(packed)


def test_computed_tables_are_passed_over(floats):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(floats, {name: np.ones(4, np.float32)})
    read_huggingface(floats)


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("tensors", "remove", "settings", "message"),
    [
        # names
        ({}, [f"{Q}.weight"], {}, rf"{Q}.weight is missing; the configuration needs a float"),
        ({}, [f"{Q}.weight_scale"], {}, rf"{Q}.weight_scale is missing; the configuration needs"),
        ({}, ["model.norm.weight"], {}, r"model.norm.weight is missing"),
        ({}, [], {"tie_word_embeddings": False}, r"lm_head.weight is missing"),
        ({"extra": zeros(1)}, [], {}, r"extra has no place in the model of config.json$"),
        ({"extra": zeros(1), "y": zeros(1)}, [], {}, r"extra has no place .*, as 1 more$"),
        ({f"{Q}.bias": zeros(32)}, [], {}, rf"{Q}.bias: bitjax's linear layers have no biases"),
        ({"lm_head.weight_scale": zeros(1)}, [], {}, "lm_head.weight_scale: bitjax's head is not"),
        ({}, [], {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
         r"sub_norm.weight has no place .*, as 3 more$"),
        ({}, [], {"num_hidden_layers": 3}, "holds 2 layers; its config.json has num_hid.*=3"),
        ({}, [], {"num_hidden_layers": 1}, "holds 2 layers; its config.json has num_hid.*=1"),
        ({"model.layers.01.x": zeros(1)}, [], {}, "holds 3 layers"),
        # shapes and dtypes
        ({f"{Q}.weight": zeros(7, 32, dtype=np.uint8)}, [], {},
         rf"{Q}.weight is U8 \[7, 32\]; the configuration needs packed U8 \[8, 32\]"),
        ({f"{Q}.weight": zeros(8, 33, dtype=np.uint8)}, [], {}, rf"{Q}.weight is U8 \[8, 33\]"),
        ({f"{Q}.weight": zeros(32, 32, dtype=np.uint8)}, [], {}, r"needs packed U8 \[8, 32\]"),
        ({f"{Q}.weight": zeros(8, 32)}, [], {}, rf"{Q}.weight is F32 \[8, 32\]"),
        ({f"{Q}.weight_scale": zeros(2)}, [], {}, rf"{Q}.weight_scale is F32 \[2\]; .* a float"),
        ({f"{Q}.weight_scale": zeros(1, dtype=np.uint8)}, [], {}, rf"{Q}.weight_scale is U8 \[1\]"),
        ({EMBEDDING: zeros(40, 31)}, [], {}, r"is F32 \[40, 31\]; the configuration needs a float"),
        ({EMBEDDING: zeros(40, 32, dtype=np.uint8)}, [], {}, r"is U8 \[40, 32\]; the conf"),
        ({"model.norm.weight": zeros(32, 1)}, [], {}, r"norm.weight is F32 \[32, 1\]; .* \[32\]"),
        ({}, [], {"hidden_size": 64, "head_dim": 8}, r"embed_tokens.weight is BF16 \[40, 32\];"),
        ({}, [], {"vocab_size": 10**15}, r"needs a float \[1000000000000000, 32\]"),
        ({f"{Q}.weight": zeros(32, 32)}, [], {"quantization_config": BITLINEAR},
         rf"{Q}.weight is F32 \[32, 32\]; the configuration needs packed U8"),
        ({}, [], {"quantization_config": None}, r"q_proj.weight is U8 \[8, 32\]; .* a float \[32"),
        ({}, [], {"quantization_config": BITLINEAR | {"linear_class": "autobitlinear",
                                                      "quantization_mode": "online"}},
         r"q_proj.weight is U8 \[8, 32\]; .* a float \[32, 32"),
        ({}, [], {"quantization_config": BITLINEAR | {"use_rms_norm": True}},
         r"q_proj.rms_norm.weight is missing"),
        ({}, [], {"quantization_config": BITLINEAR | {"modules_to_not_convert": ["down_proj"]}},
         r"down_proj.weight is U8 \[8, 24\]; the configuration needs a float \[32, 24\]"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(packed, tensors, remove, settings, message):
    edit(packed, tensors, remove, **settings)
    with pytest.raises(ValueError, match=message) as caught:
        read_huggingface(packed)
    assert str(packed) in str(caught.value)


@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0])
def test_a_scale_that_is_no_scale(packed, scale):
    edit(packed, {f"{Q}.weight_scale": np.float32([scale])})
    with pytest.raises(ValueError, match=rf"{Q}.weight_scale is {scale}; a scale is finite and"):
        read_huggingface(packed).read("blocks.1.attention.q")


@pytest.mark.parametrize("scale", [0.0, 1e-40])
def test_a_scale_that_cannot_divide(packed, scale):
    edit(packed, {f"{Q}.weight_scale": np.float32([scale])})
    assert read_huggingface(packed).read("blocks.1.attention.q").scale == np.float32(scale)
    edit(packed, quantization_config=BITLINEAR)
    with pytest.raises(ValueError, match=rf"{Q}.weight_scale is .*; weights are divided by it"):
        read_huggingface(packed).read("blocks.1.attention.q")


def test_the_code_three(packed):
    packed_codes = held(packed, f"{Q}.weight")
    packed_codes[2, 5] |= 3 << 2
    edit(packed, {f"{Q}.weight": packed_codes})
    message = rf"model.safetensors: {Q}.weight holds the code 3 at row 10, column 5"
    with pytest.raises(ValueError, match=message):
        read_huggingface(packed).read("blocks.1.attention.q")


def test_what_is_no_folder(tmp_path):
    with pytest.raises(ValueError, match="nothing is no folder"):
        read_huggingface(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"config.json is no file"):
        read_huggingface(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        read_huggingface(tmp_path)


def signs(rows, cols, scale):
    codes = np.random.default_rng(rows).integers(-1, 2, (rows, cols)).astype(np.float32)
    return codes * np.float32(scale)


def make_ternary(folder, **odd):
    """Make every matrix exactly ternary; `odd` replaces some, by the end of their names."""
    stored = folders.arrays(folder / "model.safetensors")
    tensors = {name: signs(*a.shape, 0.5) for name, a in stored.items() if "_proj" in name}
    for name in tensors:
        for part, value in odd.items():
            if f"{part}_proj" in name:
                tensors[name] = np.ascontiguousarray(np.broadcast_to(value, tensors[name].shape))
    edit(folder, tensors)


def test_ternary_floats_are_recognised(floats):
    assert read_huggingface(floats).config.weights == "float"
    make_ternary(floats)
    found = read_huggingface(floats)
    assert (found.config.weights, found.config.activations) == ("ternary", "float")
    up = found.read("blocks.1.ffn.up")
    np.testing.assert_array_equal(up.codes * up.scale, held(floats, f"{UP}.weight"))
    assert up.scale.shape == ()


def test_scales_of_columns_move_to_the_rows_that_make_them(floats):
    of_heads = np.repeat(np.float32([2, 3]), 16)  # 4 heads of 8 on 2: a border between the two
    of_ffn = np.repeat(np.float32([1, 4, 0.25]), 8)
    make_ternary(floats, o=signs(32, 32, of_heads), down=signs(32, 24, of_ffn))
    found = read_huggingface(floats)
    assert found.read("blocks.0.attention.o").scale == 1
    assert found.read("blocks.0.ffn.down").scale == 1
    assert found.read("blocks.0.attention.v").scale.tolist() == [1.0] * 8 + [1.5] * 8
    np.testing.assert_array_equal(found.read("blocks.0.ffn.up").scale, of_ffn / 2)
    assert found.read("blocks.0.attention.q").scale.shape == ()


def test_columns_without_a_weight(floats):
    o, down = signs(32, 32, np.repeat(np.float32([2, 3]), 16)), signs(32, 24, 1)
    o[:, [0, 9]] = 0  # of the first key-value head: once beside a head that has one
    o[:, [1 + 16, 1 + 24]] = 0  # of the second: nothing reads its dimension 1
    make_ternary(floats, o=o, down=down)
    assert read_huggingface(floats).read("blocks.0.attention.v").scale.tolist() == (
        [1.0] * 8 + [1.5, 0.5] + [1.5] * 6
    )


def test_ternary_floats_that_cannot_be_expressed(floats):
    of_columns = np.repeat(np.float32([2, 3, 2, 3]), 8)
    make_ternary(floats, o=signs(32, 32, of_columns))
    message = "o_proj.weight differ between heads that read the same key-value head"
    with pytest.raises(ValueError, match=message):
        read_huggingface(floats).read("blocks.0.attention.v")
    make_ternary(floats, v=signs(16, 32, of_columns))
    with pytest.raises(ValueError, match=r"v_proj.weight has scales of columns"):
        read_huggingface(floats).read("blocks.0.attention.v")
    make_ternary(floats, q=signs(32, 32, of_columns))
    with pytest.raises(ValueError, match=r"q_proj.weight has scales of columns"):
        read_huggingface(floats).read("blocks.1.attention.q")
    make_ternary(floats)
    weight = held(floats, f"{UP}.weight")
    weight[3, 3] = 0.75
    edit(floats, {f"{UP}.weight": weight})
    with pytest.raises(ValueError, match=rf"{UP}.weight is not ternary"):
        read_huggingface(floats).read("blocks.1.ffn.up")


def test_settings_name_their_file(packed):
    edit(packed, hidden_act="gelu")
    with pytest.raises(ValueError, match=rf"^{packed}/config.json: hidden_act is 'gelu'"):
        read_huggingface(packed)


def test_the_tokenizer_comes_along(tmp_path):
    from bitjax.tokenizer import ByteTokenizer

    folder = write(tmp_path / "model", tokenizer=ByteTokenizer(), vocab_size=256)
    tokenizer = read_huggingface(folder).tokenizer
    assert tokenizer.encode("häß").tolist() == list("häß".encode())
    assert json.loads((folder / "config.json").read_text())["bos_token_id"] is None
