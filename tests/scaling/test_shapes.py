import dataclasses
import math

import pytest

from bitjax.bench.energy import modelled_joules
from bitjax.model import abstract_model
from bitjax.presets import MODELS
from bitjax.scaling.arms import ARMS, non_embedding
from bitjax.scaling.shapes import (
    INT8_ACTIVATIONS,
    SHAPES,
    Shape,
    model_bytes,
    stored_bits,
    token_joules,
)


@pytest.mark.parametrize("name", SHAPES)
def test_published_shapes_come_back(name):
    config = MODELS[name]
    N = non_embedding(config)
    shape = Shape.of(N)
    assert shape.hidden == pytest.approx(config.hidden_size, rel=1e-9)
    # Their FFNs are 8/3 to 3 times as wide as the model.
    assert shape.layers == pytest.approx(config.num_layers, rel=0.1)


def test_parameters_add_up_at_any_size():
    for N in (1e5, 3e7, 2e9, 1e11, 1e13):
        s = Shape.of(N)
        assert s.layers * (4 * s.hidden**2 + 3 * s.hidden * s.ffn) == pytest.approx(N)
    assert Shape.of(1e5).hidden < Shape.of(1e6).hidden < 1024


def test_every_arm_has_its_bits():
    assert {arm: stored_bits(arm) for arm in (*ARMS, "of another table")} == {
        "ternary": (1.6, 2), "float": (16,), "binary": (1,), "ternary_float_activations": (1.6, 2),
        "continual": (1.6, 2), "ptq_ternary": (1.6, 2), "ptq_int8": (8,), "ptq_int4": (4.5,),
        "of another table": (16,),
    }  # fmt: skip
    assert INT8_ACTIVATIONS == ("ternary", "binary", "continual", "ptq_ternary")


def test_bytes():
    h = Shape.of(7e9).hidden
    assert model_bytes(7e9, 1.6, 32_000, 16) == pytest.approx(7e9 * 0.2 + 2 * 32_000 * h)
    assert model_bytes(math.inf, 1.6) == math.inf


@pytest.mark.parametrize("quantized", [True, False])
def test_joules_are_those_of_a_model_of_the_shape(quantized):
    base = MODELS["b1.58-3b"]
    config = dataclasses.replace(
        base, num_layers=2, intermediate_size=round(base.hidden_size * 8 / 3), vocab_size=32_000
    )
    parts = modelled_joules(abstract_model(config), 2048, quantized)
    layers = Shape.of(non_embedding(base)).layers
    expected = parts["layers"] / 2 * layers + parts["attention"] / 2 * layers + parts["head"]
    found = token_joules(non_embedding(base), "ternary" if quantized else "float")
    assert found == pytest.approx(expected, rel=2e-3)
