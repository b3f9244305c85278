"""What Hugging Face files call the tensors of a checkpoint (`bitjax.interop.checkpoint`)."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

TOP = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
PARTS = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "ffn.gate": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
}
LAYER_NAME = re.compile(r"model\.layers\.(\d{1,9})\.")


@dataclasses.dataclass(frozen=True)
class Family:
    """An architecture of `config.json`.

    Attributes:
        architecture: its class.
        model_types: that the class is found with; the first is written.
        sub_norms: what its norms before the o and down projections are called, if it has them.
        rope_theta: where a configuration names none.
    """

    architecture: str
    model_types: tuple[str, ...]
    sub_norms: dict[str, str]
    rope_theta: float


LLAMA = Family("LlamaForCausalLM", ("llama",), {}, 10_000.0)
BITNET = Family(
    "BitNetForCausalLM",
    ("bitnet",),
    {"attention.sub_norm": "self_attn.attn_sub_norm", "ffn.sub_norm": "mlp.ffn_sub_norm"},
    500_000.0,
)
# The files of 1bitLLM, made for code of their own.
REPRODUCTION = Family(
    "BitnetForCausalLM",
    ("llama", "bitnet"),
    {"attention.sub_norm": "self_attn.inner_attn_ln", "ffn.sub_norm": "mlp.ffn_layernorm"},
    10_000.0,
)
FAMILIES = {family.architecture: family for family in (LLAMA, BITNET, REPRODUCTION)}


def module_name(name: str, family: Family) -> str:
    """`blocks.0.attention.q` -> `model.layers.0.self_attn.q_proj`."""
    if name in TOP:
        return TOP[name]
    _, layer, part = name.split(".", 2)
    return f"model.layers.{layer}.{(PARTS | family.sub_norms)[part]}"


def tensor_name(name: str, family: Family) -> str:
    """`blocks.0.attention.q.norm` -> `model.layers.0.self_attn.q_proj.rms_norm.weight`."""
    matrix = name.removesuffix(".norm")
    if matrix != name and is_matrix(matrix):
        return f"{module_name(matrix, family)}.rms_norm.weight"
    return f"{module_name(name, family)}.weight"


def scale_name(name: str, family: Family) -> str:
    """Of the scale of a packed matrix."""
    return f"{module_name(name, family)}.weight_scale"


def is_matrix(name: str) -> bool:
    """Whether a tensor of a checkpoint is a matrix of a linear layer."""
    return name.startswith("blocks.") and name.split(".", 2)[2] in MATRICES


MATRICES = tuple(part for part, module in PARTS.items() if module.endswith("_proj"))

LinearClass = Literal["bitlinear", "autobitlinear"]
