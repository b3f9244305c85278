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
from bitjax.infer.sampling import SamplingArrays


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("packed", [False, True], ids=["float", "packed"])
def test_evaluation(packed, dtype):
    model = tiny_model(dtype=dtype)
    graph, params = nnx.split(pack_model(model) if packed else model)
    traced = jax.jit(lambda p, t: nnx.merge(graph, p)(t)).trace(
        params, jax.ShapeDtypeStruct((2, 8), jnp.int32)
    )
    check(traced, packed)


def test_packed_prefill_and_decode():
    generator = Generator(pack_model(tiny_model()))
    settings = SamplingArrays.stack([SamplingParams(top_k=3)])
    cache = generator._empty_cache(1, 16)
    arguments = (np.zeros((1, 16), np.int32), np.array([3], np.int32), cache, settings)
    check(generator._prefill.trace(generator._params, *arguments), packed=True)
    state = jax.eval_shape(generator._prefill, generator._params, *arguments)
    check(generator._decode.trace(generator._params, state, settings), packed=True)


def check(traced, packed):
    """A custom call in the CPU program of a packed model; none in any CUDA program."""
    on_cpu = traced.lower(lowering_platforms=("cpu",)).as_text()
    on_cuda = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert ("bitjax_ternary_matmul" in on_cpu) == packed
    assert "bitjax" not in on_cuda
    assert "dot_general" in on_cuda
