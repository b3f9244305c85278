"""Packing a trained model, against quantisers and a decoder in plain NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import packing_oracle
import pytest
from flax import nnx
from tiny import changed, tiny_model

from bitjax.infer import Generator, SamplingParams, pack_model
from bitjax.model import bit_linears
from bitjax.model.files import load_model, save_model
from bitjax.packing import PackedWeights

KINDS = ["ternary", "binary"]
TERNARY_LAYOUTS = ["ternary2", "ternary1.6"]


def unpacked(weight):
    """`[rows, cols]` in {-1, 0, 1}, digit by digit as the format says; padding must be zero."""
    base = packing_oracle.BASE[weight.layout]
    planes = packing_oracle.PLANES[weight.layout]
    row_blocks, col_blocks, _ = weight.codes.shape
    full = np.zeros((16 * row_blocks, 4 * planes * col_blocks), int)
    for (nb, kb, byte), value in np.ndenumerate(np.asarray(weight.codes)):
        r, j = divmod(byte, 4)
        for s in range(planes):
            full[16 * nb + r, 4 * planes * kb + 4 * s + j] = int(value) // base**s % base - 1
    assert not full[weight.rows :].any()
    assert not full[:, weight.cols :].any()
    return full[: weight.rows, : weight.cols]


def absmean(w):
    return np.float32(np.abs(w.astype(np.float64)).mean())


def ternary(w):
    """RoundClip(W / absmean, -1, 1), ties to even."""
    return np.clip(np.rint(w * (np.float32(1) / absmean(w))), -1, 1)


def binary(w):
    return np.where(w > w.astype(np.float64).mean(), 1, -1)


QUANTIZERS = {"ternary": ternary, "binary": binary}


def weights(model):
    return {name: layer.weight.get_value() for name, layer in bit_linears(model)}


def matrices(name, config):
    """Slices of the rows of a linear layer's matrices: q, k and v are stacked, and gate and up."""
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    rows = {
        "qkv": (queries, keys, keys),
        "o": (config.hidden_size,),
        "gate_up": (config.intermediate_size, config.intermediate_size),
        "down": (config.hidden_size,),
    }[name.rpartition(".")[2]]
    return [slice(a, b) for a, b in itertools.pairwise(np.cumsum((0, *rows)))]


def scales_of_rows(weight):
    return np.broadcast_to(np.asarray(weight.scale), weight.rows)


def with_exact_sums(model):
    """Weights that are multiples of 1/64 below 1: every float32 sum of 1024 of them is exact.

    The range is another for each matrix of a layer, so their scales differ.
    """
    rng = np.random.default_rng(0)
    for name, layer in bit_linears(model):
        w = np.zeros(layer.weight.get_value().shape, np.float32)
        for limit, rows in zip((63, 40, 25), matrices(name, model.config), strict=False):
            w[rows] = rng.integers(-limit, limit + 1, w[rows].shape) / 64
        layer.weight.set_value(jnp.asarray(w))
    return model


@pytest.mark.parametrize("layout", TERNARY_LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_scales_are_bit_equal(kind, layout):
    # Sizes that are powers of two: the mean is exact too.
    model = with_exact_sums(
        tiny_model(weights=kind, num_layers=1, head_dim=4, num_kv_heads=1, intermediate_size=16)
    )
    got = weights(pack_model(model, layout))
    assert list(got) == [
        "blocks.0.attention.qkv", "blocks.0.attention.o", "blocks.0.ffn.gate_up",
        "blocks.0.ffn.down",
    ]  # fmt: skip
    for name, w in weights(model).items():
        packed, w = got[name], np.asarray(w)
        assert packed.layout == layout
        assert packed.multipliers is None
        assert packed.shape == w.shape
        parts = matrices(name, model.config)
        assert parts[-1].stop == packed.rows
        assert packed.scale.shape == (() if len(parts) == 1 else (packed.rows,))
        assert packed.scale.dtype == np.float32
        codes, scales = unpacked(packed), scales_of_rows(packed)
        for rows in parts:
            np.testing.assert_array_equal(codes[rows], QUANTIZERS[kind](w[rows]), err_msg=name)
            assert (scales[rows] == absmean(w[rows])).all(), name
        assert len(set(scales.tolist())) == len(parts)


@pytest.mark.parametrize("kind", KINDS)
def test_random_weights(kind):
    model = tiny_model(weights=kind)
    got = weights(pack_model(model))
    assert len(got) == 8
    for name, stacked in weights(model).items():
        codes, scales = unpacked(got[name]), scales_of_rows(got[name])
        for rows in matrices(name, model.config):
            w = np.asarray(stacked)[rows]
            # A float32 mean of 1024 terms errs by less than 1024 * 2**-24 relative; far less summed
            # pairwise. Codes at a distance of 1e-3 from every threshold are certain.
            np.testing.assert_allclose(scales[rows], absmean(w), rtol=6e-5)
            distance = np.abs(np.abs(w / absmean(w)) - 0.5) if kind == "ternary" else np.abs(
                w - w.mean()
            )  # fmt: skip
            sure = distance > 1e-3
            assert sure.mean() > 0.98
            np.testing.assert_array_equal(codes[rows][sure], QUANTIZERS[kind](w)[sure])


def layouts(model):
    return {name: weight.layout for name, weight in weights(model).items()}


def test_layers_by_patterns():
    model = tiny_model()
    mix = [("*.ffn.down", "ternary2"), ("blocks.1.*", "ternary1.6"), ("*.qkv", "ternary2")]
    assert layouts(pack_model(model, "ternary1.6", layer_layouts=mix)) == {
        "blocks.0.attention.qkv": "ternary2", "blocks.0.attention.o": "ternary1.6",
        "blocks.0.ffn.gate_up": "ternary1.6", "blocks.0.ffn.down": "ternary2",
        "blocks.1.attention.qkv": "ternary2", "blocks.1.attention.o": "ternary1.6",
        "blocks.1.ffn.gate_up": "ternary1.6", "blocks.1.ffn.down": "ternary1.6",
    }  # fmt: skip


def test_a_mix_gives_the_logits_of_one_layout_to_the_bit(tmp_path):
    model = tiny_model()
    mix = [("*.ffn.*", "ternary1.6"), ("blocks.1.*.gate_up", "ternary2"), ("*.0.*.o", "ternary1.6")]
    tokens = jnp.arange(20, dtype=jnp.int32).reshape(2, 10)
    mixed = pack_model(model, "ternary2", "int8", layer_layouts=mix)
    path = tmp_path / "mixed.safetensors"
    save_model(path, mixed)
    read = load_model(path)
    assert layouts(read) == layouts(mixed)
    assert set(layouts(mixed).values()) == set(TERNARY_LAYOUTS)
    assert layouts(mixed)["blocks.0.ffn.down"] != layouts(mixed)["blocks.0.attention.qkv"]
    for layout in TERNARY_LAYOUTS:
        # Operation by operation: a compiled program may add in another order.
        wanted = np.asarray(changed(pack_model(model, layout, "int8"), fuse=False)(tokens))
        for got in (mixed, read):
            np.testing.assert_array_equal(changed(got, fuse=False)(tokens), wanted)
    params = SamplingParams(max_new_tokens=6)
    texts = [Generator(m).generate(["ab"], params)[0].text for m in (mixed, read)]
    assert texts[0] == texts[1]


def test_bad_patterns_and_layouts():
    model = tiny_model(num_layers=1)
    with pytest.raises(
        ValueError, match=r"^no linear layer matches '\*\.up'; they are blocks\.0\.attention\.qkv, "
    ):
        pack_model(model, layer_layouts=[("*.down", "ternary2"), ("*.up", "ternary2")])
    for chosen in ({"layout": "int8"}, {"layer_layouts": [("*", "int8")]}):
        with pytest.raises(ValueError, match=r"^layout='int8' is not ternary2 or ternary1\.6$"):
            pack_model(model, **chosen)


def test_all_zero_weights():
    model = tiny_model(num_layers=1)
    model.blocks[0].ffn.down.weight.set_value(jnp.zeros((32, 24)))
    gate_up = model.blocks[0].ffn.gate_up
    gate_up.weight.set_value(gate_up.weight[...].at[:24].set(0))
    packed = weights(pack_model(model))
    assert not unpacked(packed["blocks.0.ffn.down"]).any()
    assert np.asarray(packed["blocks.0.ffn.down"].scale) == np.float32(1e-5)
    codes, scales = (f(packed["blocks.0.ffn.gate_up"]) for f in (unpacked, scales_of_rows))
    assert not codes[:24].any()
    assert codes[24:].any()
    assert (scales[:24] == np.float32(1e-5)).all()
    assert (scales[24:] > 0.1).all()


def test_the_original_is_left_alone():
    model = tiny_model(tie_embeddings=False)
    before = [np.array(leaf) for leaf in jax.tree.leaves(nnx.state(model))]
    for tables in ("bfloat16", "int8", "int4"):
        packed = pack_model(model, "ternary1.6", tables)
        after = jax.tree.leaves(nnx.state(model))
        assert all(isinstance(w, jax.Array) for w in weights(model).values())
        assert all(isinstance(w, PackedWeights) for w in weights(packed).values())
        assert model.embedding.get_value().dtype == jnp.float32
        for a, b in zip(before, after, strict=True):
            np.testing.assert_array_equal(a, b)


def tables(model):
    """The embedding, and the head if it is another."""
    return [table.get_value() for table in (model.embedding, model.head) if table is not None]


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float_tables(tie, dtype):
    model = tiny_model(num_layers=1, tie_embeddings=tie)
    packed = pack_model(model, tables=dtype)
    assert len(tables(packed)) == 2 - tie
    for table, original in zip(tables(packed), tables(model), strict=True):
        assert table.dtype == dtype
        np.testing.assert_array_equal(table, original.astype(dtype))
    assert packed.norm.scale[...].dtype == jnp.float32


@pytest.mark.parametrize("tie", [True, False])
def test_int8_tables(tie):
    model = tiny_model(num_layers=1, tie_embeddings=tie, vocab_size=37)
    packed = pack_model(model, tables="int8")
    assert len(tables(packed)) == 2 - tie
    for table, original in zip(tables(packed), tables(model), strict=True):
        assert (table.layout, table.shape) == ("int8", (37, 32))
        original = np.asarray(original, np.float64)
        scale = np.abs(original).max(axis=1) / 127
        np.testing.assert_allclose(table.scale, scale, rtol=2**-23)
        # A quotient that rounds to a tie would make this depend on the last bit; none does.
        codes = packing_oracle.pack("int8", np.rint(original / scale[:, None]).astype(int))
        np.testing.assert_array_equal(table.codes, codes)
    assert packed.norm.scale[...].dtype == jnp.float32


@pytest.mark.parametrize("tie", [True, False])
def test_int4_tables(tie):
    model = tiny_model(
        num_layers=1, tie_embeddings=tie, vocab_size=37, hidden_size=40, init_std=0.5
    )
    packed = pack_model(model, tables="int4")
    assert len(tables(packed)) == 2 - tie
    for table, original in zip(tables(packed), tables(model), strict=True):
        assert (table.layout, table.shape) == ("int4", (37, 40))
        assert table.codes.shape == (3, 8, 64)
        assert table.multipliers.shape == (3, 2, 16)
        codes = np.asarray(table.codes).reshape(3, 8, 16, 4)
        codes = np.stack([codes % 16, codes // 16], axis=3).astype(int) - 8
        codes = codes.transpose(0, 2, 1, 3, 4).reshape(48, 64)[:37]
        m = np.asarray(table.multipliers).transpose(0, 2, 1).reshape(48, 2)[:37]
        unit = np.repeat(m, 32, axis=1) * np.asarray(table.scale, np.float64)[:, None]
        assert not codes[:, 40:].any()
        error = np.abs(codes * unit - np.pad(original, ((0, 0), (0, 24))))
        # Rounding errs by half a unit. A unit is at least (absmax / 7 / scale - 2.5) scales, a
        # scale a 15th of the row's absmax / 7: so what is clipped errs by less than 3 scales * 7.
        scale = np.asarray(table.scale)[:, None]
        assert (error <= np.maximum(unit / 2, 21 * scale) * (1 + 1e-5)).all()
        assert np.sqrt((error[:, :40] ** 2).mean()) < 0.12 * np.asarray(original).std()


def test_float32_tables_and_two_bits_by_default():
    packed = pack_model(tiny_model(num_layers=1))
    assert packed.embedding.get_value().dtype == jnp.float32
    assert {w.layout for w in weights(packed).values()} == {"ternary2"}


def test_a_full_precision_model_is_refused():
    model = tiny_model(num_layers=1, weights="float", activations="float")
    with pytest.raises(
        ValueError, match=r"^this model has float weights; only quantised ones can be packed$"
    ):
        pack_model(model)


@pytest.mark.parametrize("form", ["float32", "int8"])
def test_a_packed_model_is_refused(form):
    packed = pack_model(tiny_model(num_layers=1), tables=form)
    with pytest.raises(ValueError, match=r"^blocks\.0\.attention\.qkv is packed already$"):
        pack_model(packed)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(value):
    model = tiny_model()
    layer = model.blocks[1].ffn.gate_up
    layer.weight.set_value(layer.weight[...].at[35, 6].set(value))
    with pytest.raises(
        ValueError,
        match=r"^blocks\.1\.ffn\.gate_up holds 1 values that are not finite, .* index \(35, 6\)",
    ):
        pack_model(model)


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("name", ["embedding", "head"])
def test_tables_that_are_not_finite_are_refused(name, form):
    model = tiny_model(num_layers=1, tie_embeddings=False)
    table = getattr(model, name)
    table.set_value(table[...].at[7, 30].set(np.nan))
    with pytest.raises(ValueError, match=r" holds 1 values that are not .* index \(7, 30\)"):
        pack_model(model, tables=form)


@pytest.mark.parametrize(
    ("kind", "per"), [("ternary_median", "tensor"), ("ternary_learned", "tensor"),
                      ("ternary_learned", "row"), ("ternary", "row"), ("binary", "row")],
)  # fmt: skip
def test_packed_logits_of_other_scales_are_the_trained_ones(kind, per, tmp_path):
    model = tiny_model(weights=kind, weight_scale=per, num_layers=1)
    for _, layer in bit_linears(model):
        if kind == "ternary_learned":  # somewhere training could have moved it
            layer.learned_scale.set_value(layer.learned_scale[...] * 1.2)
    packed = changed(pack_model(model), fuse=False, impl="reference")
    tokens = jnp.arange(6)[None]
    np.testing.assert_allclose(
        np.asarray(packed(tokens)), np.asarray(model(tokens)), rtol=1e-4, atol=1e-4
    )
    save_model(tmp_path / "m.bitjax", packed)
    again = changed(load_model(tmp_path / "m.bitjax"), fuse=False, impl="reference")
    np.testing.assert_array_equal(np.asarray(again(tokens)), np.asarray(packed(tokens)))


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"weight_scale": "group", "weight_group": 8}, r"weight_scale='group' \(weight_group=8\)"),
        ({"activations": "int4"}, "activations='int4'"),
        ({"hadamard": True}, "hadamard=true"),
    ],
)
def test_what_only_training_has_is_not_packed(changes, setting):
    with pytest.raises(ValueError, match=f"^this model has {setting}, which packed layers cannot"):
        pack_model(tiny_model(num_layers=1, **changes))
