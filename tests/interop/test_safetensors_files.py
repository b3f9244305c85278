"""Bounded reading and streamed writing of safetensors files; every refusal."""

import json
import os
import struct

import huggingface_folders as folders
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from bitjax.interop.safetensors_files import (
    MAX_HEADER_BYTES,
    open_folder,
    open_safetensors,
    read_json,
)
from bitjax.safetensors_writer import Tensor, write_safetensors

ARRAYS = {
    "odd": np.arange(3, dtype=np.uint8),  # what follows lies at no multiple of four
    "f32": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3),
    "f16": np.array([1.5, np.inf], np.float16),
    "bf16": np.array([[0.5], [-3]], ml_dtypes.bfloat16),
}


def raw(path, header, data=b"", length=None):
    """Write a file as it should not be."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(first=0, last=4, dtype="F32", shape=(1,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


def test_round_trip(tmp_path):
    told = []
    tensors = [Tensor(n, a.dtype, a.shape, lambda a=a: iter(a)) for n, a in ARRAYS.items()]
    write_safetensors(tmp_path / "x", tensors, {"format": "pt"}, told.append)
    assert sum(told) == sum(a.nbytes for a in ARRAYS.values())
    held = open_safetensors(tmp_path / "x")
    assert list(held) == list(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(held[name].array(), array)
        assert held[name].array().dtype == array.dtype
        assert not held[name].array().flags.writeable
    theirs = safetensors.numpy.load_file(tmp_path / "x")
    np.testing.assert_array_equal(theirs["f32"], ARRAYS["f32"])


def test_pieces_must_make_up_the_tensor(tmp_path):
    short = Tensor("a", np.dtype(np.float32), (3,), lambda: [np.zeros(2)])
    with pytest.raises(ValueError, match=r"^a came with 8 bytes; wanted 12$"):
        write_safetensors(tmp_path / "x", [short], {}, lambda count: None)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"", b"", "its header is not valid JSON"),
        (b"[1]", b"", "its header holds a list; wanted a JSON object"),
        (b'{"a": NaN}', b"", "NaN is not a number of JSON"),
        (b"[" * 100_000, b"", "not valid JSON"),
        (b'{"a": 1' + b"0" * 5000 + b"}", b"", "not valid JSON"),
        (b"\xff\xfe", b"", "not valid JSON"),
        (json.dumps({"a": entry()})[:-1].encode() + b', "a": {}}', b"1234", "a comes twice"),
        ({"a": entry()}, b"123", "is not a safetensors file"),  # truncated
        ({"a": entry()}, b"12345", "is not a safetensors file"),  # something behind
        ({"a": entry(), "b": entry()}, b"1234", "is not a safetensors file"),  # overlapping
        ({"a": entry(4, 8)}, b"12345678", "is not a safetensors file"),  # a gap
        ({"a": entry(-4, 0)}, b"1234", "is not a safetensors file"),
        ({"a": entry(4, 0)}, b"1234", "is not a safetensors file"),
        ({"a": entry(0, 2**63)}, b"1234", "is not a safetensors file"),
        ({"a": entry(shape=(2,))}, b"1234", "is not a safetensors file"),
        ({"a": entry(shape=(2**62, 2**62))}, b"1234", "is not a safetensors file"),
        ({"a": entry(dtype="F33")}, b"1234", "is not a safetensors file"),
        ({"a": {"dtype": "F32"}}, b"1234", "is not a safetensors file"),
        ({"a": 3}, b"1234", "is not a safetensors file"),
        ({"__metadata__": {"a": 3}}, b"", "is not a safetensors file"),
    ],
)
def test_damaged_files(tmp_path, header, data, message):
    path = raw(tmp_path / "x.safetensors", header, data)
    with pytest.raises(ValueError, match=message) as caught:
        open_safetensors(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_header_that_promises_too_much(tmp_path):
    for length in (MAX_HEADER_BYTES + 1, 2**63):
        path = raw(tmp_path / "x", b"{}", length=length)
        with pytest.raises(ValueError, match=f"its header would take {length:,} bytes"):
            open_safetensors(path)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("nothing", "pipe", "."):
        with pytest.raises(ValueError, match=r"is no file$"):
            open_safetensors(tmp_path / name)
        with pytest.raises(ValueError, match=r"is no file$"):
            read_json(tmp_path / name)
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="not valid JSON"):
        open_safetensors(tmp_path / "empty")
    (tmp_path / "large.json").write_text("{}" + " " * 100)
    with pytest.raises(ValueError, match="has more than 50 bytes"):
        read_json(tmp_path / "large.json", limit=50)


def test_shards(tmp_path):
    folder = folders.write(tmp_path / "model")
    whole = folders.arrays(folder / "model.safetensors")
    folders.shard(folder, 3)
    held = open_folder(folder)
    assert held.keys() == whole.keys()
    assert {tensor.path.name for tensor in held.values()} == {
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    }
    for name, array in whole.items():
        np.testing.assert_array_equal(held[name].array(), array)


def test_shards_that_contradict_the_index(tmp_path):
    folder = folders.write(tmp_path / "model")
    index = folders.shard(folder)
    placed = json.loads(index.read_text())["weight_map"]
    first, second = sorted(set(placed.values()))
    name = next(name for name in placed if placed[name] == first)

    def refused(changes, message):
        index.write_text(json.dumps({"weight_map": placed | changes}))
        with pytest.raises(ValueError, match=message):
            open_folder(folder)

    refused({name: second}, rf"{first}: {name} is there; model\S+ has it in {second}")
    refused({"more": first}, rf"{first}: more is missing")
    for evil in ("../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "",
                 "a\\b.safetensors", "pytorch_model.bin"):  # fmt: skip
        refused({name: evil}, "wanted the name of a safetensors file in the same folder")
    refused({name: "gone.safetensors"}, "gone.safetensors is no file")
    refused({name: 3}, "has no weight_map of tensor names to files")
    index.write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        open_folder(folder)
    index.write_text(json.dumps({"weight_map": placed}))
    both = folders.arrays(folder / second) | {name: folders.arrays(folder / first)[name]}
    folders.save(folder / second, both)
    with pytest.raises(ValueError, match=rf"{second}: {name} is in {first} as well"):
        open_folder(folder)


def test_pickles_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no model.safetensors and no model.safetensors.ind"):
        open_folder(tmp_path)
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=r"in pytorch_model-00001-of-00002.bin, a Python pickle, "
                                         "which may run any code"):  # fmt: skip
        open_folder(tmp_path)
