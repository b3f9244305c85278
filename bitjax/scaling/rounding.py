"""Post-training rounding: a float model as it is after its weights lost their bits."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx

from bitjax.config import RunConfig
from bitjax.model import Transformer, bit_linears
from bitjax.quant import int4_grouped, int8_per_row
from bitjax.scaling.arms import Rounding
from bitjax.train import Trainer
from bitjax.train.step import Params

INT4_GROUP = 32  # columns that share a multiplier, as in GGUF's Q4_0


def rounded_model(config: RunConfig, params: Params, to: Rounding) -> Transformer:
    """A float run's model with rounded linear layers; embedding, head and norms stay.

    Args:
        config: of the float run.
        params: of the float run.
        to: "ternary" (absmean, with int8 activations: the forward pass of a ternary model), "int8"
            or "int4" (weights alone).
    """
    if to == "ternary":
        model = dataclasses.replace(config.model, weights="ternary", activations="int8")
        return Trainer(dataclasses.replace(config, model=model)).model(params)
    made: Transformer = nnx.clone(Trainer(config).model(params))
    for _, layer in bit_linears(made):
        weight = np.asarray(layer.weight[...], np.float32)
        layer.weight.set_value(jnp.asarray(_int8(weight) if to == "int8" else _int4(weight)))
    return made


def _int8(w_NxK: np.ndarray) -> np.ndarray:
    codes, scale_N = int8_per_row(w_NxK)
    return codes.astype(np.float32) * scale_N[:, None]


def _int4(w_NxK: np.ndarray) -> np.ndarray:
    codes, multipliers, scale_N = int4_grouped(w_NxK, INT4_GROUP)
    steps = np.repeat(multipliers, INT4_GROUP, axis=1)[:, : w_NxK.shape[1]] * scale_N[:, None]
    return (codes * steps).astype(np.float32)
