"""Checkpoints of models in memory, and models of checkpoints."""

import jax.numpy as jnp
import numpy as np

from bitjax.interop.checkpoint import STACKED, Checkpoint, Ternary, tensor_shapes
from bitjax.model import abstract_model, bit_linears
from bitjax.model.files import parameters
from bitjax.packing import pack


def checkpoint_of(model, tokenizer=None) -> Checkpoint:
    """A float model as a checkpoint."""
    stored = {name: np.asarray(parameter[...]) for name, parameter in parameters(model)}
    tensors = {}
    for name in tensor_shapes(model.config):
        parent, _, part = name.rpartition(".")
        layer = next((layer for layer, parts in STACKED.items() if part in parts), part)
        if f"{parent}.{layer}.weight" not in stored:
            tensors[name] = stored.get(f"{name}.scale", stored.get(name))
            continue
        sizes = dict(bit_linears(model))[f"{parent}.{layer}"].segments
        parts = STACKED.get(layer, (part,))
        rows = np.split(stored[f"{parent}.{layer}.weight"], np.cumsum(sizes)[:-1])
        tensors[name] = rows[parts.index(part)]
    return Checkpoint("model", model.config, tensors.__getitem__, tokenizer)


def model_of(checkpoint):
    """A model of a checkpoint: linear layers packed where they are ternary."""
    config = checkpoint.config
    model = abstract_model(config)
    layers = dict(bit_linears(model))
    for name, parameter in parameters(model):
        layer = name.removesuffix(".weight")
        if layer not in layers:
            value = np.asarray(checkpoint.read(name.removesuffix(".scale")), np.float32)
        else:
            parent, _, last = layer.rpartition(".")
            value = stacked([checkpoint.read(f"{parent}.{p}") for p in STACKED.get(last, (last,))])
        parameter.set_value(value if hasattr(value, "layout") else jnp.asarray(value))
    return model


def stacked(parts):
    """Matrices that read the same input as one, float or packed."""
    if not isinstance(parts[0], Ternary):
        return np.concatenate([np.asarray(part, np.float32) for part in parts])
    scales = np.concatenate([np.broadcast_to(p.scale, len(p.codes)) for p in parts])
    scale = scales if len(parts) > 1 or parts[0].scale.ndim else parts[0].scale
    return pack(np.concatenate([part.codes for part in parts]), scale, "ternary2")
