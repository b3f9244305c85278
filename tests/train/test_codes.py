import jax
import numpy as np
import pytest
from flax import nnx
from tiny import tiny_model

from bitjax.train.codes import LAYER_FIELDS, CodeWatch, flip_rate, layer_sizes


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


def watch(model, params):
    graph = nnx.graphdef(model)
    return CodeWatch(lambda p: nnx.merge(graph, p), params)


def test_fractions_and_flips_are_numpys():
    models = [tiny_model(seed=s, num_layers=1, float_layers=("*.o",)) for s in (0, 1, 2)]
    states = [nnx.state(m, nnx.Param) for m in models]
    codes = [{n: absmean_codes(*w) for n, w in weights_of(m).items()} for m in models]
    watched = watch(models[0], states[0])
    for now in (1, 2):
        layers = watched.report(states[now])
        assert sorted(layers) == [f"blocks.0.{n}" for n in ("attention.qkv", "ffn.down",
                                                           "ffn.gate_up")]  # fmt: skip
        for name, fields in layers.items():
            new, old = codes[now][name], codes[now - 1][name]
            wanted = [(new == c).mean() for c in (-1, 0, 1)] + [(new != old).mean()]
            assert list(fields) == list(LAYER_FIELDS)
            np.testing.assert_allclose(list(fields.values()), wanted, atol=2e-7)  # 7 digits kept
        flipped = sum((codes[now][n] != codes[now - 1][n]).sum() for n in layers)
        total = sum(codes[now][n].size for n in layers)
        assert flip_rate(layers, layer_sizes(models[0])) == pytest.approx(flipped / total, abs=1e-6)
    assert {x["flips"] for x in watched.report(states[2]).values()} == {0.0}
    watched.restart(states[1])
    assert watched.report(states[2]) == layers


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


def test_a_full_precision_model_has_none():
    model = tiny_model(num_layers=1, weights="float", activations="float")
    params = nnx.state(model, nnx.Param)
    assert watch(model, params).report(params) == {}
    assert flip_rate({}, layer_sizes(model)) is None


def test_the_codes_of_the_last_report_stay_on_the_device_as_int8():
    model = tiny_model(num_layers=1)
    watched = watch(model, nnx.state(model, nnx.Param))
    assert {x.dtype for x in watched._previous.values()} == {np.dtype("int8")}
    assert all(isinstance(x, jax.Array) for x in watched._previous.values())
