"""Files of prompts: what is wrong with one line is that line's alone."""

import csv
import gzip
import hashlib
import io
import json
import lzma

import numpy as np
import pytest

from bitjax.batch import lines
from bitjax.batch.lines import Line, Source

FIELDS = ("prompt", "id", "messages", "temperature", "stop", "custom_id", "method", "url", "body")
OBJECT = {"prompt": 'é "quoted",\n漢', "temperature": 0.5, "id": "a1"}


def write(path, raw):
    path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    return Source(path)


def read(source):
    found = list(source.read(FIELDS))
    assert source.count() == len(found)
    assert [line.index for line in found] == list(range(len(found)))
    return found


@pytest.mark.parametrize("opener", [None, gzip.open, lzma.open, "zst"])
def test_json_lines(tmp_path, opener):
    raw = f'\ufeff"a text"\n\n  \r\n{json.dumps(OBJECT)}\r\n"last"'.encode()
    if opener == "zst":
        zstandard = pytest.importorskip("zstandard")
        path, raw = tmp_path / "a.jsonl.zst", zstandard.ZstdCompressor().compress(raw)
        path.write_bytes(raw)
    elif opener:
        path = tmp_path / ("a.jsonl.gz" if opener is gzip.open else "a.jsonl.xz")
        with opener(path, "wb") as file:
            file.write(raw)
    else:
        path = tmp_path / "a.jsonl"
        path.write_bytes(raw)
    assert read(Source(path)) == [Line(0, "a text"), Line(1, OBJECT), Line(2, "last")]


def test_bad_json_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE", 5000)
    raw = b"\n".join(
        [b'"good"', b'{"a": ', b'"\xff\xfe"', b"[" * 2500, b"3", b'{"temperature": NaN}',
         b'"' + b"x" * 20_000 + b'"', b'"' + b"y" * 4998 + b'"', b"1" * 4800, b'"end"']
    )  # fmt: skip
    found = read(write(tmp_path / "a.jsonl", raw))
    assert [line.value for line in found if not line.error] == ["good", "y" * 4998, "end"]
    wanted = [
        "", "not JSON: Expecting value", "not UTF-8: invalid start byte at byte 1 of the line",
        "not JSON: ", "neither a text nor an object: 3", "not JSON: NaN is no JSON",
        "the line is longer than 5,000 bytes", "", "not JSON: Exceeds the limit", "",
    ]  # fmt: skip
    for line, start in zip(found, wanted, strict=True):
        assert line.error.startswith(start)
        assert bool(line.error) == bool(start) == (line.value is None)


def test_text(tmp_path):
    source = write(tmp_path / "a.txt", b"one\r\n\n three \n\xff\n")
    assert [(line.value, bool(line.error)) for line in read(source)] == [
        ("one", False), ("", False), (" three ", False), (None, True),
    ]  # fmt: skip


def rows(*table):
    text = io.StringIO()
    csv.writer(text).writerows(table)
    return text.getvalue()


def test_csv(tmp_path):
    talk = [{"role": "user", "content": "x"}]
    raw = rows(
        ("id", "prompt", "temperature", "stop", "messages"),
        ("7", OBJECT["prompt"], "0.5", '["a", "b"]', ""),
        ("", "3.5", "warm", "ab", ""),
        ("8", "", "", "", json.dumps(talk)),
    )
    assert read(write(tmp_path / "a.csv", "\ufeff" + raw)) == [
        Line(0, {"id": "7", "prompt": OBJECT["prompt"], "temperature": 0.5, "stop": ["a", "b"]}),
        Line(1, {"prompt": "3.5", "temperature": "warm", "stop": "ab"}),
        Line(2, {"id": "8", "messages": talk}),
    ]


def test_bad_csv_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE", 100)
    raw = b"prompt,id\na,1\nb\n\nc,d,e\n\xff,2\n" + b"x" * 101 + b',3\n"a"b,4\nz,5\n"open,6\n'
    found = read(write(tmp_path / "a.csv", raw))
    assert [line.value for line in found if not line.error] == [
        {"prompt": "a", "id": "1"}, {"prompt": "z", "id": "5"},
    ]  # fmt: skip
    assert [line.error for line in found if line.error] == [
        "line 3 has 1 cells under 2 columns", "line 5 has 3 cells under 2 columns",
        "line 6 is not UTF-8 under 'prompt'", "line 7: field larger than field limit (100)",
        "line 8: ',' expected after '\"'", "line 10: unexpected end of data",
    ]  # fmt: skip
    assert csv.field_size_limit() != 100


def test_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "name": "n"}]
    table = arrow.table(
        {
            "prompt": ["a", None, "é"],
            "temperature": arrow.array([0.5, None, 1.0]),
            "messages": [None, talk, None],
            "label": arrow.array([1, 2, None]),
        }
    )
    path = tmp_path / "a.parquet"
    parquet.write_table(table, path)
    assert read(Source(path, kept=("label",))) == [
        Line(0, {"prompt": "a", "temperature": 0.5, "label": 1}),
        Line(1, {"messages": talk, "label": 2}),
        Line(2, {"prompt": "é", "temperature": 1.0}),
    ]
    with pytest.raises(ValueError, match=r"column 'label' is no setting of a request; keep it in"):
        list(Source(path).read(FIELDS))
    with pytest.raises(ValueError, match=r"column 'prompt' is no setting"):
        list(Source(path, "label").read(("messages", "temperature")))


def test_parquet_bytes_and_more_than_a_batch(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"é{i}".encode() for i in range(2 * lines._ROWS + 3)]
    texts[300] = b"\xff"
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"text": arrow.array(texts, arrow.binary())}), path)
    found = read(Source(path, "text"))
    assert found[300].error == "row 301 is not UTF-8 under 'text': invalid start byte"
    del found[300]
    assert [f.value for f in found] == [{"prompt": t.decode()} for t in texts if t != b"\xff"]


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.json", b"{}", r"a\.json is of no known kind; its name should end in \.jsonl, \.txt"),
        ("a.parquet.gz", b"", "of no known kind"),
        ("a.parquet", b"PAR1" + b"x" * 50, "a.parquet is damaged or cut short: "),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz is damaged or cut short"),
        ("a.csv", b"text,label\nx,1\n", "a.csv has no column 'prompt'; its columns are 'text', 'l"),
        ("a.csv", b"prompt,prompt\nx,1\n", "two columns of one name"),
        ("a.csv", b'"prompt', "no header of columns: unexpected end of data"),
        ("a.csv", b"", "has no column 'prompt'; its columns are none"),
    ],
)
def test_refused_files(tmp_path, name, raw, message):
    with pytest.raises(ValueError, match=message):
        list(write(tmp_path / name, raw).read(FIELDS))


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"no\.jsonl: there is no such file$"):
        Source(tmp_path / "no.jsonl")


def test_digest_and_state_tell_change(tmp_path):
    source = write(tmp_path / "a.jsonl", '"a"\n')
    digest, state = source.digest(), source.state()
    assert digest == hashlib.sha256(b'"a"\n').hexdigest()
    write(source.path, '"b"\n')
    assert source.digest() != digest
    assert source.state() != state


def test_a_line_at_a_time(tmp_path):
    """Memory does not grow with the file."""
    import tracemalloc

    path = tmp_path / "a.jsonl"
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for _ in range(2000):
            file.write(json.dumps({"prompt": rng.bytes(500).hex()}) + "\n")
    tracemalloc.start()
    try:
        assert sum(1 for _ in Source(path).read(FIELDS)) == 2000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1.2 * (1 << 20) + 100_000  # the file's buffer of 1 MiB; the file has 2 MB
