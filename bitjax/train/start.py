"""Weights that a run starts with: those of another model of the same shape.

So full-precision models become ternary ones (continual training from 16 to 1.58 bits, arXiv
2502.11895), and pretrained models are tuned. What the other model does not have, norms before the
output and down projections (inserted by "BitNet Distillation", arXiv 2510.13998) and learned
scales, starts as in a new model, the scales from the weights taken over.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from bitjax.model import Transformer, bit_linears
from bitjax.model.files import load_model
from bitjax.quant import initial_scale
from bitjax.tokenizer import Tokenizer
from bitjax.train.checkpoint import read_run
from bitjax.train.source import read_tokenizer_file
from bitjax.train.step import Trainer, TrainState


def started(trainer: Trainer, path: Path, tokenizer: Tokenizer) -> TrainState:
    """The state of a new run with the weights of another model, and moments of zero.

    Args:
        trainer: of the new run.
        path: a run's directory, or a model file of float weights.
        tokenizer: of the new run's data.

    Raises:
        ValueError: nothing readable there, packed weights, or another shape or tokenizer.
    """
    source = _read(path)
    _require_same_tokenizer(path, source.tokenizer, tokenizer)
    given = _arrays(nnx.state(source, nnx.Param))
    state = trainer.init()
    wanted = _arrays(state.params)
    for name, array in wanted.items():
        if name in given and given[name].shape != array.shape:
            raise ValueError(
                f"{path} does not fit the run's model: its {name} is {list(given[name].shape)}, "
                f"not {list(array.shape)}"
            )
        if name not in given and not name.endswith(("norm.scale", "learned_scale")):
            raise ValueError(f"{path} does not fit the run's model: it has no {name}")
    for name in given:
        if name not in wanted and not name.endswith("learned_scale"):
            raise ValueError(f"{path} does not fit the run's model, which has no {name}")
    leaves = [given.get(name, array).astype(array.dtype) for name, array in wanted.items()]
    params = jax.tree.unflatten(jax.tree.structure(state.params), leaves)
    model = trainer.model(params)
    for name, layer in bit_linears(model):
        if layer.learned_scale is not None and f"{name}.learned_scale" not in given:
            weight = layer.weight[...]
            layer.learned_scale.set_value(initial_scale(weight, layer.segments, layer.sharing))
    return trainer.place(dataclasses.replace(state, params=nnx.state(model, nnx.Param)))


def _read(path: Path) -> Transformer:
    if not path.is_dir():
        model = load_model(path)
        if any(not isinstance(x, jax.Array) for x in _values(model)):
            raise ValueError(f"{path} has packed weights; a run starts with float ones")
        return model
    config, _, state = read_run(path)
    model = Trainer(config).model(state.params)
    model.tokenizer = read_tokenizer_file(path)
    return model


def _values(model: Transformer) -> list[Any]:
    state = nnx.state(model, nnx.Param)
    return [leaf.get_value() for leaf in jax.tree.leaves(state, is_leaf=_is_variable)]


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _require_same_tokenizer(path: Path, theirs: Tokenizer, ours: Tokenizer) -> None:
    if getattr(theirs, "json", theirs.name) != getattr(ours, "json", ours.name):
        raise ValueError(
            f"{path} has a tokenizer ({theirs.name}, {theirs.vocab_size:,} tokens) that is not the "
            f"data's ({ours.name}, {ours.vocab_size:,} tokens): build the corpus with the model's"
        )


def _arrays(params: Any) -> dict[str, jax.Array]:
    """Leaves by dotted path, in tree order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): leaf
        for path, leaf in leaves
    }
