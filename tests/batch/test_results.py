"""Records on the disk: each once, whatever was cut short."""

import errno
import json
import os
import random

import pytest

from bitjax.batch import results as module
from bitjax.batch.results import Results, beside, line_of

JOB = {"bitjax_batch": 1, "input": "abc", "order": "input"}


def record(index, text=None):
    return {"index": index, "text": text or f"é{index}" * (1 + index % 5)}


def indexes(path):
    return [json.loads(line)["index"] for line in path.read_bytes().splitlines()]


def test_as_they_come(tmp_path):
    path = tmp_path / "out.jsonl"
    with Results(path, JOB, 4, ordered=False) as results:
        results.add({2: record(2), 0: record(0)})
        results.add({3: record(3)})
        assert (results.done, 3 in results, 1 in results) == (3, True, False)
    with Results(path, JOB, 4, ordered=False) as results:
        assert (results.done, results.complete) == (3, False)
        results.add({1: record(1)})
        results.finish()
    assert indexes(path) == [2, 0, 3, 1]
    assert json.loads(path.read_bytes().splitlines()[0]) == record(2)
    with Results(path, JOB, 4, ordered=False) as results:
        assert results.complete


def test_in_order(tmp_path):
    path = tmp_path / "out.jsonl"
    with Results(path, JOB, 5, ordered=True) as results:
        results.add({1: record(1), 3: record(3)})
        assert path.read_bytes() == b""
        assert (results.lead, results.ahead) == (0, 2)
        results.add({0: record(0)})
        assert indexes(path) == [0, 1]
    with Results(path, JOB, 5, ordered=True) as results:  # 3 waits on the disk
        assert (results.done, results.lead, results.ahead, 3 in results) == (3, 2, 1, True)
        results.add({2: record(2), 4: record(4)})
        results.finish()
    assert indexes(path) == [0, 1, 2, 3, 4]
    assert not beside(path, "ahead").exists()


@pytest.mark.parametrize("ordered", [True, False])
def test_cut_anywhere(tmp_path, ordered, monkeypatch):
    """Files cut short at any byte: no record twice, none lost but the last of a cut file."""
    monkeypatch.setattr(module, "_SLACK", 30)
    draw = random.Random(0)
    for trial in range(15):
        path = tmp_path / f"{trial}.jsonl"
        left = list(range(12))
        draw.shuffle(left)
        while left:
            with Results(path, JOB, 12, ordered) as results:
                left = [i for i in left if i not in results]
                assert len(left) == 12 - results.done
                for _ in range(draw.randrange(1, 4)):
                    some = {left[0]: record(left[0])} if left else {}
                    some |= {i: record(i) for i in left[1 : draw.randrange(1, 4)]}
                    results.add(some)
                    left = [i for i in left if i not in some]
            if left:
                # As a write that was cut short by a kill.
                cut = path if draw.random() < 0.5 or not ordered else beside(path, "ahead")
                raw = cut.read_bytes()
                start = raw.rfind(b"\n", 0, len(raw) - 1) + 1  # of the last line
                if cut == path and ordered:
                    with cut.open("ab") as file:
                        file.write(line_of(record(99))[: draw.randrange(1, 9)])
                elif raw:
                    os.truncate(cut, draw.randrange(start, len(raw)))
                    left = list(range(12))
        with Results(path, JOB, 12, ordered) as results:
            results.finish()
        assert sorted(indexes(path)) == list(range(12))
        if ordered:
            assert indexes(path) == list(range(12))
        assert all(json.loads(r) in map(record, range(12)) for r in path.read_bytes().splitlines())


def test_a_record_moved_just_before_the_end_is_not_taken_twice(tmp_path):
    path = tmp_path / "out.jsonl"
    with Results(path, JOB, 3, ordered=True) as results:
        results.add({1: record(1)})
    kept = beside(path, "ahead").read_bytes()
    with Results(path, JOB, 3, ordered=True) as results:
        results.add({0: record(0)})
    beside(path, "ahead").write_bytes(kept)
    with Results(path, JOB, 3, ordered=True) as results:
        assert (results.done, results.ahead) == (2, 0)
        results.add({2: record(2)})
    assert indexes(path) == [0, 1, 2]


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"
    write, room = os.write, 30

    def full(file, raw):
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = write(file, raw[:room])
        room -= count
        return count

    with Results(path, JOB, 3, ordered=False) as results:
        results.add({0: record(0)})
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            results.add({1: record(1, "x" * 99)})
        monkeypatch.undo()
        assert indexes(path) == [0]
        results.add({1: record(1)})
    assert indexes(path) == [0, 1]


def test_another_process_is_locked_out(tmp_path):
    path = tmp_path / "out.jsonl"
    with (
        Results(path, JOB, 1, ordered=True),
        pytest.raises(
            ValueError, match=r"^another process is writing this job: .*\.job is locked$"
        ),
    ):
        Results(path, JOB, 1, ordered=True)
    Results(path, JOB, 1, ordered=True).close()


def test_refused(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("something\n")
    with pytest.raises(ValueError, match=r"out\.jsonl exists; choose another name or give --over"):
        Results(path, JOB, 2, ordered=True)
    with Results(path, JOB, 2, ordered=True, overwrite=True) as results:
        assert path.read_bytes() == b""
        results.add({0: record(0)})
    other = JOB | {"input": "xyz", "model": "m"}
    with pytest.raises(ValueError, match="was begun with another input and another model; choose"):
        Results(path, other, 2, ordered=True)
    raw = path.read_bytes()
    for bad, message in (
        (raw + raw, "line 2 is a second record of 0"),
        (raw + b'{"index": 7}\n', r"b'\{\"index\": 7\}' is no record of this job"),
        (b"\0\0\n" + raw, "is no record of this job"),
        (line_of(record(1)), "its records are not in the input's order"),
    ):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=f"out.jsonl is damaged: .*{message}"):
            Results(path, JOB, 2, ordered=True)
        assert path.read_bytes() == bad
    beside(path, "job").write_bytes(b"{\n")
    with pytest.raises(ValueError, match=r"out\.jsonl\.job is damaged; remove it and out\.jsonl"):
        Results(path, JOB, 2, ordered=True)


def test_waiting_records_do_not_pile_up(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_SLACK", 2000)
    path = tmp_path / "out.jsonl"
    most = 0
    with Results(path, JOB, 401, ordered=True) as results:
        for i in range(0, 400, 2):  # always one waits
            results.add({i + 1: record(i + 1, "x" * 50)})
            if i:
                results.add({i: record(i, "x" * 50)}) if i != 200 else None
            most = max(most, beside(path, "ahead").stat().st_size)
            if i == 0:
                results.add({0: record(0)})
        results.add({200: record(200), 400: record(400)})
        results.finish()
    assert indexes(path) == list(range(401))
    assert 2000 < most < 20_000


def test_lone_surrogates_are_written_as_escapes():
    assert line_of({"a": "é"}) == '{"a": "é"}\n'.encode()
    assert line_of({"a": "\ud800"}) == b'{"a": "\\ud800"}\n'
