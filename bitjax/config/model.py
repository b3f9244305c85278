"""What a model is: its shape and number formats."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from bitjax.config.fields import check_fields, require, require_positive

# Equations: bitjax/quant/weights.py and bitjax/quant/activations.py.
WeightQuantizer = Literal["ternary", "ternary_median", "ternary_learned", "binary", "float"]
ActivationQuantizer = Literal["int8", "int4", "float"]
WeightScale = Literal["tensor", "row", "group"]
DType = Literal["float32", "bfloat16"]
CacheDType = Literal["float32", "bfloat16", "int8"]


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies `f` are slowed down for contexts longer than those first trained on.

    linear: `f / factor`. llama3: as linear for wavelengths `2 pi / f` above `original_max_seq_len /
    low_freq_factor`, unchanged below `original_max_seq_len / high_freq_factor`, interpolated
    between ("The Llama 3 Herd of Models", arXiv 2407.21783; Llama 3.1's released code).
    """

    kind: Literal["none", "linear", "llama3"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192

    def __post_init__(self) -> None:
        check_fields(self)
        require_positive(
            self, "factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len"
        )
        require(
            self.low_freq_factor < self.high_freq_factor,
            f"rope_scaling.low_freq_factor={self.low_freq_factor} is not below "
            f"rope_scaling.high_freq_factor={self.high_freq_factor}",
        )


@dataclass(frozen=True)
class ModelConfig:
    """The shape and number formats of one decoder-only transformer (no biases anywhere)."""

    vocab_size: int = 256
    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 32
    max_seq_len: int = 256  # positions a KV cache may hold
    activation: Literal["silu", "relu2"] = "relu2"  # gate of the FFN; relu2(x) = max(x, 0)^2
    sub_norm: bool = True  # SubLN: RMSNorm before the attention output and FFN down projections
    inner_norm: bool = False  # RMSNorm inside every BitLinear instead of the block's pre-norms
    linear_norm_eps: float | None = None  # not None: RMSNorm of its own before every matrix (q, k,
    # v, ... each), after the block's norms; transformers' use_rms_norm
    float_layers: tuple[str, ...] = ()  # shell patterns of linear layers that stay float, both
    # weights and activations: "blocks.0.*", "*.ffn.down"
    tie_embeddings: bool = True
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    norm_eps: float = 1e-5
    weights: WeightQuantizer = "ternary"  # every linear layer but the embedding and the head
    activations: ActivationQuantizer = "int8"  # inputs of those layers, per token
    weight_scale: WeightScale = "tensor"  # what has a scale of its own
    weight_group: int = 0  # columns of a row that share a scale; with weight_scale="group"
    hadamard: bool = False  # orthonormal Hadamard transform of the inputs of o and down, block by
    # block of the largest power of two that divides them (BitNet v2, arXiv 2504.18415)
    init_std: float = 0.02  # standard deviation of every initial weight

    def __post_init__(self) -> None:
        check_fields(self)
        require_positive(
            self, "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads",
            "num_kv_heads", "head_dim", "max_seq_len", "rope_theta", "norm_eps", "init_std",
        )  # fmt: skip
        require(
            self.linear_norm_eps is None or self.linear_norm_eps > 0,
            f"model.linear_norm_eps={self.linear_norm_eps} must be above 0",
        )
        require(
            not self.inner_norm or self.linear_norm_eps is None,
            "model.inner_norm and model.linear_norm_eps both put a norm before every matrix; "
            "choose one",
        )
        require(
            len(self.float_layers) <= 4 * self.num_layers,
            f"model.float_layers has {len(self.float_layers)} patterns for "
            f"{4 * self.num_layers} linear layers",
        )
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"model.num_heads={self.num_heads} is not a multiple of "
            f"model.num_kv_heads={self.num_kv_heads}",
        )
        require(
            self.head_dim % 2 == 0,
            f"model.head_dim={self.head_dim} is odd; rotary embedding needs it even",
        )

        self._check_scales()

    def _check_scales(self) -> None:
        group, widths = self.weight_group, {
            "hidden_size": self.hidden_size,
            "num_heads * head_dim": self.num_heads * self.head_dim,
            "intermediate_size": self.intermediate_size,
        }  # fmt: skip
        require(
            self.weights != "float" or self.weight_scale == "tensor",
            f"model.weight_scale={self.weight_scale!r} is for quantised weights; "
            "model.weights='float' has no scales",
        )
        require(
            (group > 0) == (self.weight_scale == "group"),
            f"model.weight_group={group} with model.weight_scale={self.weight_scale!r}; groups "
            "have a size above 0, other scales have 0",
        )
        for name, width in widths.items():
            require(
                group == 0 or width % group == 0,
                f"model.{name}={width} is not a multiple of model.weight_group={group}",
            )
            require(
                not self.hadamard or name == "hidden_size" or width % 2 == 0,
                f"model.{name}={width} is odd; model.hadamard needs it even",
            )
        require(
            not self.hadamard or (self.weights, self.activations) != ("float", "float"),
            "model.hadamard is for quantised models; weights and activations are float",
        )

    def trained_only(self) -> str | None:
        """The setting, with its value, that no packed form or exchanged format has; else None."""
        if self.weight_scale == "group":
            return f"weight_scale='group' (weight_group={self.weight_group})"
        if self.activations == "int4":
            return "activations='int4'"
        return "hadamard=true" if self.hadamard else None

    @property
    def has_integer_products(self) -> bool:
        """Whether its layers' codes are such as `train.products='integer'` takes."""
        quantized = self.weights != "float" and self.activations == "int8"
        return quantized and self.weight_scale != "group"

    def is_float_layer(self, name: str) -> bool:
        """Whether `float_layers` names a linear layer, e.g. `blocks.0.attention.qkv`."""
        return any(fnmatchcase(name, pattern) for pattern in self.float_layers)

    def full_precision_twin(self) -> ModelConfig:
        """The same shape with float weights and activations."""
        return dataclasses.replace(
            self, weights="float", activations="float", weight_scale="tensor", weight_group=0,
            hadamard=False,
        )  # fmt: skip
