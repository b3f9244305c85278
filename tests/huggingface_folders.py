"""Hugging Face folders of tiny random models, and changes to them, without transformers."""

import json

import numpy as np
from tiny import tiny_config

from bitjax.interop.checkpoint import Checkpoint, tensor_shapes
from bitjax.interop.huggingface import write_huggingface
from bitjax.interop.safetensors_files import open_safetensors
from bitjax.safetensors_writer import Tensor, write_safetensors

# Rows of every matrix are a multiple of four, heads times head_dim is hidden_size: BitNet's shape.
SHAPE = {"head_dim": 8, "vocab_size": 40}


def random_checkpoint(tokenizer=None, **changes):
    """Float32 master weights that are float16 and bfloat16 numbers: sixteenths below eight."""
    config = tiny_config(**SHAPE | changes)
    rng = np.random.default_rng(7)
    values = {
        name: (rng.integers(-127, 128, shape) / 16).astype(np.float32)
        for name, shape in tensor_shapes(config).items()
    }
    return Checkpoint("random", config, values.__getitem__, tokenizer)


def write(folder, form="packed", **changes):
    """Write a folder with a random model; returns it."""
    write_huggingface(folder, random_checkpoint(**changes), form)
    return folder


def arrays(path):
    """The arrays of a safetensors file."""
    return {name: tensor.array().copy() for name, tensor in open_safetensors(path).items()}


def save(path, tensors):
    """Write arrays as a safetensors file."""
    write_safetensors(
        path,
        [Tensor(n, a.dtype, a.shape, lambda a=a: [a]) for n, a in tensors.items()],
        {"format": "pt"}, lambda count: None,
    )  # fmt: skip


def edit(folder, tensors=None, remove=(), **settings):
    """Put or remove tensors; put, or with None remove, settings of config.json."""
    path = folder / "model.safetensors"
    if tensors or remove:
        held = {n: a for n, a in arrays(path).items() if n not in remove}
        save(path, held | (tensors or {}))
    config = folder / "config.json"
    values = json.loads(config.read_text()) | settings
    config.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def shard(folder, count=2):
    """Divide model.safetensors among files with an index; returns the index's path."""
    path = folder / "model.safetensors"
    held = arrays(path)
    path.unlink()
    placed = {}
    for i in range(count):
        file = f"model-{i + 1:05}-of-{count:05}.safetensors"
        names = list(held)[i::count]
        save(folder / file, {name: held[name] for name in names})
        placed |= dict.fromkeys(names, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return index
