import jax
import numpy as np
import pytest
from flax import nnx
from tiny import tiny_model

from bitjax.config import RunConfig, TrainConfig
from bitjax.train import Batch, Trainer
from bitjax.train.layers import LAYER_FIELDS, LayerWatch, flip_rate, layer_sizes

ROWS = Batch(np.random.default_rng(0).integers(0, 256, (9, 9)).astype(np.int32))


def absmean_codes(weight, segments):
    """Independent of the library: float64, each stacked matrix by its own mean."""
    parts = np.split(weight.astype(np.float64), np.cumsum(segments)[:-1])
    return np.concatenate([np.clip(np.rint(w / np.abs(w).mean()), -1, 1) for w in parts])


def weights_of(model):
    return {
        name: (np.asarray(layer.weight[...]), layer.segments or (len(layer.weight[...]),))
        for i, block in enumerate(model.blocks)
        for name, layer in (
            (f"blocks.{i}.attention.qkv", block.attention.qkv),
            (f"blocks.{i}.attention.o", block.attention.o),
            (f"blocks.{i}.ffn.gate_up", block.ffn.gate_up),
            (f"blocks.{i}.ffn.down", block.ffn.down),
        )
    }


def watch(model, params, rows=ROWS, batch_size=8):
    train = TrainConfig(batch_size=batch_size, seq_len=8)
    return LayerWatch(Trainer(RunConfig(model=model.config, train=train)), params, rows)


def test_fractions_and_flips_are_numpys():
    models = [tiny_model(seed=s, num_layers=1, float_layers=("*.o",)) for s in (0, 1, 2)]
    states = [nnx.state(m, nnx.Param) for m in models]
    codes = [{n: absmean_codes(*w) for n, w in weights_of(m).items()} for m in models]
    watched = watch(models[0], states[0])
    for now in (1, 2):
        layers = watched.report(states[now])
        assert set(layers.pop("blocks.0.attention.o")) == {"absmax"}
        assert sorted(layers) == [f"blocks.0.{n}" for n in ("attention.qkv", "ffn.down",
                                                           "ffn.gate_up")]  # fmt: skip
        for name, fields in layers.items():
            new, old = codes[now][name], codes[now - 1][name]
            wanted = [(new == c).mean() for c in (-1, 0, 1)] + [(new != old).mean()]
            assert list(fields) == [*LAYER_FIELDS, "absmax"]
            found = list(fields.values())[:4]
            np.testing.assert_allclose(found, wanted, atol=2e-7)  # 7 digits kept
        flipped = sum((codes[now][n] != codes[now - 1][n]).sum() for n in layers)
        total = sum(codes[now][n].size for n in layers)
        assert flip_rate(layers, layer_sizes(models[0])) == pytest.approx(flipped / total, abs=1e-6)
    assert {x.get("flips", 0.0) for x in watched.report(states[2]).values()} == {0.0}
    watched.restart(states[1])
    again = watched.report(states[2])
    assert {name: again[name] for name in layers} == layers


@pytest.mark.parametrize("changes", [{"weight_scale": "row"}, {"weights": "ternary_learned"}])
def test_codes_are_those_of_the_forward_pass(changes):
    """With scales of rows, and a learned one that has moved to three times its beginning."""
    model = tiny_model(num_layers=1, **changes)
    layer = model.blocks[0].ffn.gate_up
    weight = np.asarray(layer.weight[...], np.float64)
    size = np.abs(weight).mean(axis=1, keepdims=True)
    if layer.learned_scale is not None:
        layer.learned_scale.set_value(3 * layer.learned_scale[...])
        size = 3 * np.abs(weight.reshape(2, -1)).mean(axis=1).repeat(24)[:, None]
    params = nnx.state(model, nnx.Param)
    found = list(watch(model, params).report(params)["blocks.0.ffn.gate_up"].values())[:3]
    codes = np.clip(np.rint(weight / size), -1, 1)
    np.testing.assert_allclose(found, [(codes == c).mean() for c in (-1, 0, 1)], atol=2e-7)
    usual = absmean_codes(weight, (24, 24))
    assert (codes != usual).mean() > 0.02


def rms_norm(x, norm):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + norm.eps) * np.asarray(norm.scale[...])


def test_absmax_is_that_of_what_is_quantised():
    """Of the first layer's q, k, v the normed embeddings; of `o` with a transform NumPy's.

    Two of the nine rows: a batch of 16 has an eighth of its rows, spread over the held-out ones.
    """
    model = tiny_model(num_layers=1, hadamard=True)
    model.blocks[0].attention_norm.scale.set_value(np.linspace(0.5, 2, 32).astype(np.float32))
    params = nnx.state(model, nnx.Param)
    layers = watch(model, params, batch_size=16).report(params)
    tokens = ROWS.tokens[[0, 8], :-1]
    embedded = np.asarray(model.embedding[...], np.float64)[tokens]
    normed = rms_norm(embedded, model.blocks[0].attention_norm)
    assert layers["blocks.0.attention.qkv"]["absmax"] == pytest.approx(np.abs(normed).max(), 1e-5)
    seen = {}

    def keep(x, *rest, before=model.blocks[0].attention.o._product, **more):
        seen["o"] = x.reshape(-1, x.shape[-1])
        return before(x, *rest, **more)

    object.__setattr__(model.blocks[0].attention.o, "_product", keep)
    inputs = jax.jit(lambda tokens: (model(tokens), dict(seen))[1])(tokens)
    block = np.array([[1.0]])
    for _ in range(3):  # 24 = 3 * 8 features
        block = np.block([[block, block], [block, -block]])
    turned = np.asarray(inputs["o"], np.float64).reshape(-1, 3, 8) @ block / np.sqrt(8)
    assert layers["blocks.0.attention.o"]["absmax"] == pytest.approx(np.abs(turned).max(), rel=1e-5)


def test_stacked_matrices_with_their_own_norms_give_the_largest():
    model = tiny_model(num_layers=1, linear_norm_eps=1e-5)
    scales = np.ones((3, 32), np.float32) * np.array([[1], [7], [2]], np.float32)
    model.blocks[0].attention.qkv.norm.scale.set_value(scales)
    params = nnx.state(model, nnx.Param)
    layers = watch(model, params, Batch(ROWS.tokens[:1])).report(params)
    block = model.blocks[0]
    x = np.asarray(model.embedding[...], np.float64)[ROWS.tokens[:1, :-1]]
    x = rms_norm(rms_norm(x, block.attention_norm), block.ffn_norm)  # the same eps, scales of 1
    assert layers["blocks.0.attention.qkv"]["absmax"] == pytest.approx(7 * np.abs(x).max(), 1e-5)


def test_a_full_precision_model_has_no_codes():
    model = tiny_model(num_layers=1, weights="float", activations="float")
    params = nnx.state(model, nnx.Param)
    layers = watch(model, params).report(params)
    assert [set(fields) for fields in layers.values()] == [{"absmax"}] * 4
    assert flip_rate(layers, layer_sizes(model)) is None


def test_the_codes_of_the_last_report_stay_on_the_device_as_int8():
    model = tiny_model(num_layers=1)
    watched = watch(model, nnx.state(model, nnx.Param))
    assert {x.dtype for x in watched._previous.values()} == {np.dtype("int8")}
    assert all(isinstance(x, jax.Array) for x in watched._previous.values())
