"""Models as GGUF metadata: architectures, hyper-parameters, names of tensors, order of rows.

| architecture | FFN gate | sub-norms | rows of q and k | computed by |
|---|---|---|---|---|
| bitnet | SiLU | yes | half-split | llama.cpp, bitnet.cpp, ik_llama.cpp |
| bitnet-b1.58, bitnet-25, bitnet2b_2501 | ReLU^2 | yes | half-split | bitnet.cpp, ik_llama.cpp |
| llama | SiLU | no | interleaved | all of them |

Interleaved rows: dimension 2i of a head turns with 2i + 1, so row `i * 2 + s` of a head in the file
is row `s * h / 2 + i` here. The graphs of the bitnet architectures take the embedding as the head
and heads of hidden_size / heads dimensions.

llama.cpp's own converter gives BitNet b1.58 2B4T the architecture "bitnet", whose SiLU is not what
that model was trained with; such a file stands for what llama.cpp computes, and so it is read.

Llama 3's slowed rotary frequencies are no metadata but a tensor, rope_freqs.weight: each frequency
is divided by its factor.

Sources: llama.cpp's conversion/llama.py, conversion/bitnet.py, src/models/*.cpp; bitnet.cpp's
3rdparty/llama.cpp/src/llama.cpp (build_bitnet, build_bitnet_158).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from bitjax.config import ModelConfig, RopeScaling
from bitjax.interop.gguf.container import Value

Activation = Literal["silu", "relu2"]
ARCHITECTURES: dict[str, Activation] = {
    "bitnet": "silu", "bitnet-b1.58": "relu2", "bitnet-25": "relu2", "bitnet2b_2501": "relu2",
    "llama": "silu",
}  # fmt: skip
ROPE_FACTORS = "rope_freqs.weight"
MATRICES = tuple(
    f"{part}.{name}"
    for part, names in (("attention", "qkvo"), ("ffn", ("gate", "up", "down")))
    for name in names
)
_PARTS = {
    "attention_norm": "attn_norm", "ffn_norm": "ffn_norm",
    "attention.q": "attn_q", "attention.k": "attn_k", "attention.v": "attn_v",
    "attention.o": "attn_output", "attention.sub_norm": "attn_sub_norm",
    "ffn.gate": "ffn_gate", "ffn.up": "ffn_up", "ffn.down": "ffn_down",
    "ffn.sub_norm": "ffn_sub_norm",
}  # fmt: skip
_WHOLE = {"embedding": "token_embd", "norm": "output_norm", "head": "output"}
# Settings of other models of these architectures: present with another value, they are refused.
_NEUTRAL: dict[str, Any] = {
    "expert_count": 0, "attention.causal": True, "attention.sliding_window": 0,
    "attention.scale": 0.0, "logit_scale": 0.0, "embedding_scale": 0.0, "residual_scale": 0.0,
    "attention.clamp_kqv": 0.0, "rope.scaling.attn_factor": 1.0,
}  # fmt: skip


def gguf_name(name: str, suffix: str = "weight") -> str:
    """The name in a GGUF file of a tensor of a checkpoint."""
    if name in _WHOLE:
        return f"{_WHOLE[name]}.{suffix}"
    _, block, part = name.split(".", 2)
    return f"blk.{block}.{_PARTS[part]}.{suffix}"


def interleaved(config: ModelConfig, name: str, values: np.ndarray) -> np.ndarray:
    """Rows of q or k as the llama architecture has them; other tensors as they are.

    Args:
        config: whose head_dim counts.
        name: of the tensor in a checkpoint.
        values: `[rows, ...]` in half-split order.
    """
    return _reordered(config, name, values, (-1, 2, config.head_dim // 2))


def half_split(config: ModelConfig, name: str, values: np.ndarray) -> np.ndarray:
    """The inverse of `interleaved`."""
    return _reordered(config, name, values, (-1, config.head_dim // 2, 2))


def _reordered(
    config: ModelConfig, name: str, values: np.ndarray, split: tuple[int, int, int]
) -> np.ndarray:
    if not name.endswith((".attention.q", ".attention.k")):
        return values
    return values.reshape(*split, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


class Settings:
    """Metadata of one architecture, each value checked for its type as it is asked for."""

    def __init__(self, where: str, metadata: Mapping[str, Value]) -> None:
        self._where = where
        self._metadata = metadata
        architecture = metadata.get("general.architecture")
        if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
            raise ValueError(
                f"{where}: architecture {architecture!r:.60} is not known; "
                f"{', '.join(ARCHITECTURES)} are"
            )
        self.architecture = architecture

    def number(self, key: str, default: float | None = None) -> int | float:
        """A number; where the file lists one for each layer, they must be equal."""
        value: Any = self._metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, np.ndarray) and len(value) and (value == value[0]).all():
            value = value[0].item()
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(
                f"{self._where}: {self.architecture}.{key}={value!r:.60} is not one number"
            )
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number above 0."""
        value = self.number(key, default)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{self._where}: {self.architecture}.{key}={value} must be 1 or more")
        return value

    def text(self, key: str, default: str) -> str:
        """A string."""
        value = self._metadata.get(f"{self.architecture}.{key}", default)
        if not isinstance(value, str):
            raise ValueError(f"{self._where}: {self.architecture}.{key} is not a string")
        return value

    def require_neutral(self) -> None:
        """Refuse settings that the model here has not got."""
        for key, neutral in _NEUTRAL.items():
            value = self._metadata.get(f"{self.architecture}.{key}", neutral)
            if isinstance(value, np.ndarray) or value != neutral:
                raise ValueError(
                    f"{self._where}: {self.architecture}.{key}={value!r:.60} is not supported"
                )
        if self._metadata.get("split.count", 0) not in (0, 1):
            raise ValueError(f"{self._where} is one of several files of a model; join them first")


def config_from(
    where: str, metadata: Mapping[str, Value], vocab_size: int, tied: bool
) -> ModelConfig:
    """The shape that metadata describes; number formats are left at their defaults.

    Args:
        where: for messages.
        metadata: of the file.
        vocab_size: rows of its embedding.
        tied: whether the head is the embedding.

    Raises:
        ValueError: an unknown architecture, a setting that is missing or unsupported.
    """
    settings = Settings(where, metadata)
    settings.require_neutral()
    hidden, heads = settings.size("embedding_length"), settings.size("attention.head_count")
    head_dim = settings.size("attention.key_length", max(1, hidden // heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if settings.size(key, head_dim) != head_dim:
            raise ValueError(
                f"{where}: {settings.architecture}.{key}={settings.size(key)} differs from the "
                f"{head_dim} dimensions of a head, which is not supported"
            )
    try:
        return ModelConfig(
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=settings.size("feed_forward_length"),
            num_layers=settings.size("block_count"),
            num_heads=heads,
            num_kv_heads=settings.size("attention.head_count_kv", heads),
            head_dim=head_dim,
            max_seq_len=settings.size("context_length"),
            activation=ARCHITECTURES[settings.architecture],
            sub_norm=settings.architecture != "llama",
            tie_embeddings=tied,
            rope_theta=settings.number("rope.freq_base", 10_000.0),
            rope_scaling=_linear_scaling(where, settings),
            norm_eps=_shortest(settings.number("attention.layer_norm_rms_epsilon")),
        )
    except ValueError as error:
        raise ValueError(f"{where.removesuffix(':')}: {error}") from None


def _shortest(value: float) -> float:
    """The shortest decimal that is this number in float32: 1e-5, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _linear_scaling(where: str, settings: Settings) -> RopeScaling:
    kind = settings.text("rope.scaling.type", "linear")
    factor = settings.number("rope.scaling.factor", settings.number("rope.scale_linear", 0.0))
    if kind not in ("none", "linear"):
        raise ValueError(f"{where}: rotary scaling of type {kind!r:.40} is not supported")
    if kind == "none" or factor in (0, 1):
        return RopeScaling()
    return RopeScaling("linear", factor)


def metadata_for(architecture: str, config: ModelConfig) -> dict[str, Any]:
    """The inverse of `config_from`."""
    settings: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_seq_len,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
    }
    if config.num_heads * config.head_dim != config.hidden_size:
        settings |= {
            "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim,
        }
    if config.rope_scaling.kind == "linear":
        settings["rope.scaling.type"] = "linear"
        settings["rope.scaling.factor"] = float(config.rope_scaling.factor)
    named = {f"{architecture}.{key}": value for key, value in settings.items()}
    return {"general.architecture": architecture, "general.type": "model"} | named


def rope_factors(config: ModelConfig) -> np.ndarray:
    """What rope_freqs.weight holds for llama3 scaling: float32 `[h / 2]`.

    The computation is that of llama.cpp's converter, step by step.
    """
    scaling, h = config.rope_scaling, config.head_dim
    exponents = np.arange(0, h, 2, dtype=np.float32) / np.float32(h)
    wavelengths = (
        2 * math.pi * np.power(np.float32(config.rope_theta), exponents).astype(np.float64)
    )
    turns = scaling.original_max_seq_len / wavelengths  # in the context first trained on
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    share = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - share) / scaling.factor + share)).astype(np.float32)


def scaled(
    where: str,
    config: ModelConfig,
    factors: np.ndarray,
    context: int,
    known: Sequence[RopeScaling] = (),
) -> ModelConfig:
    """`config` with the llama3 scaling that a file's factors are; they do not say its parameters.

    What is known is tried first. Else the largest factor is the scaling's, its thresholds are 1 and
    4 turns, as in all published models, and the context first trained on is 8,192, what the file
    says, or what its context divides to.

    Args:
        where: for messages.
        config: of the file.
        factors: `[h / 2]`.
        context: `rope.scaling.original_context_length`, or 0.
        known: scalings to try.

    Raises:
        ValueError: they are none of these.
    """
    if config.rope_scaling.kind != "none":
        raise ValueError(f"{where}: {ROPE_FACTORS} beside linear rotary scaling is not supported")
    if (factors == 1).all():
        return config
    factor = float(factors.max()) if factors.size and np.isfinite(factors).all() else 0.0
    candidates = [scaling for scaling in known if scaling.kind == "llama3"]
    if factor > 1:
        divided = round(config.max_seq_len / factor)
        for length in (8192, context, divided, config.max_seq_len):
            candidates.append(RopeScaling("llama3", factor, 1.0, 4.0, max(1, length)))
    for scaling in candidates:
        changed = dataclasses.replace(config, rope_scaling=scaling)
        if np.allclose(factors, rope_factors(changed), rtol=1e-5, atol=0):
            return changed
    raise ValueError(
        f"{where}: {ROPE_FACTORS} are not Llama 3's factors (1 to {factor:g}); "
        "other rotary frequencies are not supported"
    )


def matrix_names(config: ModelConfig) -> list[str]:
    """Every matrix of the linear layers, in order."""
    layers = range(config.num_layers)
    return [f"blocks.{i}.{part}" for i, part in itertools.product(layers, MATRICES)]
