"""Joules of a token: measured by the processor's own counters, or modelled from its arithmetic.

Measured: RAPL, the energy of whole processor packages, as Linux shows it under /sys/class/powercap.
Whatever else runs on the machine is in the figure; memory outside the package is not.

Modelled: the additions and multiplications of the matrix products, and nothing else (no memory
traffic, which costs far more on a processor of today). For a product of N x K weights, one token:

    float     N (K - 1) add16 + N K mul16
    ternary   N (K - 1) add8  + (N + K) mul16      the rest is scaling
    int8      N (K - 1) add8  + N K mul8           a packed head, int4 codes too
    attention 2 S heads head_dim (add16 + mul16)   S positions, in every layer

Source: Wang et al., BitNet, arXiv 2310.11453, section 2.3, equations 16 to 18 and table 2; the
attention term is what makes them give the figures of the BitNet b1.58 2B4T report,
arXiv 2504.12285, table 1.
"""

from __future__ import annotations

from pathlib import Path

from bitjax.model import Transformer, bit_linears
from bitjax.packing import PackedWeights, Screen

# Joules of an operation at 7 nm, BitNet's table 2.
ADD16, MUL16 = 0.16e-12, 0.34e-12
ADD8, MUL8 = 0.007e-12, 0.07e-12


class PackageMeter:
    """The energy counters of all processor packages.

    Args:
        root: where the kernel shows power capping zones.

    Attributes:
        readable: whether there are such counters and this user may read all of them.
    """

    def __init__(self, root: Path = Path("/sys/class/powercap")) -> None:
        # One colon: a package, or the whole platform; its parts (cores, memory) have two.
        zones = [z for z in sorted(root.glob("intel-rapl:*")) if z.name.count(":") == 1]
        try:
            self._zones = [z for z in zones if (z / "name").read_text().startswith("package")]
            self._ranges = [int((z / "max_energy_range_uj").read_text()) for z in self._zones]
            self._last = self._counters()
            self.readable = bool(self._zones)
        except (OSError, ValueError):  # kernels since 2020 show them to root only
            self.readable = False

    def joules(self) -> float:
        """Energy since the last call, or since the beginning; counters may have wrapped once."""
        now, last = self._counters(), self._last
        self._last = now
        used = zip(now, last, self._ranges, strict=True)
        return sum(a - b if a >= b else a - b + wrap for a, b, wrap in used) / 1e6

    def _counters(self) -> list[int]:
        return [int((zone / "energy_uj").read_text()) for zone in self._zones]


def modelled_joules(model: Transformer, context: int, quantized: bool = True) -> dict[str, float]:
    """Joules of the arithmetic of one token, by part: "layers", "attention" and "head".

    Args:
        model: with arrays or only their shapes.
        context: positions that attention reads.
        quantized: as the model is; False for the same shape all in float16.
    """
    config = model.config
    shapes: list[tuple[bool, tuple[int, int]]] = [
        (quantized and "float" not in (layer.weights, layer.activations),
         layer.weight.get_value().shape)
        for _, layer in bit_linears(model)
    ]  # fmt: skip
    table = next(p for p in (model.screen, model.head, model.embedding) if p is not None)
    head_int8 = quantized and isinstance(table.get_value(), PackedWeights | Screen)
    head = (config.vocab_size, config.hidden_size)
    width = config.num_layers * config.num_heads * config.head_dim
    return {
        "layers": sum(
            ternary_joules(N, K) if ternary else product_joules(N, K) for ternary, (N, K) in shapes
        ),
        "attention": 2 * context * width * (ADD16 + MUL16),
        "head": product_joules(*head, ADD8, MUL8) if head_int8 else product_joules(*head),
    }


def product_joules(N: float, K: float, add: float = ADD16, mul: float = MUL16) -> float:
    """Of a product with N x K weights, by default in float16."""
    return N * (K - 1) * add + N * K * mul


def ternary_joules(N: float, K: float) -> float:
    """Of a product with N x K ternary weights and int8 activations."""
    return N * (K - 1) * ADD8 + (N + K) * MUL16
