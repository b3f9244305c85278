"""Programs lower for CUDA on a machine without a GPU, with no CPU custom call in them.

The training step's is in tests/train/test_step.py, the bare product's in tests/ops.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import tiny_model

from bitjax.infer import Generator, SamplingParams, pack_model
from bitjax.infer.programs import Program

FORMS = {
    "float": None,
    "packed": ("ternary2", "float32"),
    "packed tables": ("ternary1.6", "int8"),
    "int4 tables": ("ternary2", "int4"),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_evaluation(form, dtype):
    model, packed = tiny_model(dtype=dtype), FORMS[form]
    graph, params = nnx.split(model if packed is None else pack_model(model, *packed))
    traced = jax.jit(lambda p, t: nnx.merge(graph, p)(t)).trace(
        params, jax.ShapeDtypeStruct((2, 8), jnp.int32)
    )
    # Four products a layer, and the head's if it is packed.
    check(traced, 0 if packed is None else 8 + (packed[1] != "float32"))


@pytest.mark.parametrize("tables", ["float32", "int4", "screened"])
def test_packed_prefill_and_decode(tables):
    generator = Generator(pack_model(tiny_model(), tables=tables))
    products = 4  # the layers are alike: lowered once
    head = int(tables != "float32")
    cache = generator.empty.shapes(1, 16)
    arguments = (np.zeros((1, 16), np.int32), np.array([3], np.int32), np.int32(0))
    check(generator._fill.jitted.trace(cache, generator.leaves, *arguments), products)
    drawn, state, settings = generator._start([[1, 2]], [SamplingParams(top_k=3)], Program.shapes)
    check(generator.decode.jitted.trace(generator.leaves, state, drawn, settings), products + head)


def check(traced, products):
    """So many custom calls in the CPU program; none in any CUDA program."""
    on_cpu = traced.lower(lowering_platforms=("cpu",)).as_text()
    on_cuda = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert on_cpu.count("custom_call @bitjax_packed_matmul(") == products
    assert "bitjax" not in on_cuda
    assert "dot_general" in on_cuda
