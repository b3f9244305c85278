"""The command line end to end on tiny models: outputs, exit codes, one-sentence errors."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy
from jax.errors import JaxRuntimeError
from texts import small_tokenizer
from tiny import changed, tiny_model

from bitjax import cli
from bitjax.infer import pack_model
from bitjax.model.files import load_model, save_model
from bitjax.ops import ffi

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
        assert run("inspect", path, "--all") == 0
        out = capsys.readouterr().out
        assert "blocks.0.attention.q" in out
        assert "hidden_size" in out
    assert run("convert", directory, "-o", tmp_path / "float.safetensors", "--float") == 0
    trained = load_model(tmp_path / "float.safetensors")
    tokens = np.arange(10, dtype=np.int32)[None]
    # Operation by operation, and unfused: to the bit.
    np.testing.assert_array_equal(
        np.asarray(trained(tokens)), np.asarray(changed(load_model(model), fuse=False)(tokens))
    )


def test_training_resumes_by_the_same_command(recipe, tmp_path, capsys):
    assert run("train", recipe, "--out", tmp_path / "run") == 0
    capsys.readouterr()
    assert run("train", recipe, "--out", tmp_path / "run") == 0
    assert "step" not in capsys.readouterr().out  # nothing left to do


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "float.safetensors"
    save_model(path, tiny_model(num_layers=1, tie_embeddings=False))
    return path


@pytest.mark.parametrize("tables", ["float32", "bfloat16", "int8", "int4", "screened"])
@pytest.mark.parametrize("bits", ["2", "1.6"])
def test_convert_to_every_format(trained, tmp_path, capsys, bits, tables):
    path = tmp_path / "model.safetensors"
    assert run("convert", trained, "-o", path, "--bits", bits, "--tables", tables) == 0
    assert capsys.readouterr().out.startswith(f"{path}: ")
    wanted = tmp_path / "wanted.safetensors"
    save_model(wanted, pack_model(load_model(trained), f"ternary{bits}", tables))
    found, expected = (safetensors.numpy.load_file(file) for file in (path, wanted))
    names = set(found)
    assert names == set(expected)
    for name, array in expected.items():  # scales are stored for each row
        np.testing.assert_array_equal(found[name], np.broadcast_to(array, found[name].shape))
    assert f"blocks.0.ffn.down.weight.ternary{bits}" in names
    packed_table = tables.startswith("int")
    assert (f"head.{tables}" in names) == packed_table
    assert ("head" in names) != packed_table
    if tables in ("int4", "screened"):
        assert run("generate", path, "--prompt", "ab", "--max-new-tokens", 2) == 0
        assert run("generate", path, "--max-new-tokens", 2, "--cache", "int8") == 0
        assert "2 tokens" in capsys.readouterr().out
        assert run("inspect", path, "--all") == 0
        out = capsys.readouterr().out
        assert f"ternary{bits}" in out
        assert ("head" if tables == "int4" else "screen") + ".multipliers" in out


def test_two_bits_and_float32_tables_by_default(trained, tmp_path):
    for name, options in (("a", ()), ("b", ("--bits", 2, "--tables", "float32"))):
        assert run("convert", trained, "-o", tmp_path / name, *options) == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_smaller_formats_make_smaller_files(trained, tmp_path):
    forms = [("2", "float32"), ("2", "bfloat16"), ("2", "int8"), ("2", "int4")]
    sizes = []
    for bits, tables in forms:
        assert run("convert", trained, "-o", tmp_path / "model", "--overwrite",
                   "--bits", bits, "--tables", tables) == 0  # fmt: skip
        sizes.append((tmp_path / "model").stat().st_size)
    assert sizes == sorted(sizes, reverse=True)
    values = 2 * 256 * 32
    assert sizes[0] - sizes[1] == pytest.approx(2 * values, abs=300)  # headers differ
    assert sizes[1] - sizes[2] == pytest.approx(values - 2 * 256 * 4, abs=300)
    # 4 bits and a multiplier of a byte for each row's 32 columns
    assert sizes[2] - sizes[3] == pytest.approx(values / 2 - 2 * 256, abs=300)


# Rows of 16 by columns of 16 (2 bits) or 20 (1.6 bits) take 64 bytes; stacked matrices of 48 rows
# have as many scales, the others one.
@pytest.mark.parametrize(
    ("layout", "stored"),
    [
        ("ternary2", (3 * 2 + 2 * 2 + 3 * 2 + 2 * 2) * 64),
        ("ternary1.6", (3 * 2 + 2 * 2 + 3 * 2 + 2 * 2) * 64),
    ],
)
@pytest.mark.parametrize("tables", ["float32", "int8"])
def test_inspect_counts_bits(tmp_path, capsys, layout, tables, stored):
    path = tmp_path / "model.safetensors"
    save_model(path, pack_model(tiny_model(num_layers=1), layout, tables))
    assert run("inspect", path, "--all") == 0
    out = capsys.readouterr().out
    assert layout in out
    weights = 48 * 32 + 32 * 24 + 48 * 32 + 32 * 24
    scales = 4 * (48 + 1 + 48 + 1)
    assert f"{weights:,} weights, {8 * (stored + scales) / weights:.2f} bits each" in out


def test_inspect_counts_the_bits_of_a_float_file(trained, capsys):
    assert run("inspect", trained) == 0
    assert "4,608 weights, 32.00 bits each" in capsys.readouterr().out


def test_bench_prints_a_table_and_json(capsys, monkeypatch):
    small_measurements(monkeypatch)
    ffi.set_threads(7)
    assert run("bench", "--shape", 64, 96, "--rows", 1, 3, "--layouts", "int4", "int8",
               "--threads", 1) == 0  # fmt: skip
    document = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert ffi.set_threads(None) == 7  # the benchmark's limit ends with it
    assert document["threads"] == 1
    assert document["shape"] == [64, 96]
    measured = [(r["kernel"], r["layout"], r["rows"]) for r in document["results"]]
    assert sorted(measured) == sorted(
        (kernel, layout, rows)
        for kernel in ffi.kernels() for layout in ("int4", "int8") for rows in (1, 3)
    )  # fmt: skip
    assert all(r["microseconds"] > 0 and r["of_peak"] > 0 for r in document["results"])


def small_measurements(monkeypatch):
    from bitjax.bench import ceilings, kernels, model

    monkeypatch.setattr(kernels, "CYCLED_BYTES", 2**20)
    monkeypatch.setattr(kernels, "REPEATS", 2)
    monkeypatch.setattr(ceilings, "READ_BYTES", 2**20)
    monkeypatch.setattr(ceilings, "DOT_ROUNDS", 10_000)
    monkeypatch.setattr(model, "DECODED", 4)
    monkeypatch.setattr(model, "BATCH_PROMPT", 8)
    monkeypatch.setattr(model, "BATCH_DECODED", 3)


def test_dummy_model_and_its_benchmark(tmp_path, capsys, monkeypatch):
    path = tmp_path / "dummy.safetensors"
    tiny = [
        f"--set={setting}" for setting in
        ("num_layers=1", "hidden_size=32", "num_heads=2", "num_kv_heads=1", "head_dim=16",
         "intermediate_size=48", "vocab_size=300", "max_seq_len=128")
    ]  # fmt: skip
    assert run("dummy", "b1.58-2b4t", "-o", path, *tiny) == 0
    fails(capsys, "exists; choose another", "dummy", "7b", "-o", path)
    fails(capsys, "no preset '8b'", "dummy", "8b", "-o", tmp_path / "x")
    small_measurements(monkeypatch)
    # Another engine's program: prints what llama-bench prints, twice as slow at prompts.
    program = tmp_path / "llama-bench"
    program.write_text(
        "#!/bin/sh\necho noise >&2\n"
        "case \"$*\" in *'-n 0'*) rate=2.0;; *) rate=8.0;; esac\n"
        'echo "[{\\"avg_ts\\": $rate}]"\n'
    )
    program.chmod(0o755)
    rival = f"other={program},{path}"
    assert run("bench", path, "--prompt", 20, "--batch", 3, "--rounds", 2, "--against", rival) == 0
    document = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert set(document["results"]) == {
        "decode", "prompt 20", "context 128", "batch 3", "shared 3"
    }  # fmt: skip
    assert document["rivals"]["other"] == {
        "decode": [8.0, 8.0], "prompt 20": [2.0, 2.0], "context 128": [], "batch 3": [],
        "shared 3": [],
    }  # fmt: skip
    for name, theirs in (("decode", 8.0), ("prompt 20", 2.0)):
        result = document["results"][name]
        assert result["slowest"] <= result["tokens_per_s"] <= result["fastest"]
        ratio = result["against"]["other"]
        assert ratio["lowest"] == pytest.approx(result["slowest"] / theirs)
        assert ratio["highest"] == pytest.approx(result["fastest"] / theirs)
    assert document["results"]["batch 3"]["against"] == {}
    assert document["file_bytes"] == path.stat().st_size
    peaks = list(document["peak_resident_bytes"].values())
    assert len(peaks) == len(document["results"])
    assert peaks[0] > 10**7
    assert peaks == sorted(peaks)
    energy = document["energy"]
    assert energy["source"] == ("measured" if energy["rounds"] else "modelled")
    assert energy["joules_per_token"] > 0
    batched = tmp_path / "llama-batched-bench"
    batched.write_text(
        f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\n'
        "echo '| PP | TG | B | S_TG t/s |' >&2\necho '| 8 | 3 | 3 | 5.00 |' >&2\n"
    )
    batched.chmod(0o755)
    ffi.set_threads(7)
    assert run("bench", path, "--prompt", "--batch", 3, "--rounds", 1, "--threads", 1,
               "--against", f"{rival},-rtr,1,-x") == 0  # fmt: skip
    document = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert ffi.set_threads(None) == 7  # the benchmark's limit ends with it
    assert document["threads"] == 1
    assert document["rivals"]["other"] == {
        "decode": [8.0], "context 128": [], "batch 3": [5.0], "shared 3": [5.0]
    }  # fmt: skip
    common = f"-m {path} -rtr -x -b 2048 -ub 512 -t 1 -c 33 -tb 1 -npp 8 -ntg 3 -npl 3"
    assert (tmp_path / "calls").read_text().splitlines() == [common, f"{common} -pps"]
    batched.unlink()
    fails(capsys, "there is no file", "bench", path, "--against", f"x={program},{path}.gguf")
    fails(capsys, "is not NAME=LLAMA_BENCH", "bench", path, "--against", "x")
    fails(capsys, "no room in the context of 128", "bench", path, "--prompt", 128)
    fails(capsys, "--context 129 is beyond the model's context of 128", "bench", path, "--prompt",
          "--context", 129)  # fmt: skip
    fails(capsys, "more than the 6 tokens that are decoded", "bench", path, "--prompt",
          "--context", 6)  # fmt: skip
    limits = {}
    for cache in ("float32", "bfloat16", "int8"):
        assert run("bench", path, "--cache", cache, "--prompt", "--batch", "--context", 64, 128,
                   "--rounds", 1) == 0  # fmt: skip
        document = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
        assert document["cache"] == cache
        read = document["read_gb_per_s"][0] * 1e9
        seconds = [1 / document["results"][f"context {C}"]["limit"] for C in (64, 128)]
        limits[cache] = read * (seconds[1] - seconds[0]) / 64
    # A layer, a key head, 16 dimensions, keys and values.
    wanted = {"float32": 128, "bfloat16": 64, "int8": 32 + 4}
    assert limits == pytest.approx(wanted)
    program.write_text("#!/bin/sh\necho 'error: no such model' >&2\nexit 1\n")
    fails(capsys, "failed: error: no such model", "bench", path, "--prompt", 20, "--batch", 1,
          "--rounds", 1, "--against", rival)  # fmt: skip


def test_errors_are_one_sentence(recipe, packed, tmp_path, capsys):
    nowhere = tmp_path / "nowhere"
    fails(capsys, "nowhere does not exist", "eval", nowhere)
    fails(capsys, "is neither a run", "inspect", tmp_path)
    fails(capsys, "recipe.py does not exist", "train", nowhere / "recipe.py", "--out", tmp_path)
    fails(capsys, "unknown setting train.stepps",
          "train", recipe, "--out", nowhere, "--set", "train.stepps=3")  # fmt: skip
    fails(capsys, "not of the form", "train", recipe, "--out", nowhere, "--set", "train")
    fails(capsys, "cannot read the text", "demo", "--text", nowhere, "--out", tmp_path / "demo")
    fails(capsys, "exists; choose another", "convert", packed, "-o", packed)
    fails(capsys, "top_p=0.0 is not in", "generate", packed, "--top-p", 0)
    fails(capsys, "the prompt is empty", "generate", packed, "--prompt", "")
    fails(capsys, "leaves no room", "generate", packed, "--prompt", "x" * 100)
    fails(capsys, "stride=0 is not in", "eval", packed, "--window", 8, "--stride", 0)
    fails(capsys, "sizes must be 1 or more", "bench", "--shape", 0, 5)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(packed.read_bytes()[:-7])
    fails(capsys, "not fully covered; it may have been cut off", "generate", damaged)
    fails(capsys, "nowhere: No such file or directory", "chat", packed, "--template", nowhere)
    damaged.write_bytes(b"{{ \xff }}")
    fails(capsys, "is not UTF-8 text: invalid start byte at byte 3",
          "chat", packed, "--template", damaged)  # fmt: skip
    fails(capsys, "--window 0 is below 1", "eval", packed, "--window", 0)
    fails(capsys, "--seed -1 is below 0", "dummy", "7b", "-o", nowhere, "--seed", -1)
    assert not nowhere.exists()


def test_bits_of_some_layers(trained, tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    convert = ("convert", trained, "-o", path, "--bits", "1.6")
    for text in ("*.down", "=2", "*.down=3", "*.down=", "*.down=2=1"):
        fails(capsys, "is not PATTERN=2 or PATTERN=1.6", *convert, "--layer-bits", text)
    fails(capsys, "no linear layer matches '*.up'", *convert, "--layer-bits=*.up=2")
    assert not path.exists()
    assert run(*convert, "--layer-bits", "*.ffn.*=2", "--layer-bits", "*.down=1.6") == 0
    dummy = tmp_path / "dummy.safetensors"
    tiny = ("--set=num_layers=1", "--set=hidden_size=32", "--set=vocab_size=300")
    assert run("dummy", "b1.58-2b4t", "-o", dummy, *tiny, "--layer-bits", "*.gate_up=2") == 0
    for file in (path, dummy):
        names = set(safetensors.numpy.load_file(file))
        assert "blocks.0.ffn.gate_up.weight.ternary2" in names
        assert "blocks.0.ffn.down.weight.ternary1.6" in names
        assert "blocks.0.attention.qkv.weight.ternary1.6" in names


def test_unknown_command_and_flag_exit_with_2():
    convert = ["convert", "x", "-o", "y"]
    for arguments in (["dance"], [], ["eval"], ["train", "x", "--nope"],
                      [*convert, "--bits", "3"], [*convert, "--tables", "int2"]):  # fmt: skip
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


@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        ("blocks.0.ffn.down.weight.ternary2", 0b11, "holds the code 3"),
        ("blocks.0.ffn.down.weight.ternary1.6", 243, "holds a byte above 242"),
        ("embedding.multipliers", 16, "multipliers must be from 1 to 15"),
        ("embedding.multipliers", 0, "multipliers must be from 1 to 15"),
    ],
)
def test_damaged_weights_are_one_sentence(tmp_path, capsys, tensor, value, message):
    layout = "ternary1.6" if tensor.endswith("1.6") else "ternary2"
    path = tmp_path / "model.safetensors"
    save_model(path, pack_model(tiny_model(num_layers=1), layout, "int4"))
    raw = bytearray(path.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    first, last = json.loads(raw[8 : 8 + length])[tensor]["data_offsets"]
    raw[8 + length + (first + last) // 2] = value
    path.write_bytes(raw)
    for command in ("generate", "eval", "inspect"):
        fails(capsys, message, command, path)


def test_a_model_with_a_tokenizer(text, tmp_path, capsys):
    """Its tokens serve evaluation, generation and inspection, and stay through a conversion."""
    model = tiny_model(vocab_size=272, num_layers=1)
    model.tokenizer = small_tokenizer()
    first, packed = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_model(first, model)
    assert run("convert", first, "-o", packed) == 0
    capsys.readouterr()
    assert run("eval", packed, "--text", text, "--window", 16) == 0
    out = capsys.readouterr().out
    assert "tokens scored" in out
    scored = len(small_tokenizer().encode(text.read_text())) - 1
    assert f"{scored:,}" in out
    assert run("generate", packed, "--prompt", "hello", "--max-new-tokens", 3) == 0
    assert capsys.readouterr().out.startswith("hello")
    assert run("inspect", packed) == 0
    assert "272 tokens, chat template" in " ".join(capsys.readouterr().out.split())


def test_errors_of_xla_are_a_sentence_and_faults_of_ours_are_not(monkeypatch, capsys):
    def failing(error):
        def fail(*_):
            raise error

        return fail

    said = "INTERNAL: Error dispatching computation: bitjax_packed_matmul: unknown kernel 'nope'"
    monkeypatch.setattr("bitjax.bench.bench_kernels", failing(JaxRuntimeError(said)))
    assert run("bench") == 1
    assert capsys.readouterr().err == "bitjax: unknown kernel 'nope'\n"
    said = "RESOURCE_EXHAUSTED: Out of memory allocating 15 bytes."
    monkeypatch.setattr("bitjax.bench.bench_kernels", failing(JaxRuntimeError(said)))
    assert run("bench") == 1
    assert capsys.readouterr().err == "bitjax: Out of memory allocating 15 bytes.\n"
    monkeypatch.setattr("bitjax.bench.bench_kernels", failing(RuntimeError("a fault")))
    with pytest.raises(RuntimeError, match="a fault"):
        run("bench")
