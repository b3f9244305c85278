"""The GGUF container: equal to the `gguf` package's both ways, and hostile files refused."""

import struct
import subprocess
import sys

import numpy as np
import pytest
from gguf_files import ARRAY, BOOL, F32, STRING, U8, U32, U64, assemble, entry, info, string

from bitjax.interop.gguf import container
from bitjax.interop.gguf.blocks import BY_NAME
from bitjax.interop.gguf.container import Tensor, open_container, write_container


def opened(tmp_path, raw):
    path = tmp_path / "file.gguf"
    path.write_bytes(raw)
    return open_container(path)


def refused(tmp_path, raw, message):
    with pytest.raises(ValueError, match=message) as caught:
        opened(tmp_path, raw)
    assert "file.gguf" in str(caught.value)


def test_reads_what_the_package_writes(tmp_path):
    gguf = pytest.importorskip("gguf", reason="package gguf is not installed")
    path = tmp_path / "theirs.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    writer.add_string("a.text", "grüße")
    writer.add_bool("a.bool", True)
    writer.add_int8("a.small", -5)
    writer.add_uint64("a.large", 2**40)
    writer.add_float64("a.double", 0.1)
    writer.add_array("a.words", ["x", "", "yz"])
    writer.add_array("a.counts", [1, -2, 3])
    writer.add_array("a.flags", [True, False])
    one, two = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones((3, 5), np.float16)
    writer.add_tensor("one", one)
    writer.add_tensor("two", two)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_container(path)
    about = dict(file.metadata)
    assert about.pop("a.counts").tolist() == [1, -2, 3]
    assert about.pop("a.flags").tolist() == [True, False]
    assert about == {
        "general.architecture": "llama", "general.alignment": 64, "a.text": "grüße",
        "a.bool": True, "a.small": -5, "a.large": 2**40, "a.double": 0.1,
        "a.words": ["x", "", "yz"],
    }  # fmt: skip
    assert [(name, e.type.name, e.shape) for name, e in file.tensors.items()] == [
        ("one", "F32", (2, 3)), ("two", "F16", (3, 5)),
    ]  # fmt: skip
    assert file.raw("one").tobytes() == one.tobytes()
    assert file.raw("two").tobytes() == two.tobytes()


def test_the_package_reads_what_is_written(tmp_path):
    gguf = pytest.importorskip("gguf", reason="package gguf is not installed")
    path, other = tmp_path / "ours.gguf", tmp_path / "other"
    arrays = {"one": np.arange(6, dtype=np.float32).reshape(2, 3), "two": np.ones(5, np.float32)}
    tensors = [
        Tensor(name, BY_NAME["F32"], array.shape, lambda array=array: iter(array))
        for name, array in arrays.items()
    ]
    about = {
        "general.architecture": "llama", "a.text": "grüße", "a.bool": False, "a.count": 7,
        "a.below": -7, "a.large": 2**40, "a.float": 0.5, "a.words": ["x", "yz"],
        "a.counts": [1, 2], "a.floats": [0.5, 1], "a.types": np.array([3, 1], np.int32),
    }  # fmt: skip
    sizes = []
    write_container(path, about, tensors, on_bytes=sizes.append)
    assert sum(sizes) == 4 * 11
    reader = gguf.GGUFReader(path)
    assert {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF")} == {
        key: value.tolist() if isinstance(value, np.ndarray) else value
        for key, value in about.items()
    }
    for tensor in reader.tensors:
        np.testing.assert_array_equal(tensor.data, arrays[tensor.name])
    found = open_container(path)
    assert found.metadata["a.types"].dtype == np.int32
    write_container(other, {"empty": []}, [])  # an array of no strings
    assert open_container(other).metadata == {"empty": []}


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file.gguf"

    def parts(good):
        yield np.zeros(4, np.float32)
        if not good:
            raise ValueError("half way")
        yield np.zeros(4, np.float32)

    def write(good, overwrite=False, shape=(8,)):
        tensor = Tensor("t", BY_NAME["F32"], shape, lambda: parts(good))
        write_container(path, {"good": good}, [tensor], overwrite)

    with pytest.raises(ValueError, match="half way"):
        write(good=False)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="t came in 32 bytes instead of 36"):
        write(good=True, shape=(9,))
    write(good=True)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"file.gguf exists already; it is replaced only when"):
        write(good=True)
    with pytest.raises(ValueError, match="half way"):
        write(good=False, overwrite=True)
    assert path.read_bytes() == before
    write(good=True, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["file.gguf"]
    with pytest.raises(ValueError, match=r"cannot write .*: No such file or directory"):
        write_container(tmp_path / "missing" / "file", {}, [])
    with pytest.raises(ValueError, match="metadata a=18446744073709551616 fits no integer"):
        write_container(tmp_path / "other", {"a": 2**64}, [])
    with pytest.raises(ValueError, match="metadata a is an array of float16"):
        write_container(tmp_path / "other", {"a": np.zeros(2, np.float16)}, [])


GOOD = entry("k", U32, 1)
TENSOR = info("t", (2, 3), 0)
DATA = bytes(24)
HUGE = 2**63


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "is not a GGUF file"),
        (b"GGML" + bytes(60), "is not a GGUF file"),
        (b"GGUF", "is cut off: 4 bytes wanted at byte 4"),
        (assemble([], [], version=1), "GGUF version 1 cannot be read"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(16), "big-endian GGUF files cannot be read"),
        (assemble([GOOD], [], counts=(HUGE, 0)), f"{HUGE} tensors; 2 are allowed in a file of"),
        (assemble([GOOD], [], counts=(0, HUGE)), f"{HUGE} entries; 4 are allowed in a file of"),
        (assemble([GOOD, GOOD], []), "metadata key 'k' occurs twice"),
        (assemble([string("k") + struct.pack("<I", 13)], []), "k has the unknown value type 13"),
        (assemble([string("k") + struct.pack("<IQ", STRING, HUGE)], []), f"k of {HUGE} bytes"),
        (assemble([string("k") + struct.pack("<IQ", STRING, 10**6)], []), "is cut off: 1000000"),
        (assemble([string(b"\xff\xfe") + bytes(8)], []), "metadata key is not UTF-8"),
        (assemble([entry("k", STRING, b"\xff")], []), "k is not UTF-8"),
        (assemble([string("k" * 70_000)], []), "metadata key of 70000 bytes; at most 65536"),
        (assemble([entry("k", ARRAY, (U32, []))[:-8] + struct.pack("<Q", HUGE)], []), "is cut off"),
        (
            assemble([entry("k", ARRAY, (STRING, []))[:-8] + struct.pack("<Q", HUGE)], []),
            f"k has {HUGE} strings, too many",
        ),
        (assemble([entry("k", ARRAY, (ARRAY, []))], []), "k is an array of value type 9, not all"),
        (assemble([], [TENSOR, TENSOR], DATA), "tensor 't' occurs twice"),
        (assemble([], [info("t", (), 0)]), "tensor 't' has 0 dimensions; 1 to 4"),
        (assemble([], [info("t", (1,) * 5, 0)], DATA), "tensor 't' has 5 dimensions"),
        (assemble([], [info("t", (2, 0), 0)], DATA), r"tensor 't' has shape \[2, 0\]"),
        (assemble([], [info("t", (2, 3), 0, kind=99)], DATA), "tensor 't' is of ggml type 99"),
        (assemble([], [info("t", (2, 33), 0, kind=2)], DATA), "Q4_0 needs rows of a multiple"),
        (assemble([], [info("t", (HUGE, HUGE), 0)], DATA), "tensor 't' takes bytes 96 to"),
        (assemble([], [TENSOR], DATA[:-1]), "tensor 't' takes bytes 96 to 120 of 119"),
        (assemble([], [info("t", (2, 3), HUGE)], DATA), "tensor 't' takes bytes 9223372036854775"),
        (assemble([], [info("t", (2, 3), 8)], bytes(64)), "or is not aligned to 32"),
        (assemble([], [TENSOR, info("u", (2,), 0)], DATA), "tensors 't' and 'u' overlap"),
        (assemble([entry("general.alignment", U32, 0)], []), "general.alignment=0 is not a power"),
        (assemble([entry("general.alignment", U32, 48)], []), "general.alignment=48 is not"),
        (assemble([entry("general.alignment", U64, HUGE)], []), "general.alignment=92233720368"),
        (assemble([entry("general.alignment", STRING, "a")], []), "general.alignment='a' is not"),
        (assemble([entry("general.alignment", BOOL, True)], []), "general.alignment=True is not"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused(tmp_path, raw, message):
    refused(tmp_path, raw, message)


def test_every_cut_is_refused(tmp_path):
    words = entry("w", ARRAY, (STRING, ["one", "two"]))
    counts = entry("c", ARRAY, (U8, [1, 2, 3]))
    whole = assemble([GOOD, words, counts, entry("f", F32, 0.5)], [TENSOR], DATA)
    assert opened(tmp_path, whole).raw("t").size == 24
    for length in range(len(whole)):
        with pytest.raises(ValueError, match=r"file\.gguf"):
            opened(tmp_path, whole[:length])


def test_no_more_metadata_than_the_limits(tmp_path, monkeypatch):
    words = assemble([entry("w", ARRAY, (STRING, [""] * 40))], [])
    assert opened(tmp_path, words).metadata["w"] == [""] * 40
    monkeypatch.setattr(container, "MAX_STRINGS", 39)
    refused(tmp_path, words, "w has 40 strings, too many")
    text = assemble([entry("t", STRING, "x" * 2000)], [])
    assert len(opened(tmp_path, text).metadata["t"]) == 2000
    monkeypatch.setattr(container, "MAX_METADATA", 1000)
    refused(tmp_path, text, "t of 2000 bytes; at most 1000 are allowed|more than 1000 bytes")
    refused(tmp_path, assemble([GOOD, entry("u", STRING, "x" * 990)], []), "more than 1000 bytes")


def test_not_a_file(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*: Is a directory"):
        open_container(tmp_path)
    with pytest.raises(ValueError, match=r"cannot read .*: No such file"):
        open_container(tmp_path / "missing")


def test_memory_stays_small(tmp_path):
    """A sparse file of 8 GB whose one tensor is all of it opens in an address space of little more.

    Nothing but the map may grow with it.
    """
    path = tmp_path / "large.gguf"
    size = 2**33
    path.write_bytes(assemble([GOOD], [info("t", (size // 4,), 0)]))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + size)
    code = (
        "import resource, sys; from pathlib import Path\n"
        # of address space: jax and its threads reserve much
        "resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))\n"
        "from bitjax.interop.gguf.container import open_container\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "file = open_container(Path(sys.argv[1]))\n"
        "assert file.raw('t').nbytes == 2**33\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(done.stdout) < 2000  # KB
