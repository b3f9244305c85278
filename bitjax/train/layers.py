"""What the layers of a run do: codes, how many change, and how large their inputs are.

    minus, zero, plus   fractions of a layer's weights with code -1, 0 and 1
    flips               fraction whose code differs from that at the last report
    absmax              the largest magnitude among the layer's inputs, after norms and transform,
                        as they are quantised, on a few rows of the held-out part: always the same

The codes are rounded to nearest, and the inputs those of the finished model, whatever training does
(warm-up, stochastic rounding). Layers in full precision have `absmax` alone.

Measured at reports only. Reports come with every checkpoint, so a resumed run compares with the
codes of the state it restored, as the unbroken run does.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitjax.corpus.rows import Batch
from bitjax.model import Transformer, bit_linears
from bitjax.train import processes
from bitjax.train.step import Params, Trainer

Codes = dict[str, jax.Array]  # layer -> int8 [N, K]
LAYER_FIELDS = ("minus", "zero", "plus", "flips")  # of quantised weights
# Rows for `absmax`: a pass through them costs about a hundredth of ten steps, forwards and back.
_SHARE = 8  # of the batch's rows
_MOST = 4


class LayerWatch:
    """Follows the layers of one run; holds the codes of the last report, on the device.

    Args:
        trainer: of the run.
        params: to compare the first report with.
        rows: of the held-out part, some of which the inputs are measured on.
    """

    def __init__(self, trainer: Trainer, params: Params, rows: Batch) -> None:
        count = max(1, min(_MOST, trainer.config.train.batch_size // _SHARE))
        places = np.linspace(0, len(rows.tokens) - 1, count).astype(int)
        kept = Batch(rows.tokens[places], None if rows.segments is None else rows.segments[places])
        self._rows = trainer.place_batch(kept, cut=False)
        self._codes = jax.jit(lambda p: _codes(trainer.model(p)))
        self._measure = jax.jit(
            lambda p, previous, rows: (
                *_compared(_codes(trainer.model(p)), previous), _absmax(trainer.model(p), rows),
            ),
            donate_argnums=1,
        )  # fmt: skip
        self._previous: Codes = self._codes(params)

    def restart(self, params: Params) -> None:
        """Compare the next report with these parameters' codes."""
        self._previous = self._codes(params)

    def report(self, params: Params) -> dict[str, dict[str, float]]:
        """Layer -> `absmax` and, of quantised layers, `LAYER_FIELDS`."""
        self._previous, fractions, absmax = self._measure(params, self._previous, self._rows)
        found: dict[str, dict[str, float]] = {name: {} for name in absmax}
        for name, row in zip(sorted(self._previous), processes.whole(fractions), strict=True):
            found[name] = {f: round(float(x), 7) for f, x in zip(LAYER_FIELDS, row, strict=True)}
        for name, value in absmax.items():
            found[name]["absmax"] = float(processes.whole(value))
        return found


def flip_rate(layers: dict[str, dict[str, float]], sizes: dict[str, int]) -> float | None:
    """Flips of all layers together, weighted by their sizes; None without quantised layers."""
    quantized = [name for name, fields in layers.items() if "flips" in fields]
    total = sum(sizes[name] for name in quantized)
    return sum(layers[n]["flips"] * sizes[n] for n in quantized) / total if total else None


def layer_sizes(model: Transformer) -> dict[str, int]:
    """Layer -> weights."""
    return {name: layer.weight[...].size for name, layer in bit_linears(model)}


def _codes(model: Transformer) -> Codes:
    return {
        name: layer.quantized().codes.astype(jnp.int8)
        for name, layer in bit_linears(model)
        if layer.weights != "float"
    }


def _compared(codes: Codes, previous: Codes) -> tuple[Codes, jax.Array]:
    """The codes, and float32 `[layers, 4]`: `LAYER_FIELDS` of the layers in sorted order."""

    def fractions(new: Any, old: Any) -> jax.Array:
        parts = (new == -1, new == 0, new == 1, new != old)
        return jnp.stack([jnp.mean(part, dtype=jnp.float32) for part in parts])

    rows = [fractions(codes[name], previous[name]) for name in sorted(codes)]
    return codes, jnp.stack(rows) if rows else jnp.zeros((0, len(LAYER_FIELDS)))


def _absmax(model: Transformer, rows: Batch) -> dict[str, jax.Array]:
    """Layer -> float32 scalar."""
    layers = dict(bit_linears(model))
    for layer in layers.values():
        layer.watched = True
    segments = None if rows.segments is None else jnp.asarray(rows.segments)[:, :-1]
    tokens = jnp.asarray(rows.tokens)[:, :-1]
    model.extend(
        tokens, jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape), None, segments
    )
    return {name: layer.absmax for name, layer in layers.items() if layer.absmax is not None}
