"""Multiple choice against plain loops, its records, its tests, and files that are no tasks."""

import dataclasses
import json
import lzma
import math

import numpy as np
import pytest
from flax import nnx
from texts import small_tokenizer
from tiny import tiny_model

from bitjax.cli import main
from bitjax.evaluate.compare import bootstrap_interval, holm, mcnemar
from bitjax.evaluate.multiple_choice import Mean, Settings, examples, metrics, score_task
from bitjax.evaluate.records import Record, Records
from bitjax.evaluate.requests import RequestScorer, Score, encode_request, padded_lengths
from bitjax.evaluate.rolling import rolling_requests, score_documents
from bitjax.evaluate.tasks import find_task, read_task
from bitjax.model.files import save_model
from bitjax.tokenizer import BYTES

LINES = [
    {"id": f"q{i}", "query": f"Q{i}:", "choices": ["a" * (i + 1), "bé", "cc"], "gold": i % 3}
    for i in range(6)
]


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def model():
    return tiny_model(num_layers=1)


@pytest.fixture(scope="module")
def scorer(model):
    return RequestScorer(model, batch_tokens=96)


@pytest.fixture
def task(tmp_path):
    return read_task(write(tmp_path / "t.jsonl", LINES))


@pytest.fixture(scope="module")
def log_p(model):
    """log p of the bytes of a continuation, whole logits of one sequence padded to 48."""
    forward = nnx.jit(lambda model, tokens: model(tokens))

    def score(context, continuation):
        tokens = (context + continuation).encode()
        row = np.zeros((1, 48), np.int32)
        row[0, : len(tokens)] = list(tokens)
        logits = np.asarray(forward(model, row), np.float64)[0]
        total = 0.0
        for t in range(len(context.encode()), len(tokens)):
            total += logits[t - 1, tokens[t]] - np.log(np.exp(logits[t - 1]).sum())
        return total

    return score


def test_scores_are_those_of_one_sequence_at_a_time(scorer, task, log_p):
    records = score_task(scorer, BYTES, task, Settings())
    assert [r.id for r in records] == [line["id"] for line in LINES]
    for record, line in zip(records, LINES, strict=True):
        wanted = [log_p(line["query"], " " + c) for c in line["choices"]]
        np.testing.assert_allclose(record.log_likelihoods, wanted, atol=1e-4)
        assert record.acc == (np.argmax(wanted) == line["gold"])
        normed = [w / len(c) for w, c in zip(wanted, line["choices"], strict=True)]
        assert record.acc_norm == (np.argmax(normed) == line["gold"])
        gold = line["choices"][line["gold"]]
        bits = -wanted[line["gold"]] / math.log(2) / len(gold.encode())
        assert record.bits_per_byte == pytest.approx(bits, rel=1e-4)
    assert set(metrics(records)) == {"acc", "acc_norm", "bits/byte"}


def test_mean_and_its_error():
    mean = Mean.of([1, 0, 1, 1])
    assert mean.value == 0.75
    assert mean.error == pytest.approx(math.sqrt(0.75 * 0.25 / 3))


def test_shots_are_other_items_and_the_same_whatever_the_limit(task):
    for item in task.items:
        shown = examples(task, item, Settings(shots=5))
        assert item.contexts[0] not in shown
        assert shown.count("\n\n") == 5
        assert shown != examples(task, item, Settings(shots=5, seed=1))
    with pytest.raises(ValueError, match="t has 5 other items, not 6 shots"):
        examples(task, task.items[0], Settings(shots=6))


def test_records_resume_without_running(scorer, task, tmp_path):
    header = {"task": "t", "model": "m"}
    records = Records(tmp_path / "r", header, Record)
    first = score_task(scorer, BYTES, task, Settings(), limit=4, records=records)
    with records.path.open("a") as file:
        file.write('{"id": "torn')
    before = scorer.tokens
    again = Records(tmp_path / "r", header, Record)
    assert score_task(scorer, BYTES, task, Settings(), limit=4, records=again) == first
    assert scorer.tokens == before
    score_task(scorer, BYTES, task, Settings(), records=again)
    assert len(again.path.read_text().splitlines()) == 7
    changed = read_task(write(tmp_path / "t.jsonl", [{**LINES[0], "query": "Other:"}]))
    with pytest.raises(ValueError, match="has a record of another item q0: the task's file"):
        score_task(
            scorer, BYTES, changed, Settings(), records=Records(tmp_path / "r", header, Record)
        )
    again.path.write_text(again.path.read_text() + "{}\n")
    with pytest.raises(ValueError, match="line 8: no record of this evaluation"):
        Records(tmp_path / "r", header, Record)


def test_spaces_and_beginnings():
    request = encode_request(BYTES, "ab ", "c", 9)
    assert bytes(request.tokens.tolist()), request.scored == (b"ab c", 2)
    tokenizer = small_tokenizer()  # no bos by itself; 267 is its token
    request = encode_request(tokenizer, "", "hello", 9)
    assert request.tokens[0] == 267
    assert request.scored == len(request.tokens) - 1
    assert encode_request(BYTES, "abcdef", "gh", 4, truncate=True).tokens.tolist() == [*b"defgh"]
    with pytest.raises(ValueError, match="it has 7 tokens, and the model's context is 4; --trunc"):
        encode_request(BYTES, "abcdef", "gh", 4)
    with pytest.raises(ValueError, match="its continuation is no token"):
        encode_request(BYTES, "abc", "", 4)


def test_padded_lengths():
    assert padded_lengths([5, 9, 300], 310) == [304]
    assert padded_lengths([5] * 1000 + [300], 310) == [16, 304]
    assert padded_lengths([305], 310) == [310]


@pytest.mark.parametrize("n", [1, 4, 5, 8, 9, 23])
def test_rolling_windows_are_the_harness_s(n):
    utils = pytest.importorskip("lm_eval.utils")
    tokens = list(range(1, n + 1))
    wanted = list(utils.get_rolling_token_windows(tokens, 0, 4, 1))
    made = rolling_requests(np.array(tokens, np.int32), 0, 4)
    assert len(made) == len(wanted)
    for request, (inputs, predicted) in zip(made, wanted, strict=True):
        assert request.tokens[:-1].tolist() == inputs
        assert request.tokens[-request.scored :].tolist() == predicted


def test_documents(scorer, log_p):
    score, each = score_documents(scorer, BYTES, ["abc", "defgh é", ""])
    np.testing.assert_allclose(each, [log_p("\n", "abc"), log_p("\n", "defgh é"), 0], atol=1e-4)
    assert (score.tokens, score.bytes) == (11, 11)
    assert score.nats_per_token == pytest.approx(-sum(each) / 11)
    with pytest.raises(ValueError, match="2 documents hold nothing to score"):
        score_documents(scorer, BYTES, ["", ""])


def test_paired_tests():
    # 1 against 8 of 9: 2 (1 + 9) / 512.
    a, b = [1] + [0] * 8 + [1] * 5, [0] + [1] * 8 + [1] * 5
    assert mcnemar(a, b) == 20 / 512
    assert mcnemar(a, a) == 1
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    draw = np.random.default_rng(3)
    x = draw.normal(size=400)
    y = x + 0.5 + 0.2 * draw.normal(size=400)
    low, high = bootstrap_interval(x, y)
    middle, error = (y - x).mean(), (y - x).std() / 20
    assert low == pytest.approx(middle - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(middle + 1.96 * error, abs=0.3 * error)
    with pytest.raises(ValueError, match="1 values of one model and 2 of the other"):
        mcnemar([1], [1, 0])


def test_forms(tmp_path):
    pair = {"sentence_good": "A b.", "sentence_bad": "B a.", "UID": "u", "pairID": "3"}
    item = read_task(write(tmp_path / "p.jsonl", [pair])).items[0]
    assert (item.id, item.choices, item.contexts) == ("u/3", ("A b.", "B a."), ("", ""))
    wino = {"sentence": "x _ y.", "option1": "A", "option2": "B", "answer": "2"}
    item = read_task(write(tmp_path / "w.jsonl", [wino])).items[0]
    assert (item.contexts, item.choices, item.gold) == (("x A", "x B"), (" y.", " y."), 1)
    (tmp_path / "v-labels.lst").write_text("1\n")
    item = read_task(write(tmp_path / "v.jsonl", [{"goal": "g", "sol1": "a", "sol2": "b"}])).items[
        0
    ]
    assert (item.gold, item.solved) == (1, "Goal: g\nAnswer: b")


def test_bad_files(tmp_path):
    packed = lzma.compress(json.dumps(LINES[0]).encode())
    (tmp_path / "cut.jsonl.xz").write_bytes(packed[:-20])
    (tmp_path / "bad.zip").write_bytes(b"no archive")
    for name, message in [("cut.jsonl.xz", "cut.jsonl.xz is damaged"), ("bad.zip", "is damaged")]:
        with pytest.raises(ValueError, match=message):
            read_task(tmp_path / name)
    for line, message in [
        ({"query": "x"}, "line 1: an item needs the fields query, choices; .* this has query"),
        ({"query": "x", "choices": ["a", "b"], "gold": 2}, "gold is 2; it has choices 0 to 1"),
        ({"query": "x", "choices": []}, "choices is .*, not a list of texts"),
        ([], "not a JSON object"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_task(write(tmp_path / "x.jsonl", [line]))
    with pytest.raises(ValueError, match="holds no items"):
        read_task(write(tmp_path / "x.jsonl", []))
    with pytest.raises(ValueError, match="has no task 'y'; there are"):
        find_task("y", tmp_path)
    with pytest.raises(ValueError, match="task 'y' is no file; --task-dir names a folder"):
        find_task("y")


def test_two_models_at_the_command_line(model, tmp_path, capsys):
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_model(a, model)
    save_model(b, tiny_model(num_layers=1, seed=1))
    write(tmp_path / "t.jsonl", LINES)
    arguments = ["eval", str(a), str(b), "--tasks", "t", "--task-dir", str(tmp_path)]
    assert main([*arguments, "--records", str(tmp_path / "r")]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("acc_norm", "bits/byte", "McNemar"))
    assert len(list((tmp_path / "r").iterdir())) == 2
    assert main([*arguments, "--shots", "5"]) == 1
    assert "the model's context is 48" in capsys.readouterr().err
    assert main(["eval", str(a), "--tasks", "nothing"]) == 1
    assert "task 'nothing' is no file" in capsys.readouterr().err


def test_acc_norm_counts_characters(task, model):
    """Four characters of eight bytes: -4.4 / 4 is below -2.1 / 2, and -4.4 / 8 above it."""

    class Fixed(RequestScorer):
        def stream(self, requests):
            yield {i: Score(value, False) for i, value in enumerate((-4.4, -2.1))}

    item = dataclasses.replace(task.items[0], contexts=("Q", "Q"), choices=(" éééé", " ab"), gold=1)
    only = dataclasses.replace(task, items=(item,))
    (record,) = score_task(Fixed(model), BYTES, only, Settings())
    assert (record.acc, record.acc_norm) == (1, 1)
    assert record.bits_per_byte == pytest.approx(2.1 / math.log(2) / 2)
