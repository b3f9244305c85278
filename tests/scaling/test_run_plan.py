import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from studies import BASE, Ended, Pretended, plan_of, text_file

from bitjax.config import Group, RunConfig, from_dict
from bitjax.scaling import run as running
from bitjax.scaling.jobs import shares
from bitjax.scaling.plan import to_json
from bitjax.scaling.run import run_plan
from bitjax.scaling.sweep import Trial, read_sweeps, write_sweeps
from bitjax.scaling.table import COLUMNS, locked, read_table, write_table
from bitjax.train import Interrupted, Trainer, train

RATES = (2e-3, 4e-3, 8e-3)


@pytest.fixture
def data(tmp_path):
    return text_file(tmp_path)


@pytest.fixture
def pretended(monkeypatch):
    made = Pretended()
    monkeypatch.setattr(running, "start", made)
    monkeypatch.setattr(running, "POLL", 0.0)
    return made


def small(data, *arms, sizes=("16x1",), **study):
    return plan_of(data, Group(sizes, (0.2,), arms or ("ternary", "float")), rates=RATES, **study)


def go(plan, data, directory, **more):
    said = []
    run_plan(plan, data, directory, 1, said.append, **more)
    return said


def test_every_run_has_a_row(pretended, data, tmp_path):
    plan = small(data, "ternary", "float", "continual", "ptq_int4", sizes=("16x1", "24x1"))
    said = go(plan, data, tmp_path / "out")
    rows = read_table(tmp_path / "out" / "table.csv")
    assert [row.run for row in rows] == [run.run for run in plan.runs]
    assert len(said) == len(rows) + len(plan.sweeps)
    by_run = {row.run: row for row in rows}
    for run in plan.runs:
        row = by_run[run.run]
        assert (row.arm, row.D, row.seed, row.learning_rate) == (run.arm, run.tokens, 0, 4e-3)
        assert (row.loss, row.data) == (2.0, plan.corpus["data"])
        assert json.loads((tmp_path / "out" / row.curve).read_text())["documents"]
        settings = row.settings
        assert settings["data"]["text"] == "letters"
        assert str(tmp_path) not in row.config
        if run.arm == "continual":
            assert settings["train"]["start_from"] == run.after
        if run.arm == "ptq_int4":
            assert settings.pop("rounded") == {"run": run.after, "to": "int4"}
        of_float = run.arm in ("float", "ptq_int4")
        assert from_dict(RunConfig, settings).model.weights == ("float" if of_float else "ternary")
    assert f"{len(rows)} rows" in (tmp_path / "out" / "table.md").read_text()
    jobs = len(pretended.jobs)
    go(plan, data, tmp_path / "out")
    assert len(pretended.jobs) == jobs  # nothing is left


def test_sweeps_come_first_and_grow(pretended, data, tmp_path):
    pretended.best = 32e-3
    go(small(data), data, tmp_path)
    swept, grown, grown_again, last, run, *others = pretended.jobs
    assert [len(x) for x in (swept, grown, grown_again, last, run)] == [3, 1, 1, 1, 1]
    assert len(others) == 5
    chosen = [row.learning_rate for row in read_table(tmp_path / "table.csv")]
    assert chosen == [32e-3, 32e-3]
    assert [t.learning_rate for t in read_sweeps(tmp_path / "sweeps.csv")] == 2 * [
        *RATES, 16e-3, 32e-3, 64e-3,
    ]  # fmt: skip


def test_rates_of_many_digits(pretended, data, tmp_path):
    rates = (1e-3 / 3, 2e-3 / 3, 4e-3 / 3)
    pretended.best = rates[1]
    go(plan_of(data, Group(("16x1",), (0.2,), ("float",)), rates=rates), data, tmp_path)
    assert [t.learning_rate for t in read_sweeps(tmp_path / "sweeps.csv")] == list(rates)
    assert [row.learning_rate for row in read_table(tmp_path / "table.csv")] == [rates[1]]


def test_tables_alone_say_what_is_done(pretended, data, tmp_path):
    """Without the working folders: a rounded run trains its float run again, and adds no row."""
    out = tmp_path / "out"
    plan = small(data, "ptq_int8")
    go(plan, data, out)
    rows, jobs = read_table(out / "table.csv"), len(pretended.jobs)
    shutil.rmtree(out / "runs")
    shutil.rmtree(out / "sweeps")
    go(plan, data, out)
    assert len(pretended.jobs) == jobs
    write_table(out / "table.csv", rows[:1])
    go(plan, data, out)
    again, rounded = pretended.jobs[jobs:]
    assert (again[0]["kind"], rounded[0]["kind"]) == ("train", "round")
    assert read_table(out / "table.csv") == rows
    write_table(out / "table.csv", rows[:1])  # and once more, with other folders left over
    shutil.rmtree(out / "runs" / rows[0].run / "checkpoints")
    shutil.rmtree(out / "runs" / rows[1].run)
    go(plan, data, out)
    assert [job[0]["kind"] for job in pretended.jobs[jobs + 2 :]] == ["train", "round"]


def test_a_result_that_is_not_in_the_table_is_added(pretended, data, tmp_path):
    plan = small(data, "float")
    go(plan, data, tmp_path)
    (tmp_path / "table.csv").unlink()
    go(plan, data, tmp_path)
    assert [row.run for row in read_table(tmp_path / "table.csv")] == [plan.runs[0].run]


def test_a_run_that_diverges_is_told_and_not_tried_again(pretended, data, tmp_path):
    plan = small(data, "ternary", "float", "ptq_int4")
    train = BASE.train
    tokens = plan.sweeps[0].steps * train.batch_size * train.seq_len
    trials = [Trial("16x1", arm, tokens, rate, 2.0 + abs(rate - 4e-3), 0.1, 1.0)
              for arm in ("float", "ternary") for rate in RATES]  # fmt: skip
    write_sweeps(tmp_path / "sweeps.csv", trials)
    pretended.diverging = ("float",)
    with pytest.raises(ValueError, match=r"2 of 3 runs failed, .*-float first: the loss became na"):
        go(plan, data, tmp_path)
    assert [row.arm for row in read_table(tmp_path / "table.csv")] == ["ternary"]
    jobs = len(pretended.jobs)
    with pytest.raises(ValueError, match=r"runs failed, .*-float first: the loss became nan"):
        go(plan, data, tmp_path)
    assert len(pretended.jobs) == jobs
    pretended.diverging = ()
    go(plan, data, tmp_path, retry=True)
    assert {row.arm for row in read_table(tmp_path / "table.csv")} == {*("ternary", "float")} | {
        "ptq_int4"
    }


def test_a_sweep_without_a_rate_that_works_fails_its_runs(pretended, data, tmp_path):
    pretended.diverging = ("float",)
    with pytest.raises(ValueError, match=r"1 of 2 runs failed, .* every learning rate from .* div"):
        go(small(data, extensions=1), data, tmp_path)
    assert [row.arm for row in read_table(tmp_path / "table.csv")] == ["ternary"]


def test_rows_of_other_settings_are_refused(pretended, data, tmp_path):
    plan = small(data)
    go(plan, data, tmp_path)
    recipe = dataclasses.replace(
        BASE, optimizer=dataclasses.replace(BASE.optimizer, weight_decay=0.2)
    )
    with pytest.raises(ValueError, match=r"was made with other settings .*optimizer.weight_decay"):
        go(dataclasses.replace(plan, recipe=recipe), data, tmp_path)


def test_another_corpus_is_refused(pretended, data, tmp_path):
    plan = small(data)
    with open(data, "ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"text.txt is not the plan's corpus 'letters': its data "):
        go(plan, data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_table_is_one_sentence(pretended, data, tmp_path):
    plan = small(data)
    go(plan, data, tmp_path)
    path = tmp_path / "table.csv"
    path.write_text(path.read_text().replace(",finished,", ",", 1))
    with pytest.raises(ValueError, match=rf"line 2: {len(COLUMNS) - 1} fields instead of"):
        go(plan, data, tmp_path)


def test_two_at_once_are_refused(pretended, data, tmp_path):
    with (
        locked(tmp_path / "run.lock"),
        pytest.raises(ValueError, match="another `bitjax scale run` is at work in"),
    ):
        go(small(data), data, tmp_path)


def test_jobs_share_the_cores():
    cores = sorted(os.sched_getaffinity(0))
    assert shares(1) == [cores]
    two = shares(2) if len(cores) > 1 else [cores]
    assert len({core for share in two for core in share}) == sum(map(len, two))
    with pytest.raises(ValueError, match=rf"--jobs {len(cores) + 1}: there are {len(cores)} cores"):
        shares(len(cores) + 1)


class Saving(Ended):
    """A process that works until it is told to end, and then for three more looks, or for ever."""

    def __init__(self, looks):
        self.looks, self.told, self.killed = looks, False, False

    def poll(self):
        self.looks -= self.told
        return 0 if self.looks < 0 or self.killed else None

    def terminate(self):
        self.told = True
        if self.looks > 1000:
            os.kill(os.getpid(), signal.SIGTERM)

    def kill(self):
        self.killed = self.looks >= 0


@pytest.mark.parametrize(("looks", "killed"), [(3, False), (10**9, True)])
def test_signals_end_every_process(monkeypatch, data, tmp_path, looks, killed):
    """The first lets it save its state; a second does not wait for that."""
    process = Saving(looks)

    def begin(*_):
        os.kill(os.getpid(), signal.SIGINT)
        return process

    monkeypatch.setattr(running, "start", begin)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=r"stopped; 0 of 2 runs are in .*table.csv"):
        go(small(data), data, tmp_path)
    assert (process.told, process.killed) == (True, killed)
    assert signal.getsignal(signal.SIGINT) is handler


def test_kill_9_loses_no_run_and_makes_none_twice(data, tmp_path):
    """The command is killed while it trains; then all is as in a run that nobody killed."""
    plan = plan_of(data, Group(("16x1",), (20 * 16 / 4096,), ("ptq_ternary",)), rates=RATES)
    first, rounded = plan.runs
    assert first.steps == 20
    out, path = tmp_path / "out", tmp_path / "plan.json"
    out.mkdir()
    path.write_text(to_json(plan))
    write_sweeps(out / "sweeps.csv", [
        Trial("16x1", "float", 320, rate, 2.0 + abs(rate - 4e-3), 0.1, 1.0) for rate in RATES
    ])  # fmt: skip
    command = [sys.executable, "-P", "-m", "bitjax.cli", "scale", "run", str(path), "--data", data,
               "-o", str(out)]  # fmt: skip
    folder = (out / "runs" / first.run).resolve()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not list(folder.glob("checkpoints/[1-9]*")) and time.monotonic() < deadline:
            time.sleep(0.002)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "table.csv").exists()
    while True:  # the worker ends with its parent, after it has saved its state
        try:
            with locked(folder / "lock", wait=False):
                break
        except BlockingIOError:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert not (folder / "result.json").exists()  # it was killed in the midst of its steps
    go(plan, data, out)
    rows = read_table(out / "table.csv")
    assert [row.run for row in rows] == [first.run, rounded.run]
    assert go(plan, data, out) == []
    assert read_table(out / "table.csv") == rows

    from bitjax.scaling.arms import configuration
    from bitjax.scaling.score import held_out, score

    base = dataclasses.replace(BASE, data=dataclasses.replace(BASE.data, text=data))
    config = configuration(base, plan.study, "float", "16x1", 20, 0, 4e-3)
    state = train(config, tmp_path / "unbroken")
    unbroken = score(Trainer(config).model(state.params), held_out(config))
    assert rows[0].loss == unbroken.loss
    assert rows[1].loss != unbroken.loss
