"""Building blocks: BitLinear, RMSNorm, rotary embedding and the gated FFN.

BitLinear is where the two worlds meet. Its `weight` holds either a float master weight, which is
fake-quantised on every call with straight-through gradients, or `PackedWeights`, which go to the
packed product. The type of the parameter decides; there is no mode.

Both compute `y = (codes_x @ codes_w.T) * (scale_x * scale_w)`: integer-valued codes, an exact sum,
then one scaling in the same association. So a trained layer and its packed form agree to the bit
in float32 when they are given the same activations.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bitjax import ops
from bitjax.config import ModelConfig, RopeScaling
from bitjax.ops import reference
from bitjax.ops import rows as row_ops
from bitjax.packing import PackedWeights
from bitjax.quant import (
    ACTIVATION_QUANTIZERS,
    WEIGHT_QUANTIZERS,
    Quantized,
    Segments,
    Sharing,
    hadamard,
    initial_scale,
)


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * scale`, computed in float32 (arXiv 1910.07467)."""

    def __init__(self, features: int, eps: float) -> None:
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise the last axis; returns x's shape and dtype."""
        return reference.rms_norm(x, self.scale[...], self.eps).astype(x.dtype)


class RMSNorms(nnx.Module):
    """Several RMSNorms of the same input, stacked: `[..., K]` to `[..., count, K]`."""

    def __init__(self, count: int, features: int, eps: float) -> None:
        self.scale = nnx.Param(jnp.ones((count, features), jnp.float32))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise the last axis once for each scale; keeps x's dtype."""
        each = [reference.rms_norm(x, scale, self.eps) for scale in self.scale[...]]
        return jnp.stack(each, axis=-2).astype(x.dtype)


class BitLinear(nnx.Module):
    """A linear layer with quantised weights and activations, and no bias.

    `config.weights` and `config.activations` choose the quantisers; with both "float" it is a
    plain linear layer. Several matrices that read the same input are stacked as one, each with its
    own scale. With `config.inner_norm` an RMSNorm precedes the quantisation (2024 listing of "The
    Era of 1-bit LLMs: Training Tips, Code and FAQ", figure 3); with `config.linear_norm_eps` it is
    one of its own for each stacked matrix (`use_rms_norm` of Hugging Face's BitNet layers). What
    `config.float_layers` names has neither quantisers nor that norm; the Transformer, which knows
    the names, takes them away.

    Args:
        in_features: K.
        segments: output features of each stacked matrix; their sum is N.
        config: number formats and initial scale.
        rngs: source of the initial weights.
        transform: whether `config.hadamard` concerns this layer (H-BitLinear of BitNet v2, arXiv
            2504.18415): a Hadamard transform between the norms and the quantisation.

    Attributes:
        strength: lambda of the quantisation warm-up, a scalar in 0..1 (`Quantized.softened`); None
            is full quantisation. Not stored: whoever schedules it sets it.
    """

    def __init__(
        self,
        in_features: int,
        *segments: int,
        config: ModelConfig,
        rngs: nnx.Rngs,
        transform: bool = False,
    ) -> None:
        tables = [jax.random.normal(rngs.params(), (n, in_features)) for n in segments]
        self.weight: nnx.Param = nnx.Param(config.init_std * jnp.concatenate(tables))
        self.segments: Segments = segments if len(segments) > 1 else ()
        self.sharing = Sharing(config.weight_scale, config.weight_group)
        self.learned_scale: nnx.Param | None = nnx.data(None)
        if config.weights == "ternary_learned":
            start = initial_scale(self.weight[...], self.segments, self.sharing)
            self.learned_scale = nnx.Param(start)
        self.strength: jax.Array | None = nnx.data(None)
        self.hadamard = transform and config.hadamard
        norm: RMSNorm | RMSNorms | None = None
        if config.inner_norm:
            norm = RMSNorm(in_features, config.norm_eps)
        elif config.linear_norm_eps is not None and len(segments) == 1:
            norm = RMSNorm(in_features, config.linear_norm_eps)
        elif config.linear_norm_eps is not None:
            norm = RMSNorms(len(segments), in_features, config.linear_norm_eps)
        self.norm = norm
        self.weights = config.weights
        self.activations = config.activations
        self.impl: ops.Impl = "auto"
        self.fuse = True  # a packed product takes gate, norm and residual into its custom call

    def __call__(
        self,
        x: jax.Array,
        *,
        gate: reference.Gate = "none",
        norm: RMSNorm | None = None,
        residual: jax.Array | None = None,
        rows: jax.Array | None = None,
    ) -> jax.Array:
        """`residual + linear(norm(gate(x)))`: `[..., K]` (with a gate `[..., 2K]`) to `[..., N]`.

        With `rows`, int32 `[1]`, x is `[R, K]`, of which so many rows are wanted, and each is
        computed as if it were alone (`bitjax.ops.rows`).

        The neighbours are arguments so that the packed product can take them in: it then computes
        in float32 from gate to sum, and nothing between travels to memory.
        """
        weight = self.weight.get_value()
        norms: list[RMSNorm | RMSNorms] = [n for n in (norm, self.norm) if n is not None]
        packed = isinstance(weight, PackedWeights) and self.activations != "float"
        each = isinstance(self.norm, RMSNorms)  # x then gets a further axis, one row a segment
        if packed and self.fuse and len(norms) < 2 and not each:
            scale, eps = (norms[0].scale[...], norms[0].eps) if norms else (None, 0.0)
            return ops.packed_matmul(
                x, weight, gate=gate, norm=scale, eps=eps, residual=residual, rows=rows,
                impl=self.impl,
            )  # fmt: skip
        if rows is not None:
            x = self._prepared(x, gate, norms, rows)
        else:
            if gate != "none":
                x = reference.gated(gate, *jnp.split(x, 2, axis=-1))
            for applied in norms:
                x = applied(x)
        ends = tuple(np.cumsum(self.segments))
        if isinstance(weight, PackedWeights):
            # Of stacked matrices with their own norms each is multiplied with the inputs of all:
            # packed weights are not sliced, and reading them is what takes time.
            of_all = rows if rows is None or not each else rows * len(self.segments)
            y = self._packed(x, weight, of_all)
            if each:
                matrix_rows = jnp.split(y, ends[:-1], axis=-1)
                parts = [part[..., s, :] for s, part in enumerate(matrix_rows)]
                y = jnp.concatenate(parts, axis=-1)
        elif each:
            codes, scale = self._quantized_weights(weight)
            matrices = jnp.split(codes, ends[:-1])
            scales = [None] * len(ends) if scale is None else jnp.split(scale, ends[:-1])
            parts = [
                self._product(x[..., s, :], *matrix, rows)
                for s, matrix in enumerate(zip(matrices, scales, strict=True))
            ]
            y = jnp.concatenate(parts, axis=-1)
        else:
            y = self._product(x, *self._quantized_weights(weight), rows)
        return y if residual is None else residual + y

    def _prepared(
        self,
        x_RxK: jax.Array,
        gate: reference.Gate,
        norms: list[RMSNorm | RMSNorms],
        rows: jax.Array,
    ) -> jax.Array:
        """`norms(gate(x))` row by row; several stacked norms give `[R, count, K]`."""
        one = functools.partial(row_ops.prepare, count_1=rows, impl=self.impl)
        if gate != "none":
            x_RxK = one(x_RxK, gate=gate)
        for norm in norms:
            if isinstance(norm, RMSNorms):
                each = [one(x_RxK, norm=scale, eps=norm.eps) for scale in norm.scale[...]]
                return jnp.stack(each, axis=-2)  # always the last
            x_RxK = one(x_RxK, norm=norm.scale[...], eps=norm.eps)
        return x_RxK

    def _packed(
        self, x: jax.Array, weight: PackedWeights, rows: jax.Array | None = None
    ) -> jax.Array:
        if self.activations == "float":
            return ops.dequantized_matmul(x, weight, self.impl, rows)
        return ops.packed_matmul(x, weight, impl=self.impl, rows=rows)

    def make_float(self) -> None:
        """Take away quantisers, transform and learned scale."""
        self.weights = self.activations = "float"
        self.learned_scale, self.hadamard = None, False

    def quantized(self) -> Quantized:
        """The float master weights as the forward pass quantises them."""
        learned = None if self.learned_scale is None else self.learned_scale[...]
        quantizer = WEIGHT_QUANTIZERS[self.weights]
        return quantizer(self.weight[...], self.segments, self.sharing, learned)

    def _quantized_weights(self, w_NxK: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Codes and a scale for all rows or for each; without a scale real values."""
        if self.weights == "float":
            return w_NxK, None
        quantized = self.quantized()
        if self.strength is not None:
            quantized = quantized.softened(w_NxK, self.strength)
        # Scales within a row cannot follow the product.
        return (quantized.dequantize(), None) if self.sharing.per == "group" else quantized

    def _product(
        self,
        x: jax.Array,
        w_NxK: jax.Array,
        w_scale: jax.Array | None,
        rows: jax.Array | None = None,
    ) -> jax.Array:
        dtype, shape, scale = x.dtype, x.shape, None
        x = x.reshape(-1, shape[-1])  # one matrix product: XLA transposes less on CPU
        if self.hadamard:
            x = hadamard(x)
        if self.activations != "float":
            quantized = ACTIVATION_QUANTIZERS[self.activations](x)
            if self.strength is not None:
                quantized = quantized.softened(x, self.strength)
            x, scale = quantized
        if w_scale is not None:
            w_scale = w_scale.reshape(1, -1)
            scale = w_scale if scale is None else scale * w_scale
        # Codes are exact in bfloat16 too (integers up to 256), and their sums in float32.
        x, w_NxK = x.astype(dtype), w_NxK.astype(dtype)
        if rows is None or (w_scale is not None and self.activations != "float"):
            y = jax.lax.dot_general(
                x, w_NxK, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
            )
        else:  # sums that are not exact, so their order counts
            y = row_ops.float_matmul(x, w_NxK, rows, self.impl)
        # Backward, keeps XLA from fusing what precedes into a strided transposition.
        y = jax.lax.optimization_barrier(y)
        y = (y if scale is None else y * scale).astype(dtype)
        return y.reshape(*shape[:-1], -1)


def rotary_frequencies(size: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """`f_i = theta^(-2i/h)`, i < h/2, slowed down as `scaling` says; float32 `[h/2]`.

    Sources: arXiv 2104.09864; scaling, see `bitjax.config.RopeScaling`.
    """
    half = size // 2
    f = theta ** (-np.arange(half) / half)
    if scaling.kind == "linear":
        f = f / scaling.factor
    elif scaling.kind == "llama3":
        turns = scaling.original_max_seq_len * f / (2 * np.pi)  # within the original context
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0, 1)
        f = f * (kept + (1 - kept) / scaling.factor)
    return f.astype(np.float32)


def rotary_angles(positions_BxT: jax.Array, frequencies: np.ndarray) -> jax.Array:
    """Cosines, then sines, of `position * frequency`: float32 `[B, T, h]` from `[h/2]`.

    They turn heads of h dimensions (`bitjax.ops.reference.rotate`).
    """
    angles = positions_BxT[:, :, None].astype(jnp.float32) * frequencies[None, None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class FeedForward(nnx.Module):
    """`x + down(sub_norm(act(gate(n)) * up(n)))`, n = norm(x), act = SiLU or ReLU^2.

    Sources: arXiv 2002.05202, 2109.08668. ReLU^2 overflows float16: run in bfloat16 or float32.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        D, F = config.hidden_size, config.intermediate_size
        self.gate_up = BitLinear(D, F, F, config=config, rngs=rngs)
        self.sub_norm = RMSNorm(F, config.norm_eps) if config.sub_norm else None
        self.down = BitLinear(F, D, config=config, rngs=rngs, transform=True)
        self.activation = config.activation

    def __call__(
        self, x_BxTxD: jax.Array, norm: RMSNorm | None, rows: jax.Array | None = None
    ) -> jax.Array:
        """Returns `[B, T, D]`, the residual included; with rows `[R, D]`, see `BitLinear`."""
        hidden_BxTx2F = self.gate_up(x_BxTxD, norm=norm, rows=rows)
        return self.down(
            hidden_BxTx2F, gate=self.activation, norm=self.sub_norm, residual=x_BxTxD, rows=rows
        )
