"""Packing a trained model, against quantisers and a decoder in plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import tiny_model

from bitjax.infer import pack_model
from bitjax.model import bit_linears
from bitjax.packing import PackedTernary


def unpacked(weight):
    """`[rows, cols]` in {-1, 0, 1}, bit by bit as the format says; padding must be zero weights."""
    row_blocks, col_blocks, _ = weight.codes.shape
    full = np.zeros((16 * row_blocks, 16 * col_blocks), int)
    for (nb, kb, byte), value in np.ndenumerate(np.asarray(weight.codes)):
        r, j = divmod(byte, 4)
        for s in range(4):
            full[16 * nb + r, 16 * kb + 4 * s + j] = ((int(value) >> (2 * s)) & 3) - 1
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


def weights(model):
    return {name: layer.weight.get_value() for name, layer in bit_linears(model)}


def with_exact_sums(model):
    """Weights that are multiples of 1/64 below 1: every float32 sum of 1024 of them is exact."""
    rng = np.random.default_rng(0)
    for _, layer in bit_linears(model):
        shape = layer.weight.get_value().shape
        layer.weight.set_value(jnp.asarray(rng.integers(-63, 64, shape) / 64, jnp.float32))
    return model


@pytest.mark.parametrize(("kind", "quantizer"), [("ternary", ternary), ("binary", binary)])
def test_codes_and_scale_are_bit_equal(kind, quantizer):
    # Sizes that are powers of two: the mean is exact too.
    model = with_exact_sums(
        tiny_model(weights=kind, num_layers=1, head_dim=4, num_kv_heads=1, intermediate_size=16)
    )
    got = weights(pack_model(model))
    assert len(got) == 7
    for name, w in weights(model).items():
        w = np.asarray(w)
        np.testing.assert_array_equal(unpacked(got[name]), quantizer(w), err_msg=name)
        assert np.asarray(got[name].scale) == absmean(w), name
        assert got[name].scale.dtype == np.float32
        assert got[name].shape == w.shape


@pytest.mark.parametrize(("kind", "quantizer"), [("ternary", ternary), ("binary", binary)])
def test_random_weights(kind, quantizer):
    model = tiny_model(weights=kind)
    got = weights(pack_model(model))
    assert len(got) == 14
    for name, w in weights(model).items():
        w = np.asarray(w)
        # A float32 mean of 1024 terms errs by less than 1024 * 2**-24 relative; far less summed
        # pairwise. Codes at a distance of 1e-3 from every threshold are certain.
        np.testing.assert_allclose(got[name].scale, absmean(w), rtol=6e-5)
        distance = np.abs(np.abs(w / absmean(w)) - 0.5) if kind == "ternary" else np.abs(
            w - w.mean()
        )  # fmt: skip
        sure = distance > 1e-3
        assert sure.mean() > 0.98
        np.testing.assert_array_equal(unpacked(got[name])[sure], quantizer(w)[sure])


def test_all_zero_weights():
    model = tiny_model(num_layers=1)
    model.blocks[0].ffn.down.weight.set_value(jnp.zeros((32, 24)))
    packed = weights(pack_model(model))["blocks.0.ffn.down"]
    assert not unpacked(packed).any()
    assert np.asarray(packed.scale) == np.float32(1e-5)


def test_the_original_is_left_alone():
    model = tiny_model(tie_embeddings=False)
    before = [np.array(leaf) for leaf in jax.tree.leaves(nnx.state(model))]
    packed = pack_model(model, "bfloat16")
    after = jax.tree.leaves(nnx.state(model))
    assert all(isinstance(w, jax.Array) for w in weights(model).values())
    assert all(isinstance(w, PackedTernary) for w in weights(packed).values())
    assert model.embedding[...].dtype == jnp.float32
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tables(tie, dtype):
    model = tiny_model(num_layers=1, tie_embeddings=tie)
    packed = pack_model(model, dtype)
    assert (packed.head is None) == tie
    for name in ("embedding",) if tie else ("embedding", "head"):
        table, original = getattr(packed, name)[...], getattr(model, name)[...]
        assert table.dtype == dtype
        np.testing.assert_array_equal(table, original.astype(dtype))
    assert packed.norm.scale[...].dtype == jnp.float32


def test_float32_tables_by_default():
    assert pack_model(tiny_model(num_layers=1)).embedding[...].dtype == jnp.float32


def test_a_full_precision_model_is_refused():
    model = tiny_model(num_layers=1, weights="float", activations="float")
    with pytest.raises(
        ValueError, match=r"^this model has float weights; only ternary and binary can be packed$"
    ):
        pack_model(model)


def test_a_packed_model_is_refused():
    packed = pack_model(tiny_model(num_layers=1))
    with pytest.raises(ValueError, match=r"^blocks\.0\.attention\.q is packed already$"):
        pack_model(packed)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(value):
    model = tiny_model()
    layer = model.blocks[1].ffn.gate
    layer.weight.set_value(layer.weight[...].at[5, 6].set(value))
    with pytest.raises(
        ValueError,
        match=r"^blocks\.1\.ffn\.gate holds 1 values that are not finite, .* at index \(5, 6\)",
    ):
        pack_model(model)
