"""Model files and models as checkpoints, and back: the same codes, scales and logits to the bit."""

import dataclasses
import os
import tracemalloc

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tiny import changed, tiny_config, tiny_model

from bitjax.infer import pack_model
from bitjax.interop.checkpoint import Checkpoint, Ternary, tensor_shapes
from bitjax.interop.model_file import build_model, checkpoint_of, read_model, write_model
from bitjax.model import bit_linears
from bitjax.model.files import load_model, save_model
from bitjax.packing import PackedWeights, unpack
from bitjax.quant import ternary

TOKENS = np.arange(9, dtype=np.int32)[None]
VARIANTS = {
    "b1.58": {},
    "head, binary": {"tie_embeddings": False, "weights": "binary"},
    "inner norm": {"inner_norm": True, "sub_norm": False},
    "norms of matrices": {"linear_norm_eps": 1e-6, "float_layers": ("*.gate_up",)},
    "weights only": {"activations": "float", "activation": "silu"},
}
FORMS = [
    ("ternary2", "float32"), ("ternary1.6", "bfloat16"), ("ternary2", "int8"),
    ("ternary1.6", "int4"), ("ternary2", "screened"),
]  # fmt: skip


def logits(model):
    return np.asarray(model(TOKENS))


def model_with_norms(**changes):
    model = tiny_model(**({"num_layers": 1} | changes))
    rng = np.random.default_rng(0)
    for _, layer in bit_linears(model):
        if layer.norm is not None:
            scale = rng.uniform(0.5, 2, layer.norm.scale.shape).astype(np.float32)
            layer.norm.scale.set_value(jnp.asarray(scale))
    return model


def held(model):
    """Codes or floats of every layer and table, with the scale of each row."""
    found = {"embedding": model.embedding.get_value()}
    found |= {name: layer.weight.get_value() for name, layer in bit_linears(model)}
    if model.head is not None:
        found["head"] = model.head.get_value()
    return {
        name: (w.layout, np.asarray(unpack(w)), np.broadcast_to(w.scale, w.rows))
        if isinstance(w, PackedWeights) else (str(w.dtype), np.asarray(w.astype(jnp.float32)), 1)
        for name, w in found.items()
    }  # fmt: skip


def same(a, b):
    a, b = held(a), held(b)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name][0] == b[name][0], name
        np.testing.assert_array_equal(a[name][1], b[name][1], err_msg=name)
        np.testing.assert_array_equal(a[name][2], b[name][2], err_msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_models_tensors_are_those_of_the_shapes(variant):
    model = model_with_norms(**VARIANTS[variant])
    for checkpoint in (checkpoint_of(model), checkpoint_of(pack_model(model))):
        for name, shape in tensor_shapes(model.config).items():
            assert checkpoint.read(name).shape == shape, name
    with pytest.raises(ValueError, match=r"^the model has no tensor 'blocks\.0\.attention\.qkv'$"):
        checkpoint.read("blocks.0.attention.qkv")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", FORMS[:2])
def test_a_written_checkpoint_is_the_packed_model(tmp_path, variant, form):
    model = model_with_norms(**VARIANTS[variant])
    packed, path = pack_model(model, *form), tmp_path / "model.safetensors"
    write_model(path, checkpoint_of(model), *form)
    got = load_model(path)
    assert got.config == model.config
    if not model.config.float_layers:  # these are bfloat16 beside bfloat16 tables
        same(got, packed)
        np.testing.assert_array_equal(logits(got), logits(packed))
    elif form[1] == "float32":
        np.testing.assert_array_equal(logits(got), logits(packed))
    # From the packed file on: unpacked and packed again in another layout, and in memory.
    again = tmp_path / "again.safetensors"
    write_model(again, read_model(path), "ternary1.6", form[1])
    np.testing.assert_array_equal(logits(load_model(again)), logits(got))
    built = build_model(read_model(path), impl="reference")
    np.testing.assert_array_equal(logits(built), logits(changed(got, impl="reference")))
    assert {layer.impl for _, layer in bit_linears(built)} == {built.impl} == {"reference"}


@pytest.mark.parametrize("form", FORMS[2:])
def test_tables_and_screens(tmp_path, form):
    """A table of more rows than are written together, and not in whole blocks."""
    model = tiny_model(num_layers=1, tie_embeddings=False, vocab_size=4096 + 37)
    packed, path = pack_model(model, *form), tmp_path / "model.safetensors"
    write_model(path, checkpoint_of(model), *form)
    got = load_model(path)
    same(got, packed)
    for name in ("embedding", "head"):
        ours, theirs = (getattr(m, name).get_value() for m in (got, packed))
        if form[1] == "int4":
            np.testing.assert_array_equal(ours.multipliers, theirs.multipliers)
        table = checkpoint_of(got).read(name)
        if form[1] in ("int8", "int4"):
            floats = np.asarray(unpack(theirs)) * np.asarray(theirs.scale)[:, None]
            np.testing.assert_array_equal(table, floats)
    if form[1] == "screened":
        ours, theirs = got.screen.get_value(), packed.screen.get_value()
        np.testing.assert_array_equal(ours.weights.codes, theirs.weights.codes)
        for part in ("dither", "spreads", "norms"):
            np.testing.assert_array_equal(getattr(ours, part), getattr(theirs, part))


def test_columns_and_layer_layouts(tmp_path):
    model, path = tiny_model(num_layers=1), tmp_path / "model.safetensors"
    options = {"columns": True, "layer_layouts": [("*.down", "ternary2")]}
    write_model(path, checkpoint_of(model), "ternary1.6", **options)
    got, wanted = load_model(path), pack_model(model, "ternary1.6", **options)
    same(got, wanted)
    ours, theirs = (m.blocks[0].ffn.down.weight.get_value().columns for m in (got, wanted))
    np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(ValueError, match="columns skip activations that are zero"):
        write_model(
            path, checkpoint_of(tiny_model(activation="silu")), columns=True, overwrite=True
        )


@pytest.mark.parametrize("weights", ["ternary", "float"])
def test_float_files(tmp_path, weights):
    model = tiny_model(num_layers=1, weights=weights)
    path = tmp_path / "model.safetensors"
    write_model(path, checkpoint_of(model), as_float=True)
    same(load_model(path), model)
    save_model(tmp_path / "saved.safetensors", model)
    assert path.read_bytes() == (tmp_path / "saved.safetensors").read_bytes()
    if weights == "float":
        same(build_model(read_model(path)), model)


def of_arrays(tensors, config):
    return Checkpoint("there", config, tensors.__getitem__)


def random_tensors(config, dtype=np.float32):
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(size=shape).astype(dtype) for name, shape in tensor_shapes(config).items()
    }


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_master_weights_of_other_dtypes(tmp_path, dtype):
    config = tiny_config(num_layers=1)
    tensors = random_tensors(config, dtype)
    write_model(tmp_path / "m", of_arrays(tensors, config))
    model = load_model(tmp_path / "m")
    np.testing.assert_array_equal(
        np.asarray(model.embedding[...]), tensors["embedding"].astype(np.float32)
    )
    gate_up = model.blocks[0].ffn.gate_up.weight.get_value()
    for part, rows in (("gate", slice(0, 24)), ("up", slice(24, 48))):
        wanted = ternary(jnp.asarray(tensors[f"blocks.0.ffn.{part}"]).astype(jnp.float32))
        np.testing.assert_array_equal(np.asarray(unpack(gate_up))[rows], wanted.codes)
        np.testing.assert_array_equal(gate_up.scale[rows], np.full(24, wanted.scale[0, 0]))
    built = build_model(of_arrays(tensors, config))
    assert {str(p.dtype) for p in (built.embedding[...], built.norm.scale[...])} <= {
        "float32", "bfloat16",
    }  # fmt: skip
    np.testing.assert_array_equal(
        unpack(built.blocks[0].ffn.gate_up.weight.get_value()), unpack(gate_up)
    )


def test_scales_of_rows_stay(tmp_path):
    config = tiny_config(num_layers=1, activations="float")
    tensors = random_tensors(config)
    codes = np.random.default_rng(1).integers(-1, 2, (32, 24)).astype(np.int8)
    scale = np.linspace(0.1, 1, 32, dtype=np.float32)
    tensors["blocks.0.ffn.down"] = Ternary(codes, scale)
    write_model(tmp_path / "m", of_arrays(tensors, config))
    down = read_model(tmp_path / "m").read("blocks.0.ffn.down")
    np.testing.assert_array_equal(down.codes, codes)
    np.testing.assert_array_equal(down.scale, scale)
    assert read_model(tmp_path / "m").read("blocks.0.attention.q").scale.shape == ()


def replaced(name, value, **changes):
    config = tiny_config(num_layers=1, **changes)
    return of_arrays(random_tensors(config) | {name: value}, config)


@pytest.mark.parametrize(
    ("checkpoint", "options", "message"),
    [
        (replaced("norm", np.ones(31, np.float32)), {},
         r"^there: norm has shape \[31\]; wanted \[32\]$"),
        (replaced("embedding", np.full((256, 32), np.nan)), {}, "^there: embedding holds 8192 val"),
        (replaced("blocks.0.ffn.up", np.full((24, 32), np.inf)), {},
         r"^there: blocks\.0\.ffn\.up holds 768 values that are not finite"),
        (replaced("blocks.0.ffn.up", Ternary(np.ones((24, 32), np.int8), np.array(np.nan))), {},
         r"^there: the scale of blocks\.0\.ffn\.up holds 1 values that are not finite"),
        (replaced("blocks.0.ffn.up", Ternary(np.full((24, 32), 2, np.int8), np.array(1.0))), {},
         "^ternary2 weights must be integers from -1 to 1$"),
        (replaced("blocks.0.ffn.up", Ternary(np.ones((24, 32), np.int8), np.array(1.0))),
         {"as_float": True}, r"^there: blocks\.0\.ffn\.up is ternary already; there are no float"),
        (replaced("norm", np.ones(32, np.float32), weights="float"), {},
         "^there has float weights; only quantised ones can be packed$"),
        (replaced("blocks.0.attention.k.norm", np.zeros(32, np.float32), inner_norm=True), {},
         r"^there: the norms of blocks\.0\.attention\.q, .* differ; with inner_norm they are one$"),
        (replaced("norm", np.ones(32, np.float32)), {"layer_layouts": [("x", "ternary2")]},
         "^no linear layer matches 'x'"),
    ],
)  # fmt: skip
def test_refusals_leave_nothing(tmp_path, checkpoint, options, message):
    with pytest.raises(ValueError, match=message):
        write_model(tmp_path / "m", checkpoint, **options)
    assert os.listdir(tmp_path) == []


def test_a_file_is_replaced_only_when_told_to(tmp_path):
    checkpoint, path = checkpoint_of(tiny_model(num_layers=1)), tmp_path / "m"
    path.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"/m exists already; it is replaced only when told to$"):
        write_model(path, checkpoint)
    assert path.read_bytes() == b"x"
    write_model(path, checkpoint, overwrite=True)
    load_model(path)


def test_progress_reaches_the_end(tmp_path):
    calls = []
    write_model(tmp_path / "m", checkpoint_of(tiny_model()), on_bytes=lambda *at: calls.append(at))
    done, total = zip(*calls, strict=True)
    assert list(done) == sorted(done)
    assert done[-1] == total[0] == total[-1]


def test_one_layer_at_a_time(tmp_path):
    """NumPy's memory stays below a few layers, of which there are 24."""
    config = tiny_config(
        vocab_size=64, hidden_size=512, intermediate_size=512, num_layers=24, num_heads=8,
        num_kv_heads=8, head_dim=64,
    )  # fmt: skip
    codes = np.random.default_rng(0).integers(-1, 2, (512, 512)).astype(np.int8)
    small = {n: np.ones(s, np.float32) for n, s in tensor_shapes(config).items() if len(s) == 1}

    def read(name):
        if name == "embedding":
            return np.zeros((64, 512), np.float32)
        return small[name] if name in small else Ternary(codes.copy(), np.float32(1).reshape(()))

    tracemalloc.start()
    write_model(tmp_path / "m", dataclasses.replace(of_arrays({}, config), read=read))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "m").stat().st_size > 24 * 7 * 512 * 512 / 4
    assert peak < 24 * 512 * 512  # of 168; q, k and v apart and stacked, and packing some rows
