"""Stochastic rounding in training: what is drawn when. That a resumed run draws the same is seen in
tests/train/test_loop.py, whose runs draw."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import tiny_config

from bitjax.config import OptimizerConfig, RunConfig, TrainConfig
from bitjax.model import bit_linears
from bitjax.train import Batch, Trainer
from bitjax.train.step import FINISHED, Quantizing

BATCH = Batch(np.random.default_rng(0).integers(0, 256, (4, 9)).astype(np.int32))


def config(rounding, **changes):
    settings = {"steps": 6, "batch_size": 4, "seq_len": 8, "log_every": 1, "checkpoint_every": 2}
    return RunConfig(
        model=tiny_config(num_layers=1),
        optimizer=OptimizerConfig(warmup_steps=2),
        train=TrainConfig(stochastic_rounding=rounding, **settings | changes),
    )


@pytest.fixture(scope="module")
def both():
    return Trainer(config("both"))


@pytest.fixture(scope="module")
def params(both):
    return both.init().params


def at(step, rounding, **changes):
    return Quantizing.at(jnp.int32(step), config(rounding, **changes).train)


def set_keys(trainer, params, how):
    """Layer -> bits of its keys."""
    model = trainer.model(params)
    how.set(model)
    return {
        name: [
            None if key is None else tuple(jax.random.key_data(key).tolist())
            for key in (layer.weight_key, layer.activation_key)
        ]
        for name, layer in bit_linears(model)
    }


def test_every_step_layer_and_kind_has_its_own_key(both, params):
    found = [set_keys(both, params, at(step, "both")) for step in (0, 1)]
    found.append(set_keys(both, params, at(0, "both", seed=1)))
    found.append(set_keys(both, params, at(0, "both").of_part(jnp.int32(1))))
    keys = [key for keys in found for pair in keys.values() for key in pair]
    # Parts of a step share the keys of weights.
    assert len(keys) == 4 * 4 * 2
    assert len(set(keys)) == len(keys) - 4
    assert [w for w, _ in found[0].values()] == [w for w, _ in found[3].values()]


@pytest.mark.parametrize(
    ("rounding", "weights", "activations"),
    [("none", False, False), ("weights", True, False), ("activations", False, True)],
)
def test_what_is_drawn_is_chosen(both, params, rounding, weights, activations):
    keys = set_keys(both, params, at(3, rounding)).values()
    assert {(w is not None, x is not None) for w, x in keys} == {(weights, activations)}


def test_a_step_repeats_itself_another_differs_and_evaluation_is_fixed(both, params):
    loss = jax.jit(lambda how: both._sums(params, BATCH, how)["loss"])
    drawn = [float(loss(at(step, "both"))) for step in (0, 1, 1)]
    finished = float(loss(FINISHED))
    assert drawn[1] == drawn[2]
    assert len({finished, *drawn}) == 3
    assert float(loss(at(1, "none"))) == finished
    means = [float(both.means(params, BATCH)["loss"]) for _ in range(2)]
    assert means[0] == means[1] == pytest.approx(finished / 32, rel=1e-5)


def test_a_layers_outputs_average_to_those_of_its_clipped_weights(both, params):
    """Five standard deviations of the mean of n outputs, each a sum of independent draws."""
    layer = both.model(params).blocks[0].attention.o
    layer.activations = "float"
    x = np.random.default_rng(3).standard_normal((2, 24))
    graph, state = nnx.split(layer)

    @jax.vmap
    def outputs(key):
        drawn = nnx.merge(graph, state)
        drawn.weight_key = key
        return drawn(jnp.asarray(x, jnp.float32))

    n = 2000
    found = np.asarray(outputs(jax.random.split(jax.random.key(5), n)), np.float64)
    scale = float(layer.quantized().scale[0, 0])
    w = np.clip(np.asarray(layer.weight[...], np.float64), -scale, scale)
    f = np.abs(w / scale) % 1
    spread = np.sqrt(x**2 @ (f * (1 - f)).T * scale**2 / n)
    np.testing.assert_array_less(np.abs(found.mean(axis=0) - x @ w.T), 5 * spread)


@pytest.mark.parametrize(
    ("name", "rounding"), [("weights", "both"), ("activations", "activations")]
)
def test_what_is_float_is_never_rounded(name, rounding):
    model = tiny_config(**{name: "float"})
    settings = TrainConfig(stochastic_rounding=rounding, seq_len=8)
    message = rf"rounding='{rounding}' rounds {name}, and model\.{name}='float' are never rounded"
    with pytest.raises(ValueError, match=message):
        RunConfig(model=model, train=settings)
