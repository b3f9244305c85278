import dataclasses
import json
import signal
import subprocess
import sys
import time

import pytest

from bitjax.scaling.table import COLUMNS, MEANING, Row, append_row, card, read_table

ROW = Row(
    run="64x2-1000-s0-ternary", arm="ternary", hidden_size=64, num_layers=2, N=106_496,
    embedding_parameters=16_384, D=1000, flops=1.5e9, seed=0, learning_rate=0.004,
    loss=0.1 + 0.2, loss_se=0.01, bits_per_byte=3.1, tokenizer="bytes", data="d", validation="v",
    ended=True, status="finished", seconds=12.5, commit="abc",
    config='{"train": {"note": "a, \\"quoted\\" comma"}}', curve="curves/a.json",
)  # fmt: skip


def other(name, **changes):
    return dataclasses.replace(ROW, run=name, **changes)


def test_rows_come_back_as_they_were(tmp_path):
    path = tmp_path / "table.csv"
    rows = [ROW, other("b", ended=False, loss=1e-300)]
    for row in rows:
        append_row(path, row)
    assert read_table(path) == rows
    assert rows[0].settings == {"train": {"note": 'a, "quoted" comma'}}
    assert path.read_text().splitlines()[0] == ",".join(COLUMNS)


def test_a_run_is_there_once(tmp_path):
    path = tmp_path / "table.csv"
    append_row(path, ROW)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"table.csv has the run 64x2-1000-s0-ternary already"):
        append_row(path, ROW)
    assert path.read_bytes() == before
    path.write_bytes(before + before.split(b"\n", 1)[1])
    with pytest.raises(ValueError, match=r"line 3: the run 64x2-1000-s0-ternary is there twice"):
        read_table(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": float("nan")}, "loss=nan is not a finite number"),
        ({"loss_se": float("inf")}, "loss_se=inf is not a finite number"),
        ({"N": 0}, "N=0 must be above 0"),
        ({"seconds": -1.0}, "seconds=-1.0 is negative"),
        ({"config": "[]"}, "config is no JSON object: '\\[\\]'"),
        ({"commit": "a\nb"}, "commit='a\\\\nb' has more than one line"),
    ],
)
def test_rows_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ROW, **changes)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (",0.004,", ",nan,", "line 2: learning_rate=nan is not a finite number"),
        (",0.004,", ",fast,", "line 2: learning_rate='fast' is not a number"),
        (",106496,", ",106496.5,", "line 2: N='106496.5' is not a whole number"),
        (",true,", ",yes,", "line 2: ended='yes' is not true or false"),
        (",abc,", ",", "line 2: 21 fields instead of 22: the line is damaged"),
        ("run,arm,", "run,kind,", "line 1: its columns lack arm"),
        ("run,arm,", "run,arm,run,", "line 1: its columns lack names of their own"),
        (",curves/a.json\n", "", "is damaged: its last line is cut short"),
        ('{""train', '{"train', "line 2: ',' expected after '\"'"),
    ],
)
def test_damaged_tables(tmp_path, old, new, message):
    path = tmp_path / "table.csv"
    append_row(path, ROW)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=message):
        read_table(path)
    with pytest.raises(ValueError, match=message):
        append_row(path, other("b"))


def test_tables_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the table .*none.csv: No such file"):
        read_table(tmp_path / "none.csv")
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe\n")
    with pytest.raises(ValueError, match=r"t.csv is not UTF-8 text"):
        read_table(tmp_path / "t.csv")


APPENDING = """
import dataclasses, sys
from pathlib import Path
from bitjax.scaling.table import append_row, read_table
path = Path(sys.argv[1])
(first,) = [row for row in read_table(path) if row.run == "first"]
for i in range(int(sys.argv[3])):
    append_row(path, dataclasses.replace(first, run=f"{sys.argv[2]}-{i}"))
    print(i, flush=True)
"""


def appending(path, name, count):
    command = [sys.executable, "-c", APPENDING, str(path), name, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_processes_lose_no_row(tmp_path):
    path = tmp_path / "table.csv"
    append_row(path, other("first"))
    with appending(path, "a", 15) as a, appending(path, "b", 15) as b:
        a.communicate()
        b.communicate()
    assert (a.returncode, b.returncode) == (0, 0)
    wanted = {"first"} | {f"{name}-{i}" for name in "ab" for i in range(15)}
    rows = [row.run for row in read_table(path)]
    assert len(rows) == 31
    assert set(rows) == wanted


def test_a_killed_process_leaves_a_whole_table(tmp_path):
    path = tmp_path / "table.csv"
    append_row(path, other("first"))
    with appending(path, "a", 10**6) as process:
        for line in process.stdout:
            if int(line) == 7:
                time.sleep(0.003)
                process.kill()
    assert process.returncode == -signal.SIGKILL
    rows = [row.run for row in read_table(path)]
    assert rows == ["first"] + [f"a-{i}" for i in range(len(rows) - 1)]
    assert len(rows) >= 9
    append_row(path, other("after"))  # the lock has gone with the process


def test_nobody_sees_half_a_table(tmp_path):
    """Read while another process writes it, long enough to be met in the midst of it."""
    path = tmp_path / "table.csv"
    append_row(path, other("first", config=json.dumps({"long": "x" * 100_000})))
    with appending(path, "a", 10**6) as process:
        process.stdout.readline()
        counts = [len(read_table(path)) for _ in range(40)]
        process.kill()
        process.communicate()
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


def test_the_card_says_what_every_column_is(tmp_path):
    said = card([ROW, other("b"), other("c", arm="float")])
    assert set(MEANING) == set(COLUMNS)
    assert all(f"| {name} |" in said for name in COLUMNS)
    assert said.endswith("\n3 rows: 2 ternary, 1 float\n")
