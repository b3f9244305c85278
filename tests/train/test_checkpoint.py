"""What is on the disk when a write fails, or what is there is damaged."""

import errno
import os
import shutil
import threading

import jax
import numpy as np
import pytest
from tiny import tiny_config

from bitjax.config import DataConfig, RunConfig, TrainConfig, override
from bitjax.train import Trainer, checkpoint, train
from bitjax.train.checkpoint import Checkpoints, Position, read_run


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(bytes(np.random.default_rng(0).integers(97, 110, 4000, dtype=np.uint8)))
    return RunConfig(
        model=tiny_config(num_layers=1),
        data=DataConfig(text=str(path)),
        train=TrainConfig(
            steps=6, batch_size=2, seq_len=8, log_every=1, eval_every=0, checkpoint_every=2,
            keep_checkpoints=3, log_codes=False, peak_gflops=100.0,
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished") / "run"
    return directory, train(config, directory)


@pytest.fixture(scope="module")
def start(config):
    return Trainer(config).init()


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def at(state, step):
    """A state of this step; the loop would give another one, the disk does not care."""
    return type(state)(np.int32(step), state.params, state.opt_state)


def steps(directory):
    return sorted(int(p.name) for p in (directory / "checkpoints").iterdir())


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(folder):
    path = largest(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble(folder):
    path = largest(folder)
    path.write_bytes(os.urandom(path.stat().st_size))


def truncate_all(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble_about(folder):
    (folder / "about" / "metadata").write_bytes(b"\xff{ no JSON")


def empty(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


DAMAGES = [
    truncate, garble, truncate_all, garble_about, empty,
    lambda folder: largest(folder).unlink(),
    lambda folder: shutil.rmtree(folder / "state"),
    lambda folder: (folder / "crc32.json").write_text("[]"),
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(
    damage, config, finished, tmp_path
):
    done, state = finished
    directory = tmp_path / "run"
    shutil.copytree(done, directory)
    damage(directory / "checkpoints" / "6")
    with pytest.raises(ValueError, match=r"cannot read checkpoint .*checkpoints/6: "):
        read_run(directory)
    with pytest.warns(UserWarning, match=r"cannot read checkpoint .*/6: .*; going on from step 4"):
        same(train(config, directory), state)
    assert (directory / "damaged-6").is_dir()  # nothing is thrown away
    assert steps(directory) == [2, 4, 6]
    same(read_run(directory)[2], state)


def test_one_flipped_bit_anywhere_is_seen(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    generator = np.random.default_rng(0)
    for path in (tmp_path / "run" / "checkpoints" / "6").rglob("*"):
        if path.is_file() and path.stat().st_size and path.name != "crc32.json":
            whole = path.read_bytes()
            bad = bytearray(whole)
            bad[generator.integers(len(bad))] ^= 1 << generator.integers(8)
            path.write_bytes(bad)
            with pytest.raises(ValueError, match=rf"{path.name} is not as it was written"):
                read_run(tmp_path / "run")
            path.write_bytes(whole)
    same(read_run(tmp_path / "run")[2], finished[1])


def test_a_checkpoint_without_a_seal_is_read(finished, tmp_path):
    """As earlier versions wrote them."""
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "6" / "crc32.json").unlink()
    same(read_run(tmp_path / "run")[2], finished[1])


def test_all_damaged_is_one_error_and_nothing_is_moved(config, finished, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(finished[0], directory)
    for step in (2, 4, 6):
        truncate_all(directory / "checkpoints" / str(step))
    with pytest.raises(ValueError, match=r"cannot read checkpoint .*checkpoints/6"):
        train(config, directory)
    assert steps(directory) == [2, 4, 6]


class FullDisk(Exception):
    """As tensorstore says it: not an OSError, the reason inside a sentence."""


@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
     FullDisk("RESOURCE_EXHAUSTED: Error writing [OS error 28: No space left on device]")],
)  # fmt: skip
def test_full_disk_is_one_sentence_and_the_checkpoint_before_is_whole(
    failure, config, finished, tmp_path, monkeypatch
):
    save = checkpoint.ocp.Checkpointer.save

    def fail_at_4(self, path, *arguments, **named):
        if path.name.startswith("4."):
            path.mkdir()
            raise failure
        save(self, path, *arguments, **named)

    monkeypatch.setattr(checkpoint.ocp.Checkpointer, "save", fail_at_4)
    with pytest.raises(
        OSError, match=r"cannot write checkpoint .*/4: no space left on device; checkpoint 2 is"
    ):
        train(config, tmp_path / "run")
    assert steps(tmp_path / "run") == [2]  # and no half-written folder takes up the disk
    monkeypatch.undo()
    same(train(config, tmp_path / "run"), finished[1])  # there is room again


def test_a_disk_too_small_is_seen_before_the_write(config, start, tmp_path, monkeypatch):
    size = sum(np.asarray(x).nbytes for x in jax.tree.leaves(start))
    free = [size - 1]
    usage = shutil._ntuple_diskusage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, free[0]))
    checkpoints = Checkpoints(tmp_path, config, "hash")
    checkpoints.save(at(start, 1), Position())
    with pytest.raises(OSError, match=r"/1: no space left on device; there is none before it, and"):
        checkpoints.wait()
    free[0] = size
    with checkpoints:
        checkpoints.save(at(start, 1), Position())
    assert steps(tmp_path) == [1]


def test_full_disk_under_the_metrics_is_one_sentence(config, tmp_path, monkeypatch):
    def full(self, report):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("bitjax.train.metrics.MetricsWriter.write", full)
    with pytest.raises(OSError, match=r"cannot write to .*run: no space left on device; finished"):
        train(config, tmp_path / "run")


def test_saving_does_not_wait_and_copies(config, start, tmp_path, monkeypatch):
    """The write stands still while the caller goes on and its arrays change."""
    go = threading.Event()
    save = checkpoint.ocp.Checkpointer.save

    def held(self, *arguments, **named):
        assert go.wait(60)
        save(self, *arguments, **named)

    monkeypatch.setattr(checkpoint.ocp.Checkpointer, "save", held)
    changing = jax.tree.map(np.array, at(start, 1))
    with Checkpoints(tmp_path, config, "hash") as checkpoints:
        checkpoints.save(changing, Position())
        checkpoints.check()
        assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name == "1"]
        for leaf in jax.tree.leaves(changing):
            leaf *= 0
        go.set()
    same(read_run(tmp_path)[2], at(start, 1))


def test_keeps_the_newest_and_the_best(config, start, tmp_path):
    with Checkpoints(tmp_path, override(config, ["train.keep_checkpoints=2"]), "h") as checkpoints:
        for step in range(1, 7):
            checkpoints.save(at(start, step), Position(best_step=2, best_loss=1.0))
            checkpoints.wait()
    assert steps(tmp_path) == [2, 5, 6]
    forgetful = override(config, ["train.keep_checkpoints=1", "train.keep_best=false"])
    with Checkpoints(tmp_path, forgetful, "h") as checkpoints:  # may differ from the run's own
        found, position = checkpoints.restore(Trainer(config))
        assert int(found.step) == 6
        assert position == Position(best_step=2, best_loss=1.0)
        checkpoints.save(at(start, 7), position)
    assert steps(tmp_path) == [7]


def test_leftovers_of_a_killed_process_are_swept(config, start, tmp_path):
    for name in ("4.orbax-checkpoint-tmp-17", "2.deleted.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name / "state").mkdir(parents=True)
    with Checkpoints(tmp_path, config, "hash") as checkpoints:
        assert checkpoints.restore(Trainer(config)) is None
    assert steps(tmp_path) == []


def test_no_such_step(finished):
    with pytest.raises(ValueError, match=r"has no checkpoint 5; it has \[2, 4, 6\]"):
        read_run(finished[0], 5)
