"""The command line end to end on tiny models: outputs, exit codes, one-sentence errors."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from tiny import tiny_model

from bitjax import cli
from bitjax.infer import pack_model
from bitjax.model.files import load_model, save_model

RECIPE = """
from bitjax.config import *
def get_config():
    return RunConfig(
        model=ModelConfig(hidden_size=32, intermediate_size=24, num_layers=1, num_heads=2,
                          num_kv_heads=2, head_dim=8, max_seq_len=32),
        data=DataConfig(text={text!r}),
        train=TrainConfig(steps=6, batch_size=2, seq_len=16, log_every=2, eval_every=3,
                          checkpoint_every=3),
    )
"""


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(np.random.default_rng(0).integers(97, 123, 3000, dtype=np.uint8)))
    return path


@pytest.fixture
def recipe(tmp_path, text):
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE.format(text=str(text)))
    return path


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "packed.safetensors"
    save_model(path, pack_model(tiny_model(vocab_size=256, num_layers=1)))
    return path


def run(*arguments):
    return cli.main([str(a) for a in arguments])


def fails(capsys, message, *arguments):
    assert run(*arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("bitjax: ")
    assert error.count("\n") == 1
    assert message in error


def test_train_convert_eval_generate_inspect(recipe, text, tmp_path, capsys):
    directory, model = tmp_path / "run", tmp_path / "model.safetensors"
    assert run("train", recipe, "--out", directory, "--set", "train.steps=4") == 0
    out = capsys.readouterr().out
    assert "step 4/4" in out
    assert "tok/s" in out
    assert json.loads((directory / "config.json").read_text())["train"]["steps"] == 4
    assert run("convert", directory, "-o", model) == 0
    assert run("eval", model, "--text", text, "--window", 16) == 0
    packed_score = capsys.readouterr().out
    assert run("eval", directory, "--text", text, "--window", 16) == 0
    assert "2,999" in packed_score  # every byte but the first
    assert packed_score.split("model")[-1].split()[-6:] == capsys.readouterr().out.split()[-6:]
    assert run("generate", model, "--prompt", "abc", "--max-new-tokens", 5) == 0
    out = capsys.readouterr().out
    assert out.startswith("abc")
    assert "5 tokens" in out
    assert "kernel" in out
    for path in (model, directory):
        assert run("inspect", path) == 0
        out = capsys.readouterr().out
        assert "blocks.0.attention.q" in out
        assert "hidden_size" in out
    assert run("convert", directory, "-o", tmp_path / "float.safetensors", "--float") == 0
    trained = load_model(tmp_path / "float.safetensors")
    tokens = np.arange(10, dtype=np.int32)[None]
    np.testing.assert_array_equal(
        np.asarray(trained(tokens)), np.asarray(load_model(model)(tokens))
    )


def test_training_resumes_by_the_same_command(recipe, tmp_path, capsys):
    assert run("train", recipe, "--out", tmp_path / "run") == 0
    capsys.readouterr()
    assert run("train", recipe, "--out", tmp_path / "run") == 0
    assert "step" not in capsys.readouterr().out  # nothing left to do


def test_inspect_counts_bits_and_zeros(packed, capsys):
    assert run("inspect", packed) == 0
    out = capsys.readouterr().out
    assert "packed" in out
    weights = 24 * 32 * 2 + 12 * 32 * 2 + 24 * 32 * 3
    stored = (2 * 2 + 1 * 2 * 2 + 2 * 2 + 2 * 2 * 3) * 64
    assert f"{weights:,} weights, {8 * stored / weights:.2f} bits each" in out


def test_bench_prints_a_table_and_json(capsys, monkeypatch):
    from bitjax import bench

    monkeypatch.setattr(bench, "CYCLED_BYTES", 2**20)
    monkeypatch.setattr(bench, "REPEATS", 2)
    assert run("bench", "--shape", 64, 96, "--rows", 1, 3) == 0
    document = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert document["shape"] == [64, 96]
    kernels = {result["kernel"] for result in document["results"]}
    assert {"scalar", "reference"} <= kernels
    assert len(document["results"]) == 2 * len(kernels)
    assert all(result["microseconds"] > 0 for result in document["results"])


def test_errors_are_one_sentence(recipe, packed, tmp_path, capsys):
    nowhere = tmp_path / "nowhere"
    fails(capsys, "nowhere does not exist", "eval", nowhere)
    fails(capsys, "is not a run", "inspect", tmp_path)
    fails(capsys, "recipe.py does not exist", "train", nowhere / "recipe.py", "--out", tmp_path)
    fails(capsys, "unknown setting train.stepps",
          "train", recipe, "--out", nowhere, "--set", "train.stepps=3")  # fmt: skip
    fails(capsys, "not of the form", "train", recipe, "--out", nowhere, "--set", "train")
    fails(capsys, "cannot read the text", "demo", "--text", nowhere, "--out", tmp_path / "demo")
    fails(capsys, "exists; choose another", "convert", packed, "-o", packed)
    fails(capsys, "is packed already", "convert", packed, "-o", nowhere)
    fails(capsys, "top_p=0.0 is not in", "generate", packed, "--top-p", 0)
    fails(capsys, "the prompt is empty", "generate", packed, "--prompt", "")
    fails(capsys, "leaves no room", "generate", packed, "--prompt", "x" * 100)
    fails(capsys, "stride=0 is not in", "eval", packed, "--window", 8, "--stride", 0)
    fails(capsys, "sizes must be 1 or more", "bench", "--shape", 0, 5)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(packed.read_bytes()[:-7])
    fails(capsys, "is not a safetensors file", "generate", damaged)
    assert not nowhere.exists()


def test_unknown_command_and_flag_exit_with_2():
    for arguments in (["dance"], [], ["eval"], ["train", "x", "--nope"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2


def test_ctrl_c_saves_and_the_same_command_goes_on(recipe, tmp_path):
    command = [sys.executable, "-m", "bitjax.cli", "train", str(recipe), "--out",
               str(tmp_path / "run"), "--set", "train.steps=100000"]  # fmt: skip
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the state is saved; run the same command again to go on" in error
    assert "Traceback" not in error
    assert any((tmp_path / "run" / "checkpoints").iterdir())


def test_demo_end_to_end(text, tmp_path, capsys, monkeypatch):
    """The whole demo, with its recipe shortened; a second call finds everything done."""
    from bitjax import demo
    from bitjax.config import override

    shakespeare = demo.shakespeare
    short = ["train.steps=4", "train.seq_len=16", "train.log_every=2", "model.num_layers=1",
             "train.eval_every=2", "model.max_seq_len=32"]  # fmt: skip
    monkeypatch.setattr(demo, "shakespeare", lambda *a: override(shakespeare(*a), short))
    for _ in range(2):
        assert run("demo", "--text", text, "--out", tmp_path / "demo", "--prompt", "ab") == 0
        out = capsys.readouterr().out
        assert "gap" in out
        assert "bits per weight packed" in out
        assert "tokens/s" in out
        # Operation by operation the packed model gives the training-time logits exactly.
        row = next(line for line in out.splitlines() if "operation by operation" in line)
        assert row.replace("│", " ").split()[3:] == ["0", "0", "100.0%"]
    names = {p.name for p in (tmp_path / "demo").iterdir()}
    assert names == {
        "ternary", "full-precision", "ternary.safetensors", "full-precision.safetensors",
        "ternary-packed.safetensors", "loss.png",
    }  # fmt: skip
    assert (tmp_path / "demo" / "loss.png").read_bytes().startswith(b"\x89PNG")
