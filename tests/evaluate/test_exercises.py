"""Exercises: what is read off an answer, pass@k against all subsets, records, the command line."""

import dataclasses
import gzip
import itertools
import json

import pytest
from tiny import tiny_model

from bitjax.cli import main
from bitjax.evaluate import generation
from bitjax.evaluate.exercises import judge_number, pass_at, pass_rates, read_exercises
from bitjax.evaluate.generation import GenerationSettings, answer_exercises, prompt_of, values_of
from bitjax.evaluate.records import Answer, Records
from bitjax.evaluate.tasks import read_task
from bitjax.model.files import save_model

SUMS = [
    {"question": f"What is {i} + 1000?", "answer": f"<<{i}+1000={i + 1000}>>\n#### {i + 1000:,}"}
    for i in range(5)
]
ADD = {
    "task_id": "t/0", "entry_point": "add", "prompt": "def add(a, b):\n", "canonical_solution": "",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
}  # fmt: skip
RIGHT, WRONG = "    return a + b", "    return a - b"


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def sums(tmp_path):
    return read_exercises(write(tmp_path / "sums.jsonl", SUMS))


@pytest.fixture
def programs(tmp_path):
    raw = json.dumps(ADD) + "\n" + json.dumps(ADD | {"task_id": "t/1"}) + "\n"
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(raw.encode()))
    return read_exercises(tmp_path / "p.jsonl.gz")


@pytest.mark.parametrize(
    ("text", "exact", "last"),
    [
        (" so it is #### 1002", 1, 1),
        ("#### $1,002.00\n", 1, 1),
        ("####1002.", 1, 1),
        ("#### -1002", 0, 0),
        ("#### 1002 and then 7", 1, 0),
        ("#### 7 #### 1002", 0, 1),
        ("The answer is 1,002.", 0, 1),
        ("1002 of 1003", 0, 0),
        ("10025", 0, 0),
        ("", 0, 0),
        ("#### none", 0, 0),
    ],
)
def test_numbers(sums, text, exact, last):
    assert judge_number(sums.items[2], text) == {"exact": exact, "last number": last}


@pytest.mark.parametrize(("n", "c", "k"), [(5, 0, 2), (5, 1, 2), (5, 3, 2), (5, 4, 2), (4, 2, 4)])
def test_pass_at_k_is_the_mean_over_all_subsets(n, c, k):
    subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
    assert pass_at(n, c, k) == pytest.approx(sum(map(max, subsets)) / len(subsets))


def test_pass_rates():
    assert pass_rates([True] + [False] * 9) == pytest.approx({"pass@1": 0.1, "pass@10": 1})
    with pytest.raises(ValueError, match="pass@3 of 2 samples, 1 of them passed"):
        pass_at(2, 1, 3)


def test_prompts(sums):
    item = sums.items[1]
    assert prompt_of(sums, item, GenerationSettings()) == "Question: What is 1 + 1000?\nAnswer:"
    shown = prompt_of(sums, item, GenerationSettings(shots=4))
    assert shown.count("#### 1,00") == 4
    assert shown.count(item.prompt) == 1
    assert shown.endswith(item.prompt)
    with pytest.raises(ValueError, match="sums has 4 other items, not 5 shots"):
        prompt_of(sums, item, GenerationSettings(shots=5))


def test_answers_are_kept(sums, tmp_path):
    asked = []

    def complete(prompts):
        asked.append(prompts)
        return [" #### 1002"] * len(prompts)

    records = Records(tmp_path / "r", {"task": "sums"}, Answer)
    first = answer_exercises(complete, sums, GenerationSettings(), 3, records)
    assert values_of(first) == {"exact": [0, 0, 1], "last number": [0, 0, 1]}
    assert [a.id for a in first] == ["0", "1", "2"]
    assert all(p.stop == ("Question:",) and p.temperature == 0 for p in asked[0])
    again = Records(tmp_path / "r", {"task": "sums"}, Answer)
    assert answer_exercises(complete, sums, GenerationSettings(), 3, again) == first
    assert len(asked) == 1
    answer_exercises(complete, sums, GenerationSettings(), None, again)
    assert [len(prompts) for prompts in asked] == [3, 2]
    changed = dataclasses.replace(sums.items[0], key="7")
    changed = dataclasses.replace(sums, items=(changed,))
    with pytest.raises(ValueError, match="has a record of another item 0"):
        answer_exercises(complete, changed, GenerationSettings(), None, again)


def test_programs(programs, monkeypatch):
    def complete(prompts):
        assert len({p.seed for p in prompts}) == len(prompts) == 4
        assert prompts[0].text == ADD["prompt"]
        return [RIGHT, WRONG, WRONG, "    return 1 /"]

    settings = GenerationSettings(samples=2, temperature=0.8)
    answers = answer_exercises(complete, programs, settings, run_code=True)
    assert values_of(answers) == {"pass@1": [0.5, 0]}
    assert answers[0].said == ("", "AssertionError: ")
    assert answers[1].said[1].startswith("SyntaxError")
    monkeypatch.setattr(generation, "run_program", None)
    with pytest.raises(ValueError, match="p runs programs that the model writes; --run-code"):
        answer_exercises(complete, programs, settings)
    with pytest.raises(ValueError, match="p has programs, which are put without --shots"):
        answer_exercises(complete, programs, GenerationSettings(shots=1), run_code=True)


def test_settings():
    for changes, message in (
        ({"shots": -1}, "-1 shots"),
        ({"samples": 0}, "0 samples of each exercise; there can be 1 or more"),
        ({"samples": 2}, "2 greedy samples are all the same; give --temperature"),
    ):
        with pytest.raises(ValueError, match=message):
            GenerationSettings(**changes)


def test_other_files(tmp_path):
    question = {"query": "x", "choices": ["a", "b"], "gold": 0}
    path = write(tmp_path / "q.jsonl", [question])
    assert read_exercises(path) is None
    assert len(read_task(path).items) == 1
    for lines, message in (
        (
            [SUMS[0], question],
            "line 2: an exercise needs texts in the fields question, answer,",
        ),
        ([SUMS[0], SUMS[1] | {"answer": "7"}], "line 2: .* with a number behind ####"),
        ([ADD, ADD], "line 2: there is an exercise 't/0' before it"),
    ):
        with pytest.raises(ValueError, match=message):
            read_exercises(write(tmp_path / "x.jsonl", lines))


def test_command_line(tmp_path, capsys):
    model, sums = tmp_path / "m.safetensors", write(tmp_path / "sums.jsonl", SUMS)
    save_model(model, tiny_model(num_layers=1))
    arguments = ["eval", str(model), "--tasks", str(sums), "--records", str(tmp_path / "r")]
    arguments += ["--max-new-tokens", "2", "--limit", "2"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "last number" in printed
    assert "0.0000 ± 0.0000" in printed
    (kept,) = (tmp_path / "r").iterdir()
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [line.get("id") for line in lines] == [None, "0", "1"]
    programs = write(tmp_path / "p.jsonl", [ADD])
    assert main(["eval", str(model), "--tasks", str(programs)]) == 1
    assert "--run-code allows it" in capsys.readouterr().err
