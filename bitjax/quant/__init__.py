"""Quantisers of BitNet and its relatives: weights, activations, tables; straight-through gradients.

Every quantiser of training returns float32 integer-valued `codes` and a `scale` that MULTIPLIES:

    dequant(x) = codes * scale

The sources write the reciprocal scale s and divide; ours is 1/s. The equations are in
`bitjax.quant.weights` and `bitjax.quant.activations`. To add a quantiser: write it there, add its
name to the choices of `ModelConfig` and one line to `WEIGHT_QUANTIZERS` or `ACTIVATION_QUANTIZERS`.

Rounding is to nearest, ties to even, or stochastic where training asks for it (`rounded`). "W / m"
is computed as `W * (1/m)`, "x * 127 / a" as `x * (127 / a)`, and the scale as a product because XLA
turns a division by a constant into one; all in float32 whatever the input's dtype. So all
implementations (this one, the C++ kernels, a packed file) agree to the bit.

Deliberately absent: NaN and infinity are not replaced. They make the scale NaN, so they surface
in the output; `require_finite` refuses them where weights enter.
"""

from bitjax.quant.activations import (
    ACTIVATION_QUANTIZERS,
    hadamard,
    hadamard_block,
    int4_per_token,
    int8_per_token,
)
from bitjax.quant.codes import (
    EPS,
    EXACT_FLOAT32_TERMS,
    Quantized,
    require_finite,
    rounded,
    straight_through,
)
from bitjax.quant.tables import int4_dithered, int4_grouped, int8_per_row
from bitjax.quant.weights import (
    WEIGHT_QUANTIZERS,
    Segments,
    Sharing,
    binary,
    initial_scale,
    quantize_matrix,
    ternary,
    ternary_learned,
    ternary_median,
)

__all__ = [
    "ACTIVATION_QUANTIZERS", "EPS", "EXACT_FLOAT32_TERMS", "WEIGHT_QUANTIZERS", "Quantized",
    "Segments", "Sharing", "binary", "hadamard", "hadamard_block", "initial_scale",
    "int4_dithered", "int4_grouped", "int4_per_token", "int8_per_row", "int8_per_token",
    "quantize_matrix", "require_finite", "rounded", "straight_through", "ternary",
    "ternary_learned", "ternary_median",
]  # fmt: skip
