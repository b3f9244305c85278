import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from tiny import tiny_config

from bitjax.config import DataConfig, OptimizerConfig, RunConfig, TrainConfig, override, to_json
from bitjax.train import Diverged, Interrupted, read_metrics, train
from bitjax.train.checkpoint import read_run
from bitjax.train.flops import flops_per_token


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(np.random.default_rng(0).integers(97, 110, 4000, dtype=np.uint8)))
    return RunConfig(
        model=tiny_config(num_layers=1),
        data=DataConfig(text=str(path)),
        optimizer=OptimizerConfig(warmup_steps=2),
        train=TrainConfig(
            steps=12,
            batch_size=2,
            seq_len=8,
            log_every=1,
            eval_every=6,
            checkpoint_every=4,
            stochastic_rounding="both",
        ),
    )


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def losses(directory):
    """With the codes' fractions and flips: a resumed run compares with the codes it restored."""
    return {
        r["step"]: (r["loss"], r.get("valid_loss"), r["layers"]) for r in read_metrics(directory)
    }


def test_a_run_leaves_config_metrics_and_checkpoints(config, tmp_path):
    reports = []
    state = train(config, tmp_path / "run", reports.append)
    assert [r.step for r in reports] == list(range(1, 13))
    assert [r.step for r in reports if r.valid_loss is not None] == [6, 12]
    assert reports[-1].seconds_left == 0
    assert 0 < max(r.flip_rate for r in reports) < 0.5
    assert sorted(reports[-1].layers) == sorted(
        f"blocks.0.{n}" for n in ("attention.qkv", "attention.o", "ffn.gate_up", "ffn.down")
    )
    for r in reports:
        used = r.tokens_per_second * flops_per_token(config.model, config.train.seq_len)
        assert r.mfu == pytest.approx(used / (1e9 * r.peak_gflops))
        assert r.update_norm > 0
    assert (tmp_path / "run" / "config.json").read_text() == to_json(config) + "\n"
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["12", "8"]
    found, step, restored = read_run(tmp_path / "run")
    assert (found, step) == (config, 12)
    same(restored, state)


def test_a_finished_run_is_not_repeated(config, tmp_path):
    state = train(config, tmp_path / "run")
    before = losses(tmp_path / "run")
    reports = []
    same(train(config, tmp_path / "run", reports.append), state)
    assert reports == []
    assert losses(tmp_path / "run") == before


def test_interrupted_and_resumed_equals_unbroken(config, tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    unbroken = train(config, tmp_path / "unbroken")

    def interrupt(report):
        if report.step == 6:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="stopped after step 7; the state is saved"):
        train(config, tmp_path / "run", interrupt)
    assert signal.getsignal(signal.SIGINT) is handler
    resumed_at = []
    resumed = train(config, tmp_path / "run", lambda r: resumed_at.append(r.step))
    assert resumed_at[0] == 8
    same(resumed, unbroken)


KILLED = """
import os, signal, sys
from pathlib import Path
from bitjax.config import RunConfig, from_json
from bitjax.train import train
config = from_json(RunConfig, Path(sys.argv[1]).read_text())
train(config, Path(sys.argv[2]), lambda r: print(r.step, flush=True))
"""


def test_kill_9_and_resume_gives_bit_identical_losses(config, tmp_path):
    """Killed twice without warning, the run's losses and state equal those of an unbroken one."""
    (tmp_path / "config.json").write_text(to_json(config))
    command = [sys.executable, "-c", KILLED, str(tmp_path / "config.json"), str(tmp_path / "run")]
    for kill_at in (6, 11):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                if int(line) == kill_at:
                    process.kill()
        assert process.returncode == -signal.SIGKILL
    resumed = train(config, tmp_path / "run")
    unbroken = train(config, tmp_path / "unbroken")
    same(resumed, unbroken)
    assert losses(tmp_path / "run") == losses(tmp_path / "unbroken")
    assert sorted(losses(tmp_path / "run")) == list(range(1, 13))


def test_the_checkpoint_of_the_lowest_validation_loss_is_kept(config, tmp_path, monkeypatch):
    """Measured at 3, 6, 9 and 12; 3 is no step of `checkpoint_every`."""
    measured = iter([2.0, 3.0, 2.5, 2.25])
    monkeypatch.setattr("bitjax.train.loop.validate", lambda *_: {"loss": next(measured)})
    train(override(config, ["train.eval_every=3"]), tmp_path / "run")
    names = sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == [3, 8, 12]
    assert read_run(tmp_path / "run", 3)[1] == 3


def test_a_metrics_line_cut_short_is_forgotten(config, tmp_path):
    train(override(config, ["train.steps=12"]), tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])
    assert [r["step"] for r in read_metrics(tmp_path / "run")] == list(range(1, 12))


def test_other_settings_or_text_are_refused(config, tmp_path):
    train(config, tmp_path / "run")
    with pytest.raises(ValueError, match=r"train.steps=12 there, 13 here"):
        train(override(config, ["train.steps=13"]), tmp_path / "run")
    with open(config.data.text, "ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match="another version of the training text"):
        train(config, tmp_path / "run")


def test_damaged_checkpoint_is_one_error(config, tmp_path):
    train(config, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints" / "12").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"cannot read checkpoint .*checkpoints/12"):
        read_run(tmp_path / "run")


def test_divergence_stops_with_the_last_good_checkpoint(config, tmp_path):
    wild = override(config, ["optimizer.learning_rate=1e30", "optimizer.warmup_steps=0",
                             "optimizer.stage_two_learning_rate=none"])  # fmt: skip
    # Reports are rarer than checkpoints: the state must be looked at before it is saved.
    wild = override(wild, ["train.log_every=12", "train.eval_every=0"])
    with pytest.raises(Diverged, match=r"the loss became nan at about step 4; lower"):
        train(wild, tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_errors(config, tmp_path):
    with pytest.raises(ValueError, match=r"vocab_size=32; the tokens of .* need 256"):
        train(override(config, ["model.vocab_size=32"]), tmp_path / "run")
    with pytest.raises(ValueError, match="is not a run"):
        read_run(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot make the folder"):
        train(config, tmp_path / "file" / "run")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no finished checkpoint"):
        read_run(tmp_path / "empty")
