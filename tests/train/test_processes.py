"""Several processes on this machine as one run, against a single one."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_sharding import leaves, losses, run_config

from bitjax.cli import main
from bitjax.config import MeshConfig
from bitjax.train import read_metrics, train
from bitjax.train.processes import join

RECIPE = """
from bitjax.config import RunConfig, from_json
def get_config():
    return from_json(RunConfig, {text!r})
"""


def free_port():
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return made.getsockname()[1]


def start(recipe, out, count, devices, *settings):
    """`bitjax train` as so many processes, each with so many devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "bitjax.cli", "train", str(recipe), "--out", str(out)]
    for setting in settings:
        command += ["--set", setting]
    return [
        subprocess.Popen(
            [*command, "--join", address, str(count), str(index)],
            env=os.environ | {"XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(count)
    ]


def finish(processes):
    said = [process.communicate(timeout=300)[0] for process in processes]
    return [process.returncode for process in processes], said


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a recipe, and the run of one process on one device."""
    from bitjax.config import to_json

    made = tmp_path_factory.mktemp("processes")
    (made / "recipe.py").write_text(RECIPE.format(text=to_json(run_config())))
    train(run_config(), made / "one")
    return made


def same_as_one(folder, name):
    """Tolerances as in `test_sharding`."""
    np.testing.assert_allclose(losses(folder / name), losses(folder / "one"), rtol=2e-6)
    for a, b in zip(leaves(folder / name), leaves(folder / "one"), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("count", "devices", "mesh"),
    [(2, 1, MeshConfig(data=2)), (4, 1, MeshConfig(fsdp=2, tensor=2))],
    ids=["2 processes", "4 processes"],
)
def test_processes_train_as_one(folder, count, devices, mesh):
    name = f"{count} processes"
    settings = [f"mesh.{axis}={size}" for axis, size in vars(mesh).items()]
    codes, said = finish(start(folder / "recipe.py", folder / name, count, devices, *settings))
    assert codes == [0] * count, said
    same_as_one(folder, name)
    assert [r["step"] for r in read_metrics(folder / name)] == [1, 2, 3, 4]
    assert sum("run directory" in text for text in said) == 1
    # What several processes wrote, one goes on from.
    shutil.rmtree(folder / name / "checkpoints" / "4")
    train(run_config(), folder / name)
    same_as_one(folder, name)


def test_a_signal_to_one_process_stops_all_and_they_go_on(folder):
    long = ("train.steps=4000", "train.checkpoint_every=4000", "mesh.fsdp=2", "train.eval_every=0")
    running = start(folder / "recipe.py", folder / "long", 2, 1, *long)
    deadline = time.monotonic() + 200
    while not read_metrics(folder / "long"):
        assert time.monotonic() < deadline, [process.poll() for process in running]
        time.sleep(0.2)
    running[1].send_signal(signal.SIGTERM)
    codes, said = finish(running)
    assert codes == [130, 130], said
    stopped = read_metrics(folder / "long")[-1]["step"]
    assert [int(p.name) for p in (folder / "long" / "checkpoints").iterdir()] == [stopped]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("localhost", "2", "0"), "process 0 of 2 at 'localhost': give HOST:PORT of the first"),
        (("localhost:1", "2", "2"), "process 2 of 2 at 'localhost:1': give"),
        (("localhost:1", "2"), "--join localhost:1 2 is not HOST:PORT N INDEX"),
        (("localhost:1", "two", "0"), "is not HOST:PORT N INDEX"),
    ],
)
def test_a_place_that_makes_no_sense(folder, words, message, capsys):
    out = folder / "never"
    assert main(["train", str(folder / "recipe.py"), "--out", str(out), "--join", *words]) == 1
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_without_a_cluster_the_place_must_be_said(folder):
    command = [sys.executable, "-m", "bitjax.cli", "train", str(folder / "recipe.py")]
    done = subprocess.run(
        [*command, "--out", str(folder / "never"), "--join"], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("bitjax: no cluster's manager says which process this is")
    assert len(done.stderr.splitlines()) == 1


def test_all_devices_must_be_in_the_mesh(folder):
    codes, said = finish(start(folder / "recipe.py", folder / "few", 2, 1))
    assert codes == [1, 1]
    assert "has 1 devices; the 2 processes have 2, and all must be in it" in said[0]
    assert not Path(folder / "few").exists()
    with pytest.raises(ValueError, match="give HOST:PORT"):
        join("nowhere", 1, 0)
