import jax
import pytest
from flax import nnx
from tiny import tiny_model

from bitjax.train import flops


def test_flops_are_those_xla_counts_in_the_forward_products():
    """XLA counts every operation; at these widths the products are all but a few per cent."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_layers": 1,
             "vocab_size": 512, "max_seq_len": 128}  # fmt: skip
    model = tiny_model(weights="float", activations="float", sub_norm=False, **shape)
    graph, params = nnx.split(nnx.eval_shape(lambda: model))
    tokens = jax.ShapeDtypeStruct((1, 128), "int32")
    lowered = jax.jit(lambda p, t: nnx.merge(graph, p)(t)).lower(params, tokens)
    counted = lowered.compile().cost_analysis()["flops"]
    forward = 128 * flops.flops_per_token(model.config, 128) / 3
    assert counted == pytest.approx(forward, rel=0.06)


def test_multiplying_weights_are_the_matrices_and_the_head():
    model = tiny_model(tie_embeddings=False)
    matrices = [x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)) if x.ndim == 2]
    D, V = model.config.hidden_size, model.config.vocab_size
    assert flops.multiplying_weights(model.config) == sum(matrices) - D * V  # not the look-up


def test_measured_peak_is_positive_and_measured_once():
    peak = flops.measured_peak("float32")
    assert 1e8 < peak < 1e14
    assert flops.measured_peak("float32") == peak
