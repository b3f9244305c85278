"""Folders for transformers, looked at without it: forms, shards, refusals, complete or absent."""

import dataclasses
import json
import stat

import huggingface_folders as folders
import numpy as np
import pytest
from huggingface_folders import random_checkpoint, write

from bitjax.config import RopeScaling
from bitjax.interop.checkpoint import Checkpoint, Ternary, tensor_shapes
from bitjax.interop.huggingface import read_huggingface, write_huggingface
from bitjax.interop.safetensors_files import open_folder
from bitjax.quant import ternary

FLOATS = {"weights": "float", "activations": "float"}
LLAMA = {"sub_norm": False}


def config_json(folder):
    return json.loads((folder / "config.json").read_text())


def with_tensor(name, change, **changes):
    """A random checkpoint, one tensor of which is changed."""
    checkpoint = random_checkpoint(**changes)
    return dataclasses.replace(
        checkpoint, read=lambda n: change(checkpoint.read(n)) if n == name else checkpoint.read(n)
    )


def test_a_packed_folder(tmp_path):
    folder = write(tmp_path / "model")
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip
    assert config_json(folder) == {
        "architectures": ["BitNetForCausalLM"], "model_type": "bitnet", "vocab_size": 40,
        "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "relu2",
        "max_position_embeddings": 48, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
        "rope_scaling": None, "tie_word_embeddings": True, "attention_bias": False,
        "attention_dropout": 0.0, "initializer_range": 0.3, "use_cache": True,
        "torch_dtype": "bfloat16", "bos_token_id": None, "eos_token_id": None,
        "pad_token_id": None,
        "quantization_config": {
            "quant_method": "bitnet", "linear_class": "autobitlinear",
            "quantization_mode": "offline", "modules_to_not_convert": None,
            "use_rms_norm": False, "rms_norm_eps": 1e-6,
        },
    }  # fmt: skip
    kinds = {name: tensor.dtype for name, tensor in open_folder(folder).items()}
    assert kinds["model.layers.0.self_attn.q_proj.weight"] == "U8"
    assert {name for name, kind in kinds.items() if kind == "F32"} == {
        name for name in kinds if name.endswith("weight_scale")
    }
    assert kinds["model.embed_tokens.weight"] == kinds["model.norm.weight"] == "BF16"
    assert stat.S_IMODE(folder.stat().st_mode) & 0o500 == 0o500
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "| parameters | 12,304 |" in card


@pytest.mark.parametrize(
    ("form", "changes", "expected"),
    [
        ("packed", LLAMA, {"architectures": ["LlamaForCausalLM"], "head_dim": 8,
                           "mlp_bias": False}),
        ("float32", FLOATS, {"architectures": ["BitNetForCausalLM"], "torch_dtype": "float32"}),
        ("bfloat16", FLOATS | LLAMA, {"model_type": "llama", "torch_dtype": "bfloat16"}),
        ("packed", {"rope_scaling": RopeScaling("linear", 2.0)},
         {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ("packed", {"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 32)},
         {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                           "high_freq_factor": 4.0, "original_max_position_embeddings": 32}}),
    ],
)  # fmt: skip
def test_settings(tmp_path, form, changes, expected):
    folder = write(tmp_path / "model", form, **changes)
    found = config_json(folder)
    assert {key: found[key] for key in expected} == expected
    assert ("quantization_config" in found) == (form == "packed")
    again = read_huggingface(folder).config
    assert again == dataclasses.replace(random_checkpoint(**changes).config, init_std=0.02)


@pytest.mark.parametrize(
    ("changes", "form"),
    [
        ({}, "packed"), ({}, "bfloat16"), (LLAMA, "packed"), (LLAMA, "float32"),
        ({"linear_norm_eps": 1e-4, "float_layers": ("blocks.0.*", "*.down")}, "packed"),
        ({"linear_norm_eps": 1e-4, "float_layers": ("*.qkv",)}, "bfloat16"),
        (FLOATS, "float32"), (FLOATS | LLAMA | {"tie_embeddings": False}, "bfloat16"),
        ({"weights": "binary"}, "packed"), (LLAMA | {"activations": "float"}, "float32"),
        ({"head_dim": 12} | LLAMA, "packed"), ({"vocab_size": 41}, "packed"),
    ],
)  # fmt: skip
def test_what_is_written_is_read(tmp_path, changes, form):
    expected = random_checkpoint(**changes)
    found = read_huggingface(write(tmp_path / "model", form, **changes))
    weights = "ternary" if changes.get("weights") == "binary" else expected.config.weights
    layers = found.config.float_layers
    assert found.config == dataclasses.replace(
        expected.config, init_std=0.02, weights=weights, float_layers=layers
    )
    names = tensor_shapes(expected.config)
    assert tensor_shapes(found.config) == names
    for name in names:
        value, original = found.read(name), expected.read(name)
        if isinstance(value, Ternary) and changes.get("weights") != "binary":
            codes, scale = ternary(original)
            np.testing.assert_array_equal(value.codes, codes)
            np.testing.assert_array_equal(value.scale, np.reshape(scale, ()))
        elif isinstance(value, Ternary):
            np.testing.assert_array_equal(value.codes, np.where(original > original.mean(), 1, -1))
        else:
            np.testing.assert_array_equal(value, original)


def test_ternary_tensors_are_written_as_they_are(tmp_path):
    """One scale for all rows, however many times it is told."""
    codes = np.eye(16, 32, dtype=np.int8)
    value = Ternary(codes, np.full(16, 0.3, np.float32))
    checkpoint = with_tensor("blocks.0.attention.v", lambda _: value)
    write_huggingface(tmp_path / "model", checkpoint)
    found = read_huggingface(tmp_path / "model").read("blocks.0.attention.v")
    np.testing.assert_array_equal(found.codes, codes)
    assert found.scale == np.float32(0.3)


def test_shards(tmp_path):
    told = []
    checkpoint = random_checkpoint()
    write_huggingface(tmp_path / "one", checkpoint)
    write_huggingface(
        tmp_path / "many", checkpoint, shard_bytes=500, on_bytes=lambda *at: told.append(at)
    )
    one, many = open_folder(tmp_path / "one"), open_folder(tmp_path / "many")
    assert one.keys() == many.keys()
    for name in one:
        np.testing.assert_array_equal(one[name].raw, many[name].raw)
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) == 9
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    for name, tensor in many.items():
        if name.endswith("_scale"):
            assert many[name.removesuffix("_scale")].path == tensor.path
    assert told[-1][0] == told[-1][1] == sum(tensor.raw.nbytes for tensor in many.values())
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == told[-1][1]


def test_tokens_that_begin_and_end(tmp_path):
    from bitjax.text import Specials, TextTokenizer
    from bitjax.tokenizer import ByteTokenizer

    write(tmp_path / "bytes", tokenizer=ByteTokenizer(), vocab_size=256)
    text = (tmp_path / "bytes" / "tokenizer.json").read_text()
    tokenizer = TextTokenizer(text, Specials(bos=1, stop=(2, 3)))
    folder = write(tmp_path / "text", tokenizer=tokenizer, vocab_size=256)
    for file in ("config.json", "generation_config.json"):
        found = json.loads((folder / file).read_text())
        assert (found["bos_token_id"], found["eos_token_id"]) == (1, [2, 3])
    assert read_huggingface(folder).tokenizer.special.stop == (2, 3)


@pytest.mark.parametrize(
    ("changes", "form", "message"),
    [
        ({"inner_norm": True}, "packed", "no models with a norm inside every linear layer and"),
        ({"head_dim": 6}, "packed", r"num_heads \* head_dim to be hidden_size; .* 4 \* 6 and 32"),
        ({"num_heads": 5, "num_kv_heads": 5} | LLAMA, "packed", "hidden_size=32 to be a multiple"),
        ({"weights": "float"}, "packed", "no models of float weights and int8 activations"),
        (FLOATS, "packed", "packed layers have int8 activations, this model float weights"),
        ({"activations": "float"}, "packed", "this model ternary weights and float a"),
        (FLOATS | {"linear_norm_eps": 1e-6}, "float32", "no norm before every matrix in models"),
        ({"weights": "binary"}, "bfloat16", "would make a binary model's master weights ternary"),
        ({"weight_scale": "group", "weight_group": 8}, "packed",
         r"no models with weight_scale='group' \(weight_group=8\)"),
        ({"activations": "int4"}, "packed", "no models with activations='int4'"),
        ({"hadamard": True}, "bfloat16", "no models with hadamard=true"),
        ({"weights": "ternary_median"}, "bfloat16",
         "by their absmean, this model's are ternary_median with a scale for each tensor"),
        ({"weight_scale": "row"}, "float32", "are ternary with a scale for each row"),
        ({"intermediate_size": 26}, "packed",
         "packs 4 rows to a byte, and blocks.0.ffn.gate has 26 rows; the form bfloat16 fits"),
    ],
)  # fmt: skip
def test_what_transformers_cannot_express(tmp_path, changes, form, message):
    checkpoint = dataclasses.replace(random_checkpoint(**changes), read=None)  # nothing is read
    message = f"^random cannot be written for transformers: .*{message}"
    with pytest.raises(ValueError, match=message):
        write_huggingface(tmp_path / "model", checkpoint, form)
    assert not list(tmp_path.iterdir())


def scaled(codes, scale):
    return lambda _: Ternary(np.ones(codes, np.int8), np.asarray(scale, np.float32))


@pytest.mark.parametrize(
    ("name", "change", "form", "message"),
    [
        ("blocks.0.attention.q", scaled((32, 32), 1), "bfloat16",
         "the form bfloat16 is of master weights, and these are ternary already; packed fits"),
        ("blocks.1.ffn.up", scaled((24, 32), 1), "float32",
         "random: blocks.1.ffn.up is ternary already; wanted floats"),
        ("blocks.1.ffn.up", scaled((24, 32), np.arange(24)), "packed",
         "transformers: blocks.1.ffn.up has 24 scales, of which its packed layers have one"),
        ("blocks.1.ffn.up", scaled((24, 32), np.nan), "packed",
         "random: the scale of blocks.1.ffn.up holds 1 values that are not finite"),
        ("blocks.1.ffn.up", lambda w: np.full_like(w, np.inf), "packed",
         "random: blocks.1.ffn.up holds .* values that are not finite"),
        ("norm", lambda w: w * np.float32(np.nan), "packed", "norm as bfloat16 holds 32 values"),
        ("embedding", lambda w: np.full_like(w, 3.4e38), "packed",
         "random: embedding as bfloat16 holds 1280 values that are not finite"),
        ("embedding", lambda w: w[:20], "packed", "came with 1,280 bytes; wanted 2,560"),
    ],
)  # fmt: skip
def test_tensors_that_cannot_be_written(tmp_path, name, change, form, message):
    with pytest.raises(ValueError, match=message):
        write_huggingface(tmp_path / "model", with_tensor(name, change), form)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there(tmp_path):
    folder = write(tmp_path / "model")
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="model exists already; say so if it shall be overwritten"):
        write(folder)
    llama = random_checkpoint(**LLAMA)
    broken = with_tensor("norm", lambda w: w * np.float32(np.nan))
    with pytest.raises(ValueError, match="not finite"):
        write_huggingface(folder, broken, overwrite=True)
    assert (folder / "model.safetensors").read_bytes() == before
    write_huggingface(folder, llama, overwrite=True)
    assert read_huggingface(folder).config.sub_norm is False
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_may_be_written_from_itself(tmp_path):
    folder = write(tmp_path / "model", "float32")
    expected = random_checkpoint().read("norm")
    write_huggingface(folder, read_huggingface(folder), "packed", overwrite=True)
    np.testing.assert_array_equal(read_huggingface(folder).read("norm"), expected)


def test_what_is_never_overwritten(tmp_path):
    checkpoint = random_checkpoint()
    (tmp_path / "file").touch()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").touch()
    (tmp_path / "link").symlink_to(tmp_path / "home")
    folders.write(tmp_path / "more")
    (tmp_path / "more" / "results").mkdir()
    for name, message in (
        ("file", "is no folder of a model"), ("home", "is no folder of a model"),
        ("link", "is no folder of a model"), ("more", "it holds the folder results"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} is not overwritten: .*{message}"):
            write_huggingface(tmp_path / name, checkpoint, overwrite=True)
    (tmp_path / "empty").mkdir()
    write_huggingface(tmp_path / "empty", checkpoint, overwrite=True)
    assert (tmp_path / "home" / "letter.txt").exists()


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot write .*: Not a directory|exists"):
        write(tmp_path / "file" / "model")
    with pytest.raises(ValueError, match="form='Q4' is not packed, bfloat16 or float32"):
        write(tmp_path / "model", "Q4")


def test_one_tensor_at_a_time(tmp_path):
    """Nothing is read before its turn, and nothing twice but the first matrix, which decides."""
    checkpoint, asked = random_checkpoint(), []

    def read(name):
        asked.append(name)
        return checkpoint.read(name)

    write_huggingface(tmp_path / "model", Checkpoint("x", checkpoint.config, read))
    assert asked == list(tensor_shapes(checkpoint.config))
