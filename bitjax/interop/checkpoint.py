"""What every reader of a checkpoint yields and every writer takes: one tensor at a time, by name.

Names are those of the model with its stacked matrices taken apart, for other formats keep them
apart (`tensor_shapes`):

    embedding, head [V, D]      norm [D]
    blocks.<i>.attention.{q,k,v,o}    blocks.<i>.ffn.{gate,up,down}       [rows, cols]
    blocks.<i>.attention_norm, blocks.<i>.ffn_norm    [D]
    blocks.<i>.attention.sub_norm [H * h]    blocks.<i>.ffn.sub_norm [F]
    <matrix>.norm [cols]        with `inner_norm`, or `linear_norm_eps` if no float layer

Rows of q and k are in half-split rotary order (dimension i turns with i + h/2), as in Hugging Face
files. Scales multiply: weight = code * scale.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from bitjax.config import ModelConfig
from bitjax.tokenizer import Tokenizer

# The linear layers of the model that are several matrices, stacked in this order.
STACKED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
LAYER_OF = {part: layer for layer, parts in STACKED.items() for part in parts}


def layer_of(matrix: str) -> str:
    """The linear layer that a matrix is, or is stacked in: `blocks.0.attention.qkv`."""
    parent, _, part = matrix.rpartition(".")
    return f"{parent}.{LAYER_OF.get(part, part)}"


def matrices_of(layer: str) -> list[str]:
    """The matrices that a linear layer consists of, in their order; the inverse of `layer_of`."""
    parent, _, last = layer.rpartition(".")
    return [f"{parent}.{part}" for part in STACKED.get(last, (last,))]


@dataclasses.dataclass(frozen=True)
class Ternary:
    """A matrix that is ternary already.

    Attributes:
        codes: int8 `[rows, cols]`, -1, 0 or +1.
        scale: float32 `[]` or `[rows]`; multiplies.
    """

    codes: np.ndarray
    scale: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols)."""
        return self.codes.shape


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model in some format, read as it is asked for.

    Attributes:
        origin: of it, for messages: a path or a hub name.
        config: the shape and number formats that the tensors stand for.
        read: the tensor of a name in `tensor_shapes(config)`: `Ternary`, or an array of float32,
            float16 or bfloat16, finite or not. Float matrices of a ternary configuration are master
            weights, to be quantised. Raises ValueError naming file and tensor.
        tokenizer: None where the format holds none.
    """

    origin: str
    config: ModelConfig
    read: Callable[[str], np.ndarray | Ternary]
    tokenizer: Tokenizer | None = None


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a checkpoint, in the order of the forward pass."""
    D, F, h = config.hidden_size, config.intermediate_size, config.head_dim
    H, G = config.num_heads * h, config.num_kv_heads * h
    shapes: dict[str, tuple[int, ...]] = {"embedding": (config.vocab_size, D)}

    def matrices(parent: str, parts: dict[str, tuple[int, int]]) -> None:
        for part, shape in parts.items():
            shapes[f"{parent}.{part}"] = shape
            quantized = not config.is_float_layer(layer_of(f"{parent}.{part}"))
            if config.inner_norm or (config.linear_norm_eps is not None and quantized):
                shapes[f"{parent}.{part}.norm"] = (shape[1],)

    for i in range(config.num_layers):
        block = f"blocks.{i}"
        if not config.inner_norm:
            shapes[f"{block}.attention_norm"] = (D,)
        matrices(f"{block}.attention", {"q": (H, D), "k": (G, D), "v": (G, D)})
        if config.sub_norm:
            shapes[f"{block}.attention.sub_norm"] = (H,)
        matrices(f"{block}.attention", {"o": (D, H)})
        if not config.inner_norm:
            shapes[f"{block}.ffn_norm"] = (D,)
        matrices(f"{block}.ffn", {"gate": (F, D), "up": (F, D)})
        if config.sub_norm:
            shapes[f"{block}.ffn.sub_norm"] = (F,)
        matrices(f"{block}.ffn", {"down": (D, F)})
    shapes["norm"] = (D,)
    if not config.tie_embeddings:
        shapes["head"] = (config.vocab_size, D)
    return shapes
