"""What a model of N parameters weighs and what a token of it costs: bytes and joules.

Width and depth follow the published shapes of bitjax.presets, 700M to 70B, by interpolation of log
hidden size over log N (the line through the ends beyond them); the FFN is 8/3 of the width. So

    N = layers (4 h^2 + 3 h F)         layers need not be whole here
    bytes = N bits / 8 + vocabulary h table_bits / 8      tied embedding; norms and scales left out
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bitjax.bench.energy import ADD16, MUL16, product_joules, ternary_joules
from bitjax.presets import MODELS
from bitjax.scaling.arms import ARMS, non_embedding

SHAPES = ("b1.58-700m", "b1.58-1.3b", "b1.58-3b", "7b", "13b", "30b", "70b")
VOCABULARY = 32_000  # of these shapes
CONTEXT = 2048  # positions that attention reads
TABLE_BITS = 16.0  # bfloat16 embedding and head
INT4_BITS = 4.5  # groups of 32 with a scale of 16 bits
INT8_ACTIVATIONS = tuple(name for name, arm in ARMS.items() if arm.activations == "int8")


@dataclass(frozen=True)
class Shape:
    """A dense transformer of about a size."""

    hidden: float
    ffn: float
    layers: float

    @classmethod
    def of(cls, N: float) -> Shape:
        """The shape of N non-embedding parameters."""
        sizes, widths = _published()
        x = math.log(N)
        slope = (widths[-1] - widths[0]) / (sizes[-1] - sizes[0])
        if sizes[0] <= x <= sizes[-1]:
            log_h = float(np.interp(x, sizes, widths))
        else:
            end = 0 if x < sizes[0] else -1
            log_h = float(widths[end] + slope * (x - sizes[end]))
        h = math.exp(log_h)
        F = 8 / 3 * h
        return cls(h, F, N / (4 * h * h + 3 * h * F))


def stored_bits(arm: str) -> tuple[float, ...]:
    """Bits of a weight where the model runs (arrays of bytes, not entropy), the fewest first.

    Args:
        arm: one that is not in `ARMS` is taken for 16-bit floats.
    """
    known = ARMS.get(arm)
    if known is None or (known.weights == "float" and known.rounded == ""):
        return (16.0,)
    if known.rounded in ("int8", "int4"):
        return (8.0 if known.rounded == "int8" else INT4_BITS,)
    return (1.0,) if known.weights == "binary" else (1.6, 2.0)


def _published() -> tuple[np.ndarray, np.ndarray]:
    """log N and log hidden size of `SHAPES`, ascending."""
    configs = [MODELS[name] for name in SHAPES]
    return np.log([non_embedding(c) for c in configs]), np.log([c.hidden_size for c in configs])


def model_bytes(
    N: float, bits: float, vocabulary: int = VOCABULARY, table_bits: float = TABLE_BITS
) -> float:
    """Of weights and a tied embedding; inf for an infinite N."""
    if not math.isfinite(N):
        return math.inf
    return (N * bits + vocabulary * Shape.of(N).hidden * table_bits) / 8


def token_joules(N: float, arm: str, vocabulary: int = VOCABULARY, context: int = CONTEXT) -> float:
    """Of a token's arithmetic by the model of bitjax.bench.energy; a head and attention of 16-bit
    numbers in every arm; products with int8 activations are additions."""
    if not math.isfinite(N):
        return math.inf
    shape = Shape.of(N)
    product = ternary_joules if arm in INT8_ACTIVATIONS else product_joules
    h, F = shape.hidden, shape.ffn
    layer = 4 * product(h, h) + 2 * product(F, h) + product(h, F)
    attention = 2 * context * h * (ADD16 + MUL16)
    return shape.layers * (layer + attention) + product_joules(vocabulary, h)
