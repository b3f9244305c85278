"""What a checkpoint becomes for transformers: its class, its config.json, and what cannot be said.

    weights             activations  form      quantisation    (float: bfloat16 or float32)
    ternary             int8         packed    autobitlinear, offline
    ternary             int8         float     autobitlinear, online
    binary              int8         packed    autobitlinear, offline
    float               float        float     none
    ternary or binary   float        float     none; weights as they multiply

The class is BitNetForCausalLM with sub-norms and LlamaForCausalLM without. config.json is in the
older spelling (`rope_theta`, `rope_scaling`, `torch_dtype`), which transformers 4 and 5 read alike,
and other engines too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

from bitjax.config import DType, ModelConfig, RopeScaling
from bitjax.interop.checkpoint import Checkpoint, Ternary, layer_of, tensor_shapes
from bitjax.interop.huggingface.codes import ROWS_PER_BYTE
from bitjax.interop.huggingface.names import BITNET, LLAMA, Family, is_matrix, module_name

Form = Literal["packed", "bfloat16", "float32"]
Storing = Literal["packed", "masters", "dense"]


@dataclasses.dataclass(frozen=True)
class Target:
    """How a checkpoint is written.

    Attributes:
        family: of architecture and names.
        storing: of its matrices: packed codes, masters as they are, or the numbers that multiply.
        dtype: of everything else.
        settings: the object of config.json.
    """

    family: Family
    storing: Storing
    dtype: DType
    settings: dict[str, Any]


def plan(
    checkpoint: Checkpoint, form: Form, dtype: DType, bos: int | None, eos: tuple[int, ...]
) -> Target:
    """How to write a checkpoint for transformers.

    Args:
        checkpoint: the model.
        form: of its matrices.
        dtype: of everything else.
        bos: the token that begins a text, if there is one.
        eos: the tokens that end one.

    Raises:
        ValueError: transformers has no such model.
    """
    config = checkpoint.config
    family = BITNET if config.sub_norm else LLAMA
    reason = _wrong_shape(config, family) or _wrong_form(config, form) or _unsaved(checkpoint, form)
    if reason:
        raise ValueError(f"{checkpoint.origin} cannot be written for transformers: {reason}")
    quantized = config.weights != "float" and config.activations == "int8"
    storing: Storing = "packed" if form == "packed" else "masters" if quantized else "dense"
    settings = _settings(config, family, form if quantized else None)
    settings |= {"torch_dtype": dtype, **token_ids(bos, eos)}
    return Target(family, storing, dtype, settings)


def _wrong_shape(config: ModelConfig, family: Family) -> str | None:
    H, h, D = config.num_heads, config.head_dim, config.hidden_size
    if config.inner_norm:
        return "it has no models with a norm inside every linear layer and none before the block"
    if family is BITNET and H * h != D:
        return (
            f"its BitNet needs num_heads * head_dim to be hidden_size; they are {H} * {h} and {D}"
        )
    if D % H:
        return f"it needs hidden_size={D} to be a multiple of num_heads={H}"
    return None


def _wrong_form(config: ModelConfig, form: Form) -> str | None:
    setting = config.trained_only()
    if setting is not None:
        return f"it has no models with {setting}"
    kinds = f"{config.weights} weights and {config.activations} activations"
    quantized = config.weights != "float" and config.activations == "int8"
    if config.weights == "float" and config.activations == "int8":
        return f"it has no models of {kinds}"
    if config.linear_norm_eps is not None and not quantized:
        return f"it has no norm before every matrix in models of {kinds}"
    if form != "packed":
        absmean = config.weights == "ternary" and config.weight_scale == "tensor"
        if config.weights == "binary" and quantized:
            return "it would make a binary model's master weights ternary; the form packed fits"
        if quantized and not absmean:
            return (
                f"it would quantise master weights by their absmean, this model's are "
                f"{config.weights} with a scale for each {config.weight_scale}"
            )
        return None
    if not quantized:
        return f"packed layers have int8 activations, this model {kinds}; the form bfloat16 fits"
    for name in _quantized_matrices(config):
        rows = tensor_shapes(config)[name][0]
        if rows % ROWS_PER_BYTE:
            return (
                f"it packs {ROWS_PER_BYTE} rows to a byte, and {name} has {rows} rows; the form "
                "bfloat16 fits"
            )
    return None


def _unsaved(checkpoint: Checkpoint, form: Form) -> str | None:
    """Master weights are asked for: see whether the first matrix still has them."""
    config = checkpoint.config
    if form == "packed" or config.weights == "float" or config.activations == "float":
        return None
    first = next(_quantized_matrices(config), None)
    if first is not None and isinstance(checkpoint.read(first), Ternary):
        return f"the form {form} is of master weights, and these are ternary already; packed fits"
    return None


def _quantized_matrices(config: ModelConfig) -> Iterator[str]:
    for name in tensor_shapes(config):
        if is_matrix(name) and not config.is_float_layer(layer_of(name)):
            yield name


def _settings(config: ModelConfig, family: Family, form: Form | None) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_types[0],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "hidden_act": config.activation,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_scaling(config.rope_scaling),
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": config.init_std,
        "use_cache": True,
    }
    if family is LLAMA:
        settings |= {"head_dim": config.head_dim, "mlp_bias": False}
    if form is not None:
        settings["quantization_config"] = {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "offline" if form == "packed" else "online",
            "modules_to_not_convert": _float_modules(config, family),
            "use_rms_norm": config.linear_norm_eps is not None,
            "rms_norm_eps": config.linear_norm_eps or 1e-6,
        }
    return settings


def token_ids(bos: int | None, eos: tuple[int, ...]) -> dict[str, Any]:
    """Of the tokens that begin and end a text, as configurations name them."""
    ends = list(eos) if len(eos) > 1 else next(iter(eos), None)
    return {"bos_token_id": bos, "eos_token_id": ends, "pad_token_id": None}


def _rope_scaling(scaling: RopeScaling) -> dict[str, Any] | None:
    if scaling.kind == "none":
        return None
    about: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        about |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        }
    return about


def _float_modules(config: ModelConfig, family: Family) -> list[str] | None:
    """The modules that stay float: the head always does, but a list has to name it."""
    kept = [
        module_name(name, family)
        for name in tensor_shapes(config)
        if is_matrix(name) and config.is_float_layer(layer_of(name))
    ]
    return ["lm_head", *kept] if kept else None
