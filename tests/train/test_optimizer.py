import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import tiny_model

from bitjax.config import OptimizerConfig
from bitjax.train.optimizer import decay_mask, learning_rate, make_optimizer, weight_decay

CONFIG = OptimizerConfig(
    learning_rate=3.0, stage_two_learning_rate=2.0, weight_decay=0.1, stage_two_weight_decay=0.0,
    warmup_steps=4,
)  # fmt: skip


@pytest.mark.parametrize(
    ("step", "wanted"),
    [
        (0, 3 * 0.25),  # warm-up: (t + 1) / 4
        (3, 3 * 1 * (1 - 3 / 100)),
        (49, 3 * (1 - 49 / 100)),
        (50, 2 * (1 - 50 / 100)),  # the drop at the midpoint
        (99, 2 * 0.01),
        (100, 0.0),
    ],
)
def test_two_stage_learning_rate(step, wanted):
    assert float(learning_rate(CONFIG, 100)(step)) == pytest.approx(wanted, rel=1e-5)


def test_weight_decay_ends_with_stage_one():
    decay = weight_decay(CONFIG, 100)
    assert [round(float(decay(t)), 3) for t in (0, 49, 50, 99)] == [0.1, 0.1, 0.0, 0.0]


def test_one_stage_when_the_second_is_none():
    config = OptimizerConfig(stage_two_learning_rate=None, stage_two_weight_decay=None)
    rate = learning_rate(config, 1000)
    assert float(rate(500)) == pytest.approx(config.learning_rate * 0.5)
    assert float(weight_decay(config, 1000)(999)) == pytest.approx(0.1)


def test_trilms_weight_decay_ends_at_two_thirds_and_its_rate_drops_at_half():
    config = dataclasses.replace(CONFIG, weight_decay_stage_two_at=2 / 3)
    decay, rate = weight_decay(config, 300), learning_rate(config, 300)
    assert [round(float(decay(t)), 3) for t in (149, 150, 199, 200)] == [0.1, 0.1, 0.1, 0.0]
    assert float(rate(149)) == pytest.approx(3 * (1 - 149 / 300))
    assert float(rate(150)) == pytest.approx(2 * (1 - 150 / 300))


def test_a_cosine():
    config = dataclasses.replace(CONFIG, falling="cosine", stage_two_learning_rate=None)
    for t in (4, 25, 60, 99, 100):
        wanted = 3 * (1 + np.cos(np.pi * t / 100)) / 2
        assert float(learning_rate(config, 100)(t)) == pytest.approx(wanted, abs=1e-6)


def test_decay_touches_linear_weights_only():
    params = nnx.state(tiny_model(tie_embeddings=False, num_layers=1), nnx.Param)
    flat = jax.tree_util.tree_flatten_with_path(decay_mask(params))[0]
    decayed = sorted(
        jax.tree_util.keystr(path, simple=True, separator="/") for path, on in flat if on
    )
    assert len(decayed) == 4  # qkv and o, gate_up and down
    assert all("/weight" in path for path in decayed)
    assert len(flat) == 4 + 2 + 5  # embedding and head; four norms of the block, one at the end


def test_update_is_adamw_with_a_clipped_gradient():
    config = OptimizerConfig(
        learning_rate=0.1, stage_two_learning_rate=None, weight_decay=0.5,
        stage_two_weight_decay=None, warmup_steps=0, clip_norm=1.0,
    )  # fmt: skip
    params = {"weight": jnp.array([3.0, 4.0]), "scale": jnp.array([1.0])}
    gradient = {"weight": jnp.array([30.0, -40.0]), "scale": jnp.array([0.0])}
    optimizer = make_optimizer(config, 10)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    # First step of Adam: the sign of the gradient; plus decay 0.5 * w; times -lr.
    clipped = np.array([0.6, -0.8])
    wanted = -0.1 * (clipped / (np.abs(clipped) + 1e-8) + 0.5 * np.array([3.0, 4.0]))
    np.testing.assert_allclose(np.asarray(updates["weight"]), wanted, rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(updates["scale"]), [0.0])
