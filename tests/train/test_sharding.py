"""Meshes: the same numbers on eight simulated devices as on one, and checkpoints between them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tiny import tiny_config

from bitjax.config import DataConfig, MeshConfig, RunConfig, TrainConfig, from_dict, to_json
from bitjax.train import Batch, Trainer, read_metrics, train
from bitjax.train.checkpoint import read_run
from bitjax.train.sharding import make_mesh, state_shardings
from bitjax.train.step import Quantizing

# Every cut dimension is a multiple of 4: D 32, F 24, 4 heads of 8, V 256.
MODEL = tiny_config(
    vocab_size=256, head_dim=8, num_kv_heads=4, num_layers=1, weights="float", activations="float"
)
TERNARY = tiny_config(head_dim=8, num_kv_heads=4, num_layers=1)
MESHES = {"data": (8, 1, 1), "fsdp": (1, 4, 1), "tensor": (1, 1, 2), "all": (2, 2, 2)}
STEPS = 4


def run_config(mesh=(1, 1, 1), model=MODEL, **settings):
    """The codes of layers are watched in ternary runs alone, and a given peak is not measured."""
    settings = {"steps": STEPS, "batch_size": 16, "seq_len": 8, "accumulate": 2,
                "log_every": 1, "checkpoint_every": 2, "peak_gflops": 1.0,
                "log_codes": model is TERNARY} | settings  # fmt: skip
    return RunConfig(
        model=model, data=DataConfig(), train=TrainConfig(**settings), mesh=MeshConfig(*mesh)
    )


def leaves(directory, step=None):
    return [np.asarray(x) for x in jax.tree.leaves(read_run(directory, step)[2])]


def losses(directory):
    return [r["loss"] for r in read_metrics(directory)]


CHILD = """
import json, sys
from pathlib import Path
import jax
jax.config.update("jax_numpy_rank_promotion", "raise")
from bitjax.config import RunConfig, from_json
from bitjax.train import train
for name, text in json.loads(sys.stdin.read()):
    state = train(from_json(RunConfig, text), Path(name))
    weight = state.params["blocks"][0]["ffn"]["down"]["weight"].get_value()
    shard = weight.addressable_shards[0].data
    print(json.dumps([name, len(weight.sharding.device_set), list(shard.shape)]))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Directories by name, and what each mesh made of a weight; on one device in this process."""
    folder = tmp_path_factory.mktemp("meshes")
    train(run_config(), folder / "one")
    train(run_config(model=TERNARY), folder / "ternary")
    jobs = [(str(folder / name), to_json(run_config(mesh))) for name, mesh in MESHES.items()]
    jobs.append((str(folder / "remat"), to_json(run_config((1, 2, 1), remat=True))))
    jobs.append((str(folder / "ternary on all"), to_json(run_config((2, 2, 2), TERNARY))))
    # What takes time is compiling programs that run for milliseconds: the machine code need not be
    # the best, and XLA's partitioning comes before it.
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    done = subprocess.run(
        [sys.executable, "-c", CHILD], input=json.dumps(jobs), capture_output=True, text=True,
        env=os.environ | {"XLA_FLAGS": flags}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {
        Path(n).name: (count, shape)
        for n, count, shape in map(json.loads, done.stdout.splitlines())
    }
    return folder, found


@pytest.mark.parametrize("name", [*MESHES, "remat"])
def test_losses_and_weights_are_those_of_one_device(runs, name):
    """In float32, sums over devices in another order: 2^-24 of each of some 1,000 terms of a
    gradient at the most, which Adam's first steps turn into as much of a learning rate (1.5e-3)
    where the gradient is near its own rounding error, and into nothing elsewhere."""
    folder, _ = runs
    np.testing.assert_allclose(losses(folder / name), losses(folder / "one"), rtol=2e-6)
    for a, b in zip(leaves(folder / name), leaves(folder / "one"), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


def test_a_ternary_run_differs_by_codes_at_ties_alone(runs):
    """A scale that is rounded otherwise moves codes that lie within 2^-23 of a tie: of 12,000
    weights and 130 tokens hardly any, each worth 1e-3 of a loss of 5 at the most."""
    folder, _ = runs
    np.testing.assert_allclose(
        losses(folder / "ternary on all"), losses(folder / "ternary"), rtol=1e-3
    )


def test_weights_are_cut_as_the_mesh_says(runs):
    _, found = runs
    assert found["data"] == (8, [32, 24])
    assert found["fsdp"] == (4, [8, 24])
    assert found["tensor"] == (2, [32, 12])
    assert found["all"] == (8, [16, 12])


def test_a_checkpoint_of_one_mesh_goes_on_on_another(runs, tmp_path):
    """What eight devices began, one ends, and the losses are those of an unbroken run."""
    folder, _ = runs
    half = tmp_path / "half"
    shutil.copytree(folder / "all", half)
    shutil.rmtree(half / "checkpoints" / str(STEPS))
    train(run_config(), half)
    np.testing.assert_allclose(losses(half), losses(folder / "one"), rtol=2e-6)
    for a, b in zip(leaves(half), leaves(folder / "one"), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


def test_every_array_has_a_place():
    config = run_config((1, 1, 2))
    mesh = make_mesh(config.mesh)
    state = jax.eval_shape(Trainer(run_config()).init)
    found = {
        jax.tree_util.keystr(path, simple=True, separator="."): sharding.spec
        for path, sharding in jax.tree_util.tree_leaves_with_path(state_shardings(mesh, state))
    }
    cut = {k: v for k, v in found.items() if v != PartitionSpec()}
    # Four matrices a layer and the embedding, and the two moments of each.
    assert len(cut) == 3 * (4 * MODEL.num_layers + 1)
    assert all(
        spec == (PartitionSpec("fsdp", "tensor") if ".o." in name or ".down." in name
                 else PartitionSpec("tensor", "fsdp"))
        for name, spec in cut.items()
    )  # fmt: skip


def test_what_a_mesh_does_not_divide():
    with pytest.raises(ValueError, match=r"mesh 4 x 1 x 1 .* needs 4 devices; there are 2"):
        Trainer(run_config((4, 1, 1)))
    with pytest.raises(ValueError, match=r"^7 sequences of one step .* multiple of .* = 2$"):
        Trainer(run_config((2, 1, 1), batch_size=7, accumulate=1))
    odd = tiny_config(intermediate_size=23)
    with pytest.raises(ValueError, match=r"mesh\.tensor=2 does not divide .*ffn\.down\.weight"):
        Trainer(run_config((1, 1, 2), model=odd))
    with pytest.raises(ValueError, match=r"mesh\.fsdp=0 must be above 0"):
        from_dict(RunConfig, {"mesh": {"fsdp": 0}})


def test_rematerialised_gradients_are_the_same():
    """With stochastic rounding, whose draws are repeated backwards."""
    drawn = {"stochastic_rounding": "both", "model": tiny_config(num_layers=1)}
    plain, remat = Trainer(run_config(**drawn)), Trainer(run_config(remat=True, **drawn))
    params = plain.init().params
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (16, 9)), jnp.int32)
    how = Quantizing.at(jnp.int32(3), plain.config.train)
    lowered = [
        jax.jit(lambda p, t=t: t._gradients(p, Batch(tokens), how)[1]).lower(params)
        for t in (plain, remat)
    ]
    a, b = (program.compile({"xla_backend_optimization_level": 0})(params) for program in lowered)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=1e-6)
    barriers = [program.as_text().count("optimization_barrier") for program in lowered]
    assert barriers[1] > barriers[0]
