"""Whole jobs on a tiny model: interrupted, killed, changed; the same bytes in the end."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from texts import small_tokenizer
from tiny import tiny_model

from bitjax import cli
from bitjax.batch import Batch, Source, job, run_batch
from bitjax.config import BatchConfig, EngineConfig
from bitjax.engine import Request, Sampling
from bitjax.infer import pack_model
from bitjax.model.files import save_model
from bitjax.protocol import Encoder
from bitjax.protocol.calls import derived_seed
from bitjax.train import Interrupted

LINES = 40


@pytest.fixture(scope="module")
def model():
    made = tiny_model(vocab_size=272, num_layers=1, max_seq_len=48)
    made.tokenizer = small_tokenizer()
    return pack_model(made)


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(path, model)
    return path


def lines_of(count):
    for i in range(count):
        yield (
            f"hello {i}",
            {"prompt": f"w{i}", "id": f"i{i}", "max_tokens": 1 + i % 5},
            {"messages": [{"role": "user", "content": f"{i}"}], "max_tokens": 2},
            {"prompt": "x" * 100},
        )[i % 4]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("input") / "in.jsonl"
    with path.open("w") as file:
        for line in lines_of(LINES):
            file.write(json.dumps(line) + "\n")
    return path


def batch_of(source, output, **changes):
    made = Batch(
        Source(source), output, BatchConfig(), {"max_tokens": 4}, EngineConfig(max_sequences=4)
    )
    return dataclasses.replace(made, **changes)


@pytest.fixture(scope="module")
def whole(model, source, tmp_path_factory):
    """The records of a job that nothing disturbed."""
    path = tmp_path_factory.mktemp("whole") / "out.jsonl"
    done = run_batch(batch_of(source, path), model)
    assert (done.done, done.errors) == (LINES, LINES // 4)
    assert done.tokens == sum(r["usage"]["completion_tokens"] for r in records(path) if "text" in r)
    return path.read_bytes()


def records(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_records_are_the_engines_texts(model, whole):
    from bitjax.engine import Engine

    found = [json.loads(line) for line in whole.splitlines()]
    assert [record["index"] for record in found] == list(range(LINES))
    encoder = Encoder(model.tokenizer, model.config, 48)
    for index, value in enumerate(lines_of(9)):
        if index % 4 == 3:
            assert found[index]["error"]["code"] == "context_length_exceeded"
            continue
        fields = value if isinstance(value, dict) else {"prompt": value, "max_tokens": 4}
        if "messages" in fields:
            [tokens] = encoder.chats([fields["messages"]])
        else:
            tokens = encoder.prompt(fields["prompt"])
        sampling = Sampling(max_new_tokens=fields["max_tokens"], seed=derived_seed(0, index))
        [wanted] = Engine(model).generate([Request("r", tokens, sampling)])
        assert found[index]["text"] == wanted.choices[0].text
        assert found[index].get("id") == fields.get("id")
    encoder.close()


def test_as_they_are_done(model, source, whole, tmp_path):
    path = tmp_path / "out.jsonl"
    run_batch(batch_of(source, path, config=BatchConfig(order="done")), model)
    raw = path.read_bytes()
    assert raw != whole
    assert sorted(raw.splitlines()) == sorted(whole.splitlines())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("order", ["input", "done"])
def test_signals_and_resuming(model, source, whole, tmp_path, number, order):
    path, counts = tmp_path / "out.jsonl", []
    batch = batch_of(source, path, config=BatchConfig(order=order))

    def stop(now):
        if now.done > 8 + (counts[-1] if counts else 0):
            signal.raise_signal(number)

    for _ in range(2):
        with pytest.raises(Interrupted, match=rf"^stopped with [0-9]+ of {LINES} lines done$"):
            run_batch(batch, model, stop)
        done = len(records(path)) + len(records(path.with_name("out.jsonl.ahead"))
                                        if order == "input" else [])  # fmt: skip
        counts.append(done)
        assert 0 < done < LINES
    assert counts[0] < counts[1]
    done = run_batch(batch, model)
    assert done.done == LINES
    assert sorted(path.read_bytes().splitlines()) == sorted(whole.splitlines())
    assert order == "done" or path.read_bytes() == whole
    again = run_batch(batch, model, lambda now: pytest.fail("a complete job was run again"))
    assert (again.done, again.tokens) == (LINES, 0)


def test_kill_9(source, path, whole, tmp_path):
    out = tmp_path / "out.jsonl"
    command = ["batch", path, source, "-o", out, "--max-new-tokens", 4, "--sequences", 4]
    for least in (1, 12):
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "bitjax.cli", *map(str, command)],
            stdout=subprocess.DEVNULL,
        )
        ends = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < ends:
            if out.exists() and out.read_bytes().count(b"\n") >= least:
                break
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() in (-signal.SIGKILL, 0)
        left = out.read_bytes()
        assert whole.startswith(left)
        assert left.count(b"\n") >= least
    assert cli.main([str(a) for a in command]) == 0
    assert out.read_bytes() == whole


def test_tables(model, whole, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    csv_in, parquet_in = tmp_path / "in.csv", tmp_path / "in.parquet"
    csv_in.write_text(
        "question,temperature,label\n" + "".join(f"q{i},0,{i}\n" for i in range(6)) + ",,\n"
    )
    table = {"question": [f"q{i}" for i in range(6)] + [""], "label": [*range(6), None],
             "temperature": [0.0] * 6 + [None]}  # fmt: skip
    parquet.write_table(arrow.table(table), parquet_in)
    config = BatchConfig(field="question", keep=("label",))
    rows = {}
    for source in (csv_in, parquet_in):
        for ending in ("csv", "parquet"):
            out = tmp_path / f"{source.suffix[1:]}.{ending}"
            batch = batch_of(source, out, config=config)
            batch = dataclasses.replace(batch, source=Source(source, "question", ("label",)))
            done = run_batch(batch, model)
            assert (done.done, done.errors) == (7, 1)
            if ending == "parquet":
                rows[source.suffix] = parquet.read_table(out).to_pylist()
    found = rows[".parquet"]
    assert [row["label"] for row in found] == [*range(6), None]
    assert [row["label"] for row in rows[".csv"]] == [*map(str, range(6)), None]
    assert [{**row, "label": 0} for row in found] == [{**row, "label": 0} for row in rows[".csv"]]
    assert found[6] == dict.fromkeys(found[6]) | {
        "index": 6, "error": "the prompt is empty; give at least one character",
    }  # fmt: skip
    assert found[0]["completion_tokens"] == 4
    assert found[0]["finish_reason"] == "length"
    text = (tmp_path / "parquet.csv").read_bytes().decode()
    assert text.startswith(
        "index,id,choice,text,finish_reason,prompt_tokens,completion_tokens,error,label\r\n0,,0,"
    )


def test_a_table_of_samples_and_openais_lines(model, source, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "in.jsonl"
    body = {"prompt": ["a", "b"], "max_tokens": 2, "n": 2}
    bad = {"custom_id": "d", "method": "GET", "url": "/v1/completions", "body": {}}
    lines = [
        {"prompt": "a", "n": 2, "id": "x", "tag": [1]}, bad, "{",
        {"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": body},
    ]  # fmt: skip
    path.write_text("\n".join(line if line == "{" else json.dumps(line) for line in lines))
    batch = batch_of(path, tmp_path / "out.parquet", config=BatchConfig(order="done",
                                                                        keep=("tag",)))  # fmt: skip
    run_batch(batch, model)
    found = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert [(row["index"], row["id"], row["choice"]) for row in found] == [
        (0, "x", 0), (0, "x", 1), (1, "d", None), (2, None, None), *((3, "c", i) for i in range(4)),
    ]  # fmt: skip
    assert [row["tag"] for row in found[:3]] == ["[1]", "[1]", None]
    assert found[2]["error"] == "method='GET' is not POST"
    assert found[3]["error"].startswith("not JSON")
    kept = {(r["index"], r["choice"]): r["text"] for r in found}
    [record] = [r for r in records(tmp_path / "out.parquet.jsonl") if r.get("custom_id") == "c"]
    for choice in record["response"]["body"]["choices"]:
        assert kept[3, choice["index"]] == choice["text"]


def test_kept_values_that_columns_cannot_hold(model, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "in.jsonl"
    path.write_text(
        '{"prompt": "a", "big": 1000000000000000000000, "odd": "\\ud800", "inf": 1e999}\n'
        '{"prompt": "a", "big": 1, "odd": "é", "inf": [-1e999, 2.5]}\n'
    )
    for ending in ("jsonl", "csv", "parquet"):
        config = BatchConfig(keep=("big", "odd", "inf"))
        out = tmp_path / f"out.{ending}"
        assert run_batch(batch_of(path, out, config=config), model).errors == 0
    found = records(tmp_path / "out.jsonl")
    kept = [[record[name] for name in config.keep] for record in found]
    assert kept == [[10**21, "\ud800", None], [1, "é", [None, 2.5]]]
    rows = parquet.read_table(out).to_pylist()
    assert [[row[name] for name in config.keep] for row in rows] == [
        [str(10**21), '"\\ud800"', None], ["1", '"é"', "[null, 2.5]"],
    ]  # fmt: skip


def test_a_changed_input_is_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "WATCH_SECONDS", 0.0)
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text('"a"\n' * 9)
    batch = batch_of(path, out, engine=EngineConfig(max_sequences=1))

    def change(now):
        path.write_text('"b"\n' * 9)

    with pytest.raises(ValueError, match=r"in\.jsonl has changed since this job began to read it"):
        run_batch(batch, model, change)
    with pytest.raises(ValueError, match=r"out\.jsonl was begun with another input; choose"):
        run_batch(batch, model)
    with pytest.raises(ValueError, match=r"was begun with another input and another settings"):
        run_batch(dataclasses.replace(batch, settings={"max_tokens": 5}), model)
    other = tiny_model(seed=1, vocab_size=272, num_layers=1, max_seq_len=48)
    other.tokenizer = model.tokenizer
    with pytest.raises(ValueError, match=r"another input and another model; choose"):
        run_batch(batch, other)
    done = run_batch(dataclasses.replace(batch, overwrite=True), model)
    assert (done.done, len(records(out))) == (9, 9)


def test_a_shorter_input_does_not_hang(model, tmp_path, monkeypatch):
    path = tmp_path / "in.jsonl"
    path.write_text('"a"\n' * 3)
    count = Source.count
    for wrong in (1, -1):
        monkeypatch.setattr(Source, "count", lambda self, wrong=wrong: count(self) + wrong)
        with pytest.raises(ValueError, match="has changed since"):
            run_batch(batch_of(path, tmp_path / f"{wrong}.jsonl"), model)


def test_an_empty_input(model, tmp_path):
    (tmp_path / "in.jsonl").write_text("\n\n")
    done = run_batch(batch_of(tmp_path / "in.jsonl", tmp_path / "out.jsonl"), model)
    assert (done.done, done.total) == (0, 0)
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_command_line(path, source, whole, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    command = ["batch", path, source, "-o", out, "--max-new-tokens", 4]

    def run(*more):
        status = cli.main([str(a) for a in (*command, *more)])
        said = capsys.readouterr()
        return status, said.out, said.err

    status, said, _ = run()
    assert status == 0
    assert f"out.jsonl: {LINES} lines, {LINES // 4} of them errors; " in said
    assert f"in.jsonl  {LINES}/{LINES}  " in said
    assert out.read_bytes() == whole
    assert run("--temperature", 0) == (
        1, "", f"bitjax: {out} was begun with another settings; choose another name or give "
        "--overwrite\n",
    )  # fmt: skip
    assert run("--temperature", 0, "--overwrite", "--order", "done", "--stop", "q")[0] == 0
    assert out.read_bytes() != whole
    for more, message in (
        (("--top-p", 0), "top_p=0.0 is not in (0, 1]"),
        (("--seed", -1), "batch.seed=-1 is not in [0, 2**32)"),
        (("--keep", "index"), "batch.keep has index, which results have anyway"),
        (("--sequences", 0), "max_sequences=0 is below 1"),
        (("--samples", 2, "--temperature", 0), "n=2 samples at temperature 0"),
        (("--max-new-tokens", 0), "max_tokens=0 is not an integer in 1..48"),
        (("-o", tmp_path / "out.txt"), "out.txt: the output's name should end in .jsonl, .csv or"),
    ):
        status, _, said = run(*more)
        assert status == 1
        assert message in said
        assert said.count("\n") == 1
