"""What a ternary model's training is about: which codes its weights have, and how many change.

    minus, zero, plus   fractions of a layer's weights with code -1, 0 and 1
    flips               fraction whose code differs from that at the last report

Measured at reports only. Reports come with every checkpoint, so a resumed run compares with the
codes of the state it restored, as the unbroken run does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bitjax.model import Transformer, bit_linears
from bitjax.train import processes

Codes = dict[str, jax.Array]  # layer -> int8 [N, K]
LAYER_FIELDS = ("minus", "zero", "plus", "flips")


class CodeWatch:
    """Follows the codes of one run's layers; holds those of the last report, on the device.

    Args:
        model: parameters -> model.
        params: to compare the first report with.
    """

    def __init__(self, model: Callable[[nnx.State], Transformer], params: nnx.State) -> None:
        self._codes: Callable[[nnx.State], Codes] = jax.jit(lambda p: _codes(model(p)))
        self._measure: Callable[[nnx.State, Codes], tuple[Codes, jax.Array]] = jax.jit(
            lambda p, previous: _measure(_codes(model(p)), previous), donate_argnums=1
        )
        self._previous = self._codes(params)

    def restart(self, params: nnx.State) -> None:
        """Compare the next report with these parameters' codes."""
        self._previous = self._codes(params)

    def report(self, params: nnx.State) -> dict[str, dict[str, float]]:
        """Layer -> `LAYER_FIELDS`; quantised layers only, so empty for a full-precision model."""
        names = sorted(self._previous)  # as jit returns a dict
        if not names:
            return {}
        self._previous, fractions = self._measure(params, self._previous)
        rows = processes.whole(fractions).tolist()
        return {
            name: {field: round(x, 7) for field, x in zip(LAYER_FIELDS, row, strict=True)}
            for name, row in zip(names, rows, strict=True)
        }


def flip_rate(layers: dict[str, dict[str, float]], sizes: dict[str, int]) -> float | None:
    """Flips of all layers together, weighted by their sizes; None without quantised layers."""
    total = sum(sizes[name] for name in layers)
    return sum(layers[name]["flips"] * sizes[name] for name in layers) / total if total else None


def layer_sizes(model: Transformer) -> dict[str, int]:
    """Layer -> weights."""
    return {name: layer.weight[...].size for name, layer in bit_linears(model)}


def _codes(model: Transformer) -> Codes:
    return {
        name: layer.quantized().codes.astype(jnp.int8)
        for name, layer in bit_linears(model)
        if layer.weights != "float"
    }


def _measure(codes: Codes, previous: Codes) -> tuple[Codes, jax.Array]:
    """The codes, and float32 `[layers, 4]`: `LAYER_FIELDS` of the layers in sorted order."""

    def fractions(new: Any, old: Any) -> jax.Array:
        parts = (new == -1, new == 0, new == 1, new != old)
        return jnp.stack([jnp.mean(part, dtype=jnp.float32) for part in parts])

    return codes, jnp.stack([fractions(codes[name], previous[name]) for name in sorted(codes)])
