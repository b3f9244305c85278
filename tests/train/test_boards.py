"""The boards of a run: the same numbers in TensorBoard's files and in those of Weights & Biases."""

import json
import struct
import sys
import time

import pytest

from bitjax.config import RunConfig, TrainConfig
from bitjax.train import Report
from bitjax.train.boards import boards_of
from bitjax.train.metrics import MetricsWriter

LAYERS = {"blocks.0.ffn.down": {"zero": 0.5, "flips": 0.25, "absmax": 4.5}}


def report(step, **more):
    return Report(
        step=step, steps=9, loss=2.5 / step, learning_rate=1e-3, gradient_norm=1.0,
        tokens_per_second=100.0, seconds_left=75.0, valid_loss=None, **more,
    )  # fmt: skip


def writer(directory, step=0, **train):
    return MetricsWriter(
        directory, step, boards_of(directory, RunConfig(train=TrainConfig(**train)))
    )


def events(folder):
    """TensorBoard's events: each record is its length (8 bytes), a CRC (4), the event, a CRC."""
    proto = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = []
    for path in sorted(folder.iterdir()):
        raw = path.read_bytes()
        while raw:
            (length,) = struct.unpack("<Q", raw[:8])
            found.append(proto.Event.FromString(raw[12 : 12 + length]))
            raw = raw[16 + length :]
    return found


def records(path):
    """Those of a .wandb file, which is small: 7 bytes, then records of a CRC (4), a length (2), a
    kind (1; 1 is whole) and a message."""
    proto = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    raw, found = path.read_bytes()[7:], []
    assert len(raw) < 32_000  # else records would be cut at blocks of 32 KiB
    while raw:
        length, kind = struct.unpack("<HB", raw[4:7])
        assert kind == 1
        found.append(proto.Record.FromString(raw[7 : 7 + length]))
        raw = raw[7 + length :]
    return found


def test_none_are_open_unless_asked_for(tmp_path):
    assert boards_of(tmp_path, RunConfig()) == []


def test_tensorboard_gets_every_number(tmp_path):
    pytest.importorskip("tensorboardX")
    with writer(tmp_path, tensorboard=True) as written:
        written.write(report(1, layers=LAYERS))
        written.write(report(2, mfu=0.5))
    found = {
        (event.step, value.tag): value.simple_value
        for event in events(tmp_path / "tensorboard")
        for value in event.summary.value
    }
    assert found[1, "loss"] == 2.5
    assert found[2, "loss"] == 1.25
    assert found[2, "mfu"] == 0.5
    assert found[1, "flips/blocks.0.ffn.down"] == 0.25
    assert found[1, "absmax/blocks.0.ffn.down"] == 4.5
    assert len(found) == 4 + 3 + 5


def test_tensorboard_forgets_what_is_repeated(tmp_path):
    pytest.importorskip("tensorboardX")
    with writer(tmp_path, tensorboard=True) as written:
        written.write(report(1))
        written.write(report(2))
        written.rewind(1)
        written.write(report(2))
    log = events(tmp_path / "tensorboard")
    starts = [event.step for event in log if event.HasField("session_log")]
    assert starts == [2]  # "drop what is of this step or later"


def test_weights_and_biases_gets_the_same_numbers_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for step in (0, 1):  # the run goes on under its name
        with writer(tmp_path, step, wandb="ladder") as written:
            written.write(report(step + 1, layers=LAYERS))
            written.rewind(step)
            written.write(report(step + 1, mfu=0.5))
        time.sleep(1)  # folders are named by the second
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    name = (tmp_path / "wandb-id").read_text().strip()
    assert {folder.name.rpartition("-")[2] for folder in folders} == {name}
    written = [r for folder in folders for r in records(next(folder.glob("*.wandb")))]
    rows = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in r.history.item}
        for r in written if r.HasField("history")
    ]  # fmt: skip
    assert [row["train_step"] for row in rows] == [1, 1, 2, 2]
    assert [row["loss"] for row in rows] == [2.5, 2.5, 1.25, 1.25]
    assert rows[0]["absmax/blocks.0.ffn.down"] == 4.5
    assert rows[1]["mfu"] == 0.5
    assert rows[0]["flips/blocks.0.ffn.down"] == 0.25
    run = next(r.run for r in written if r.HasField("run"))
    assert (run.project, run.run_id) == ("ladder", name)
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["train"]["wandb"] == "ladder"


def test_weights_and_biases_without_a_key_is_one_sentence(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def refused(**_):
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", refused)
    message = r"^train\.wandb='ladder': No API key configured\. WANDB_MODE=offline keeps"
    with pytest.raises(ValueError, match=message):
        writer(tmp_path, wandb="ladder")


@pytest.mark.parametrize(
    ("settings", "module", "message"),
    [
        ({"tensorboard": True}, "tensorboardX", r"needs tensorboardX; pip install 'bitjax\[tens"),
        ({"wandb": "a"}, "wandb", r"wandb='a' needs wandb; pip install 'bitjax\[wandb\]'"),
    ],
)
def test_what_is_not_installed_is_asked_for(tmp_path, monkeypatch, settings, module, message):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=message):
        writer(tmp_path, **settings)
