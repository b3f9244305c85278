"""Checkpoints made runnable for tests."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from bitjax.interop.checkpoint import STACKED, Ternary
from bitjax.model import Transformer
from bitjax.model.files import parameters
from bitjax.packing import pack


def runnable(checkpoint) -> Transformer:
    """The model of a checkpoint: packed where it is ternary, master weights elsewhere."""
    model = Transformer(checkpoint.config, rngs=nnx.Rngs(0))
    for name, parameter in parameters(model):
        shape = parameter.get_value().shape
        value = stacked(checkpoint, name.removesuffix(".weight").removesuffix(".scale"))
        if isinstance(value, Ternary):
            value = pack(value.codes, value.scale)
        else:
            value = jnp.asarray(value, jnp.float32)
        assert value.shape == shape, name
        parameter.set_value(value)
    return model


def stacked(checkpoint, path):
    """What a path of the model stands for, of the matrices that a checkpoint keeps apart."""
    norm = path.endswith(("qkv.norm", "gate_up.norm"))
    parent, _, last = path.removesuffix(".norm" if norm else "").rpartition(".")
    if last not in STACKED:
        return checkpoint.read(path)
    parts = [f"{parent}.{part}{'.norm' if norm else ''}" for part in STACKED[last]]
    values = [checkpoint.read(part) for part in parts]
    if norm:
        return np.stack(values)
    if not isinstance(values[0], Ternary):
        return np.concatenate(values)
    rows = [np.broadcast_to(value.scale, value.codes.shape[:1]) for value in values]
    return Ternary(np.concatenate([value.codes for value in values]), np.concatenate(rows))
