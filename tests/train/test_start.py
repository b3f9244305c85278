"""Runs that start with the weights of another model."""

import jax
import numpy as np
import pytest
from flax import nnx
from test_sharding import TERNARY, run_config
from tiny import tiny_config, tiny_model

from bitjax.infer import pack_model
from bitjax.model import bit_linears
from bitjax.model.files import save_model
from bitjax.quant import initial_scale
from bitjax.text import Specials, TextTokenizer
from bitjax.tokenizer import BYTES
from bitjax.train import Trainer, train
from bitjax.train.checkpoint import read_run
from bitjax.train.start import started

FLOAT = {"weights": "float", "activations": "float"}


def flat(params):
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {jax.tree_util.keystr(path, simple=True): np.asarray(leaf) for path, leaf in leaves}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A float model without sub-norms, and its file."""
    model = tiny_model(seed=5, sub_norm=False, **FLOAT)
    path = tmp_path_factory.mktemp("start") / "model.safetensors"
    save_model(path, model)
    return path, flat(nnx.state(model, nnx.Param))


def test_weights_are_taken_over_and_what_is_missing_starts_anew(file):
    path, given = file
    trainer = Trainer(run_config(model=tiny_config(weights="ternary_learned")))
    state = started(trainer, path, BYTES)
    found = flat(state.params)
    for name, array in given.items():
        np.testing.assert_array_equal(found[name], array)
    new = [name for name in found if name not in given]
    assert len(new) == 2 * 2 + 2 * 4  # sub-norms and learned scales of two layers
    for _, layer in bit_linears(trainer.model(state.params)):
        wanted = initial_scale(layer.weight[...], layer.segments, layer.sharing)
        np.testing.assert_array_equal(layer.learned_scale[...], wanted)
    assert all((found[name] == 1).all() for name in new if "sub_norm" in name)
    assert int(state.step) == 0
    assert not any(x.any() for x in jax.tree.leaves(state.opt_state))


def test_a_run_starts_from_a_run_and_stays_resumable(file, tmp_path):
    first = train(run_config(steps=2), tmp_path / "a")
    config = run_config(steps=2, model=TERNARY,
                        start_from=str(tmp_path / "a"), quantization_warmup_steps=1)  # fmt: skip
    state = started(Trainer(config), tmp_path / "a", BYTES)
    for x, y in zip(jax.tree.leaves(state.params), jax.tree.leaves(first.params), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    last = train(config, tmp_path / "b")
    assert read_run(tmp_path / "b")[1] == 2
    again = train(config, tmp_path / "b")  # finished: nothing starts anew
    for x, y in zip(jax.tree.leaves(last.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_what_does_not_fit(file, tmp_path):
    path, _ = file
    wide = Trainer(run_config(model=tiny_config(intermediate_size=40)))
    with pytest.raises(ValueError, match=r"its blocks\.0\.ffn\..* is \[.*\], not \["):
        started(wide, path, BYTES)
    deep = Trainer(run_config(model=tiny_config(num_layers=3)))
    with pytest.raises(ValueError, match=r"it has no blocks\.2\.attention"):
        started(deep, path, BYTES)
    shallow = Trainer(run_config(model=tiny_config(num_layers=1)))
    with pytest.raises(ValueError, match=r"which has no blocks\.1\.attention"):
        started(shallow, path, BYTES)
    fits = Trainer(run_config(model=tiny_config()))
    other = TextTokenizer("{}", Specials(), "here", 9)
    with pytest.raises(ValueError, match=r"\(bytes, 256 tokens\) that is not the data's \(text, 9"):
        started(fits, path, other)
    save_model(tmp_path / "packed.safetensors", pack_model(tiny_model()))
    with pytest.raises(ValueError, match="has packed weights; a run starts with float ones"):
        started(fits, tmp_path / "packed.safetensors", BYTES)
    with pytest.raises(ValueError, match="nowhere"):
        started(fits, tmp_path / "nowhere", BYTES)
