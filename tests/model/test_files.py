"""Model files: bit-exact round trips, an independent reader, memory mapping, hostile bytes."""

import dataclasses
import itertools
import json
import mmap
import os
import random
import re
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from tiny import tiny_config, tiny_model

from bitjax.config import RopeScaling
from bitjax.infer import pack_model
from bitjax.model import bit_linears
from bitjax.model.files import load_model, save_model, tensor_table
from bitjax.packing import PackedWeights, multiplier_shape, packed_shape

TOKENS = jnp.asarray([[72, 101, 108, 108, 111, 0, 255, 10]], jnp.int32)
forward = nnx.jit(lambda model: model(TOKENS % model.config.vocab_size))


def one_block(**changes):
    return tiny_model(num_layers=1, **changes)


# Layout of the linear layers and format of the tables.
FORMS = {
    "packed": ("ternary2", "float32"),
    "packed-bfloat16": ("ternary1.6", "bfloat16"),
    "packed-int8": ("ternary2", "int8"),
    "packed-int4": ("ternary1.6", "int4"),
    "packed-screened": ("ternary2", "screened"),
}


def parameters(model):
    """Name in the file -> array, straight from the module's attributes."""
    held = {"embedding": model.embedding.get_value(), "norm.scale": model.norm.scale[...]}
    if model.head is not None:
        held["head"] = model.head.get_value()
    for i, block in enumerate(model.blocks):
        norms = {
            "attention_norm": block.attention_norm,
            "ffn_norm": block.ffn_norm,
            "attention.sub_norm": block.attention.sub_norm,
            "ffn.sub_norm": block.ffn.sub_norm,
        }
        for name, norm in norms.items():
            if norm is not None:
                held[f"blocks.{i}.{name}.scale"] = norm.scale[...]
    for name, layer in bit_linears(model):
        held[f"{name}.weight"] = layer.weight.get_value()
        if layer.norm is not None:
            held[f"{name}.norm.scale"] = layer.norm.scale[...]
    found = {}
    if model.screen is not None:
        screen = model.screen.get_value()
        held["screen"] = screen.weights
        held |= {f"screen.{part}": getattr(screen, part) for part in ("dither", "spreads", "norms")}
    for name, value in held.items():
        if isinstance(value, PackedWeights):
            found[f"{name}.{value.layout}"] = value.codes
            found[f"{name}.scale"] = value.scale
            if value.multipliers is not None:
                found[f"{name}.multipliers"] = value.multipliers
        else:
            found[name] = value
    return {name: np.asarray(value) for name, value in found.items()}


def read_raw(path):
    """Header and data of a safetensors file, by hand."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :], 8 + length


def write_raw(path, header, data):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def metadata(path):
    return json.loads(read_raw(path)[0]["__metadata__"]["bitjax"])


@pytest.fixture(scope="module")
def packed():
    return pack_model(one_block())


@pytest.fixture(scope="module")
def packed_tables():
    """Every layout that `packed` lacks: ternary1.6, int4 (and int8 below)."""
    return pack_model(one_block(tie_embeddings=False, vocab_size=48), "ternary1.6", "int4")


@pytest.fixture
def packed_file(packed, tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(path, packed)
    return path


@pytest.fixture
def tables_file(packed_tables, tmp_path):
    path = tmp_path / "tables.safetensors"
    save_model(path, packed_tables)
    return path


def refuses(path, message):
    """One sentence, on one line."""
    with pytest.raises(ValueError, match=message) as error:
        load_model(path)
    assert "\n" not in str(error.value)


# Round trips


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": False},
        {"inner_norm": True},
        {"sub_norm": False, "activation": "silu"},
        {"weights": "binary", "activations": "float"},
        {"inner_norm": True, "sub_norm": False, "tie_embeddings": False},
        {"linear_norm_eps": 1e-6, "rope_scaling": RopeScaling("linear", 2.0)},
        {"float_layers": ("*.gate_up", "*.o")},
    ],
    ids=lambda changes: ",".join(changes) or "plain",
)
@pytest.mark.parametrize("form", ["float", *FORMS])
def test_round_trip(tmp_path, changes, form):
    model = one_block(**changes)
    if form != "float":
        model = pack_model(model, *FORMS[form])
    path = tmp_path / "model.safetensors"
    save_model(path, model)
    loaded = load_model(path)

    assert loaded.config == model.config == tiny_config(num_layers=1, **changes)
    wanted, got = parameters(model), parameters(loaded)
    independent = safetensors.numpy.load_file(path)
    assert wanted.keys() == got.keys() == independent.keys()
    for name, value in wanted.items():
        for other in (got[name], independent[name]):
            assert other.dtype == value.dtype, name
            assert other.shape == value.shape, name
            assert other.tobytes() == value.tobytes(), name


@pytest.mark.parametrize("weights", ["ternary", "float"])
def test_logits_are_bit_identical(tmp_path, weights):
    model = one_block(weights=weights, tie_embeddings=False)
    forms = [model]
    if weights == "ternary":
        forms += [pack_model(model, *form) for form in FORMS.values()]
    for index, form in enumerate(forms):
        path = tmp_path / f"{index}.safetensors"
        save_model(path, form)
        logits = np.asarray(forward(form))
        assert logits.std() > 0.1
        np.testing.assert_array_equal(logits, forward(load_model(path)))


def test_a_loaded_model_saves_to_the_same_bytes(packed_file, tmp_path):
    again = tmp_path / "again.safetensors"
    save_model(again, load_model(packed_file))
    assert again.read_bytes() == packed_file.read_bytes()


def test_names_and_types_of_packed_tensors(tables_file):
    found = {name: (str(t.dtype), t.shape) for name, t in
             safetensors.numpy.load_file(tables_file).items()}  # fmt: skip
    blocks = {
        # 48 x 32 in blocks of 16 x 20; 32 x 24 likewise; 48 x 32 in blocks of 16 x 8.
        "blocks.0.attention.qkv.weight.ternary1.6": ("uint8", (3, 2, 64)),
        "blocks.0.attention.qkv.weight.scale": ("float32", (48,)),
        "blocks.0.attention.o.weight.ternary1.6": ("uint8", (2, 2, 64)),
        "blocks.0.attention.o.weight.scale": ("float32", ()),
        "blocks.0.ffn.gate_up.weight.ternary1.6": ("uint8", (3, 2, 64)),
        "blocks.0.ffn.gate_up.weight.scale": ("float32", (48,)),
        "blocks.0.ffn.down.weight.ternary1.6": ("uint8", (2, 2, 64)),
        "blocks.0.ffn.down.weight.scale": ("float32", ()),
        **{f"{table}.int4": ("uint8", (3, 4, 64)) for table in ("embedding", "head")},
        **{f"{table}.multipliers": ("uint8", (3, 1, 16)) for table in ("embedding", "head")},
        **{f"{table}.scale": ("float32", (48,)) for table in ("embedding", "head")},
        "blocks.0.attention_norm.scale": ("float32", (32,)),
        "blocks.0.attention.sub_norm.scale": ("float32", (24,)),
        "blocks.0.ffn_norm.scale": ("float32", (32,)),
        "blocks.0.ffn.sub_norm.scale": ("float32", (24,)),
        "norm.scale": ("float32", (32,)),
    }
    assert found == blocks


def test_metadata(packed_file):
    about = metadata(packed_file)
    assert about == {
        "format": 2,
        # JSON has no tuples
        "config": dataclasses.asdict(tiny_config(num_layers=1)) | {"float_layers": []},
        "tokenizer": "bytes",
    }


def test_dtype_and_impl_reach_the_model(packed_file):
    model = load_model(packed_file, dtype="bfloat16", impl="reference")
    assert model.dtype == jnp.bfloat16
    for loaded, impl in ((model, "reference"), (load_model(packed_file), "auto")):
        assert {layer.impl for _, layer in bit_linears(loaded)} == {loaded.impl} == {impl}


def test_tensor_table_lists_the_file(packed_file):
    header, _, _ = read_raw(packed_file)
    del header["__metadata__"]
    rows = tensor_table(packed_file)
    assert {name for name, *_ in rows} == header.keys()
    start = 0
    for name, dtype, shape, size in rows:
        assert header[name]["dtype"] == dtype
        assert header[name]["shape"] == list(shape)
        assert header[name]["data_offsets"] == [start, start + size]
        start += size


# Alignment and the memory map


def test_tensors_of_whole_cache_lines_are_aligned_in_the_file(packed_file):
    header, data, start = read_raw(packed_file)
    entries = {name: e["data_offsets"] for name, e in header.items() if name != "__metadata__"}
    aligned = {n for n, (first, last) in entries.items() if (last - first) % 64 == 0}
    assert {n for n in entries if n.endswith(".ternary2")} | {"embedding"} <= aligned
    assert len(aligned) >= 5
    assert all((start + entries[name][0]) % 64 == 0 for name in aligned)
    # No gaps: any safetensors reader takes the file.
    spans = sorted(entries.values())
    assert spans[0][0] == 0
    assert spans[-1][1] == len(data)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))


def mapped_ranges(path):
    """Address ranges of this process that map the file: (first, last, flags of the mapping)."""
    text = Path("/proc/self/smaps").read_text()
    blocks = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", text)
    ours = [block for block in blocks if block.partition("\n")[0].endswith(str(path.resolve()))]
    return [
        (
            *(int(end, 16) for end in block.split()[0].split("-")),
            re.search(r"VmFlags: (.*)", block)[1].split(),
        )
        for block in ours
    ]


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux's /proc")
@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_large_tensors_stay_in_the_mapped_file(packed, tmp_path, form, check):
    path = tmp_path / "model.safetensors"
    layout, tables = FORMS[form]
    save_model(path, pack_model(one_block(), layout, tables))
    model = load_model(path, check=check)
    table = model.embedding.get_value()
    arrays = [(f"{n}.weight.{layout}", layer.weight.get_value().codes)
              for n, layer in bit_linears(model)]  # fmt: skip
    if tables in ("int8", "int4"):
        arrays += [(f"embedding.{tables}", table.codes), ("embedding.scale", table.scale)]
    else:
        arrays += [("embedding", table)]
    if tables == "int4":
        arrays += [("embedding.multipliers", table.multipliers)]
    if tables == "screened":
        arrays += [("screen.int4", model.screen.get_value().weights.codes)]
    ranges = mapped_ranges(path)
    assert ranges
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))  # one map
    header, _, start = read_raw(path)
    for name, array in arrays:
        pointer = array.unsafe_buffer_pointer()
        assert pointer % 64 == 0, name
        assert pointer + array.nbytes <= ranges[-1][1], f"{name} was copied"
        assert pointer - ranges[0][0] == start + header[name]["data_offsets"][0], name


@pytest.mark.skipif(
    not os.path.exists("/sys/kernel/mm/transparent_hugepage"), reason="needs Linux's large pages"
)
@pytest.mark.parametrize(
    ("tied", "tables", "by_rows"),
    [
        (True, "bfloat16", set()),
        (True, "screened", {"embedding"}),
        (False, "screened", {"embedding", "head"}),
        (False, "bfloat16", {"embedding"}),
        (True, "int4", set()),
        (False, "int4", {"embedding.int4"}),
    ],
)
def test_large_pages_are_asked_for_what_every_token_reads(tmp_path, tied, tables, by_rows):
    path = tmp_path / "model.safetensors"
    model = tiny_model(hidden_size=128, vocab_size=1000, intermediate_size=500, tie_embeddings=tied)
    save_model(path, pack_model(model, tables=tables))
    loaded = load_model(path)  # keeps the map
    ranges = mapped_ranges(path)
    header, _, start = read_raw(path)
    seen = set()
    for name, entry in header.items():
        first, last = entry["data_offsets"] if name != "__metadata__" else (0, 0)
        if last - first < 3 * mmap.PAGESIZE:
            continue
        middle = ranges[0][0] + start + (first + last) // 2
        (flags,) = [flags for begin, end, flags in ranges if begin <= middle < end]
        assert ("hg" in flags) == (name not in by_rows), name
        seen.add(name)
    assert by_rows < seen
    del loaded


def test_a_file_of_another_writer_loads_whatever_its_alignment(packed, packed_file, tmp_path):
    other = tmp_path / "other.safetensors"
    tensors = safetensors.numpy.load_file(packed_file)
    about = {"bitjax": json.dumps(metadata(packed_file))}
    header, _, _ = read_raw(packed_file)
    for pad in range(9):
        safetensors.numpy.save_file(tensors, other, about | {"pad": "x" * pad})
        header, data, _ = read_raw(other)
        write_raw(other, json.dumps(header).encode() + b" " * pad, data)
        got = parameters(load_model(other))
        for name, value in parameters(packed).items():
            np.testing.assert_array_equal(got[name], value, err_msg=name)


# Writing


def test_overwriting_replaces_the_file_and_leaves_its_readers_theirs(packed_file, packed):
    before = load_model(packed_file)
    codes = np.array(before.embedding[...])
    save_model(packed_file, one_block(seed=1))
    assert os.listdir(packed_file.parent) == [packed_file.name]
    np.testing.assert_array_equal(before.embedding[...], codes)
    after = np.asarray(load_model(packed_file).embedding[...])
    np.testing.assert_array_equal(after, one_block(seed=1).embedding[...])
    assert (after != codes).any()


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(packed_file, monkeypatch, fails):
    before = packed_file.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, fails, full)
    with pytest.raises(ValueError, match=r"^cannot write .*model.safetensors: No space left on"):
        save_model(packed_file, one_block(seed=1))
    assert os.listdir(packed_file.parent) == [packed_file.name]
    assert packed_file.read_bytes() == before


def test_an_impossible_place_is_an_error(packed, tmp_path):
    with pytest.raises(ValueError, match=r"cannot write .*: No such file or directory"):
        save_model(tmp_path / "nowhere" / "model.safetensors", packed)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"cannot write .*folder: Is a directory"):
        save_model(tmp_path / "folder", packed)
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_not_written(tmp_path, value):
    model = one_block()
    layer = model.blocks[0].ffn.gate_up
    layer.weight.set_value(layer.weight[...].at[3, 4].set(value))
    with pytest.raises(
        ValueError, match=r"blocks\.0\.ffn\.gate_up\.weight holds 1 values .* at index \(3, 4\)"
    ):
        save_model(tmp_path / "model.safetensors", model)
    assert os.listdir(tmp_path) == []


# Files that are damaged, or made to hurt


def test_missing_file_and_directory(tmp_path):
    refuses(tmp_path / "none.safetensors", "cannot read .*none.safetensors: No such file")
    refuses(tmp_path, f"cannot read {re.escape(str(tmp_path))}: ")


def test_every_truncation_is_refused(packed_file):
    raw = packed_file.read_bytes()
    lengths = {0, 1, 7, 8, 9, len(raw) - 1, *random.Random(0).sample(range(len(raw)), 200)}
    for length in lengths:
        packed_file.write_bytes(raw[:length])
        refuses(packed_file, "is not a safetensors file: ")
    packed_file.write_bytes(raw + b"\0")
    refuses(packed_file, "is not a safetensors file: ")


def loads_or_refuses(path, like):
    """True if the file loads, to a model of the shapes of `like`; False if it is a ValueError."""
    try:
        model = load_model(path)
    except ValueError:
        return False
    config = dataclasses.replace(
        like.config,
        # Bits of the metadata may turn one valid setting into another; shapes may not change.
        **{
            f: getattr(model.config, f)
            for f in ("rope_theta", "norm_eps", "init_std", "max_seq_len", "vocab_size",
                      "weights", "activations", "activation", "num_heads", "head_dim",
                      "num_kv_heads", "rope_scaling")
        },
    )  # fmt: skip
    assert model.config == config
    wanted, got = parameters(like), parameters(model)
    assert {n: a.shape for n, a in got.items()} == {n: a.shape for n, a in wanted.items()}
    assert all(np.isfinite(a.astype(np.float32)).all() for a in got.values())
    for name, array in got.items():
        if name.endswith(".ternary2"):
            assert all(((array >> shift) & 3 != 3).all() for shift in (0, 2, 4, 6)), name
        if name.endswith(".ternary1.6"):
            assert array.max() < 3**5, name
        if name.endswith(".int8"):
            assert array.min() > 0, name
        if name.endswith(".multipliers"):
            assert array.min() >= 1, name
            assert array.max() <= 15, name
    return True


# A file with int4 tables has a longer header: of it, every third byte.
@pytest.mark.parametrize(("form", "every"), [("packed", 1), ("packed_tables", 3)])
def test_every_header_byte_flipped(request, tmp_path, form, every):
    packed, packed_file = request.getfixturevalue(form), tmp_path / "model.safetensors"
    save_model(packed_file, packed)
    raw = packed_file.read_bytes()
    _, _, start = read_raw(packed_file)
    draw = random.Random(1)
    loaded = 0
    for at in range(0, start, every):
        damaged = bytearray(raw)
        damaged[at] ^= 1 << draw.randrange(8)
        packed_file.write_bytes(damaged)
        loaded += loads_or_refuses(packed_file, packed)
    assert loaded < start / every / 20


@pytest.mark.parametrize("form", ["packed", "packed_tables"])
def test_random_bits_flipped(request, tmp_path, form):
    packed, packed_file = request.getfixturevalue(form), tmp_path / "model.safetensors"
    save_model(packed_file, packed)
    raw = packed_file.read_bytes()
    draw, outcomes = random.Random(2), []
    for _ in range(150):
        damaged = bytearray(raw)
        for _ in range(draw.choice((1, 2, 8))):
            damaged[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        packed_file.write_bytes(damaged)
        outcomes.append(loads_or_refuses(packed_file, packed))
    assert {True, False} == set(outcomes)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**40, 100_000_001, 0, 1])
def test_an_absurd_header_length(packed_file, length):
    raw = packed_file.read_bytes()
    packed_file.write_bytes(length.to_bytes(8, "little") + raw[8:])
    refuses(packed_file, "is not a safetensors file: ")


@pytest.mark.parametrize(
    "header",
    [
        b"not JSON at all, but long enough",
        b"[]",
        b'"text"',
        b"{",
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a": ' + b'{"a": ' * 100_000 + b"1" + b"}" * 100_001,
        b'{"a": {"dtype": "U8", "shape": [-1], "data_offsets": [0, 0]}}',
        b'{"a": {"dtype": "U8", "shape": [4], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "U8", "shape": [99], "data_offsets": [0, 99]}}',
        b'{"a": {"dtype": "U8", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}}',
        b'{"__metadata__": {"bitjax": 5}}',
        b'{"\xff": 1}',
    ],
)
def test_a_header_that_is_none(tmp_path, header):
    path = tmp_path / "bad.safetensors"
    write_raw(path, header, b"")
    refuses(path, "is not a safetensors file: ")


def rewritten(path, *, tensors=None, about=None, config=None):
    """Write the file anew with other tensors, bitjax metadata or settings."""
    tensors = safetensors.numpy.load_file(path) if tensors is None else tensors
    about = metadata(path) if about is None else about
    if config:
        about["config"] |= config
    text = about if isinstance(about, str) else json.dumps(about)
    safetensors.numpy.save_file(tensors, path, {"bitjax": text})


def test_no_metadata(packed_file):
    tensors = safetensors.numpy.load_file(packed_file)
    for about in (None, {"format": "pt"}):
        safetensors.numpy.save_file(tensors, packed_file, about)
        refuses(packed_file, "has no bitjax metadata; it is not a bitjax model file$")


@pytest.mark.parametrize(
    "about",
    ["", "not JSON", "[]", "5", "null", "{}", '{"format": 2}', '{"format": 2, "config": {}}',
     "[" * 100_000, '{"format": 2, "tokenizer": "bytes", "config": ' + "[" * 100_000,
     '{"format": ' + "9" * 5000 + "}"],
    ids=lambda about: about[:20],
)  # fmt: skip
def test_metadata_that_cannot_be_read(packed_file, about):
    rewritten(packed_file, about=about)
    refuses(packed_file, "its bitjax metadata cannot be read$")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 1}, "model file format 1; this version reads 2"),
        ({"format": 3}, "model file format 3; this version reads 2"),
        ({"format": "2"}, "model file format '2'; this version reads 2"),
        ({"tokenizer": "bpe"}, "unknown tokenizer 'bpe'; this version has 'bytes' and 'text'"),
        ({"tokenizer": None}, "unknown tokenizer None; this version has 'bytes' and 'text'"),
        ({"config": []}, r"model is not an object of settings: \[\]"),
        ({"config": {"depth": 3}}, "unknown setting model.depth; model has vocab_size"),
        ({"config": {"num_layers": "1"}}, "model.num_layers='1' is not of type int"),
        ({"config": {"num_layers": 0}}, "model.num_layers=0 must be above 0"),
    ],
)
def test_metadata_of_another_kind(packed_file, change, message):
    rewritten(packed_file, about=metadata(packed_file) | change)
    refuses(packed_file, f"model.safetensors: {message}")


@pytest.mark.parametrize("size", [33, 10**12, 10**30, 10**400], ids=["33", "1e12", "1e30", "1e400"])
@pytest.mark.parametrize(
    ("setting", "factor", "tensor"),
    [
        ("hidden_size", 1, r"blocks\.0\.attention\.o\.weight: codes are uint8\[2, 2, 64\]"),
        ("intermediate_size", 1, r"blocks\.0\.ffn\.down\.weight: codes are uint8\[2, 2, 64\]"),
        ("num_heads", 2, r"blocks\.0\.attention\.o\.weight: codes are uint8\[2, 2, 64\]"),
        ("head_dim", 2, r"blocks\.0\.attention\.o\.weight: codes are uint8\[2, 2, 64\]"),
        ("vocab_size", 1, r"embedding is float32\[256, 32\]; the configuration needs a float \["),
        ("num_layers", 1, "holds 1 layers; its configuration has num_layers="),
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_built(
    packed_file, setting, factor, tensor, size
):
    rewritten(packed_file, config={setting: size * factor})
    refuses(packed_file, tensor)


def change(tensors, name, value=None):
    """`tensors` with one replaced, or with it removed."""
    rest = {key: tensor for key, tensor in tensors.items() if key != name}
    return rest if value is None else rest | {name: value}


UP = "blocks.0.ffn.gate_up.weight"
LINE = np.zeros(16, np.float32)
UP_CODES = packed_shape("ternary2", 48, 32)
TABLE_CODES, TABLE_MULTIPLIERS = packed_shape("int4", 48, 32), multiplier_shape(48, 32)


def bytes_of(shape, value=0x55):
    return np.full(shape, value, np.uint8)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("norm.scale", None, r"norm\.scale is missing$"),
        ("embedding", None, "embedding is missing$"),
        (f"{UP}.scale", None, r"blocks\.0\.ffn\.gate_up\.weight\.scale is missing$"),
        (f"{UP}.ternary2", None, r"blocks\.0\.ffn\.gate_up\.weight is missing$"),
        ("head", LINE, "holds tensors that its configuration has no place for: head$"),
        (UP, LINE, r"has no place for: blocks\.0\.ffn\.gate_up\.weight$"),
        (f"{UP}.ternary1.6", bytes_of(packed_shape("ternary1.6", 48, 32)),
         r"has no place for: blocks\.0\.ffn\.gate_up\.weight\.ternary1\.6$"),
        (f"{UP}.codes", bytes_of(UP_CODES), r"has no place for: .*gate_up\.weight\.codes$"),
        (f"{UP}.ternary", bytes_of(UP_CODES), r"has no place for: .*gate_up\.weight\.ternary$"),
        ("blocks.1.x", LINE, "holds 2 layers; its configuration has num_layers=1$"),
        ("norm.scale", np.zeros(31, np.float32),
         r"norm\.scale is float32\[31\]; the configuration needs a float32 \[32\]"),
        ("norm.scale", np.ones(32, ml_dtypes.bfloat16),
         r"norm\.scale is bfloat16\[32\]; the configuration needs a float32 \[32\]"),
        ("norm.scale", np.zeros((1, 32), np.float32), r"norm\.scale is float32\[1, 32\]; "),
        ("norm.scale", np.zeros(32, np.uint8), r"norm\.scale is uint8\[32\]; "),
        ("norm.scale", np.zeros(32, np.float16), r"norm\.scale is F16; known are F32, BF16, U8$"),
        ("norm.scale", np.zeros(32, np.int64), r"norm\.scale is I64; known are F32, BF16, U8$"),
        ("norm.scale", np.full(32, np.nan, np.float32),
         r"norm\.scale holds 32 values that are not finite, the first at index \(0,\)"),
        ("embedding", np.full((256, 32), -np.inf, ml_dtypes.bfloat16),
         r"embedding holds 8192 values that are not finite, the first at index \(0, 0\)"),
        (f"{UP}.ternary2", bytes_of((3, 2, 32)), r"up\.weight: codes are uint8\[3, 2, 32\]; "
         r"a 48 x 32 ternary2 matrix needs uint8\[3, 2, 64\]"),
        (f"{UP}.ternary2", bytes_of(256), r"up\.weight: codes are uint8\[256\]; "),
        (f"{UP}.ternary2", np.zeros(UP_CODES, np.float32),
         r"up\.weight: codes are float32\[3, 2, 64\]; "),
        (f"{UP}.ternary2", bytes_of(UP_CODES, 0x0C), r"up\.weight: holds the code 3, "),
        (f"{UP}.scale", np.array([1], np.float32),
         r"up\.weight: scales must be one float32 or 48, one a row; got float32\[1\]"),
        (f"{UP}.scale", np.ones((48, 1), np.float32), r"one a row; got float32\[48, 1\]"),
        (f"{UP}.scale", np.array(1, ml_dtypes.bfloat16),
         r"up\.weight: scales must be one float32 or 48, one a row; got bfloat16\[\]"),
        (f"{UP}.scale", np.array(np.nan, np.float32), r"up\.weight: the scale nan is not finite"),
        (f"{UP}.scale", np.array(np.inf, np.float32), r"up\.weight: the scale inf is not finite"),
        (f"{UP}.scale", np.array([1] * 47 + [np.inf], np.float32), r"inf is not finite"),
        ("norm.scale.ternary2", bytes_of(UP_CODES), r"norm\.scale cannot be ternary2; "
         "linear layers are packed as ternary, embedding and head as int4 or int8$"),
        ("norm.scale.int8", bytes_of(UP_CODES), r"norm\.scale cannot be int8; "),
        (f"{UP}.multipliers", bytes_of(multiplier_shape(48, 32), 1),
         r"gate_up\.weight.*multipliers"),
        (f"{UP}.multipliers", np.zeros((0,), np.float32), r"gate_up\.weight.*multipliers"),
    ],
)  # fmt: skip
def test_tensors_that_are_not_the_configurations(packed_file, name, value, message):
    rewritten(packed_file, tensors=change(safetensors.numpy.load_file(packed_file), name, value))
    refuses(packed_file, message)
    refuses_unchecked(packed_file, message)


def test_a_norm_cannot_be_packed(packed_file):
    tensors = safetensors.numpy.load_file(packed_file)
    extra = {"norm.scale.int8": bytes_of((2, 8, 64)), "norm.scale.scale": np.ones(32, np.float32)}
    rewritten(packed_file, tensors=tensors | extra)
    refuses(packed_file, r"norm\.scale cannot be int8; linear layers are packed as ternary, ")


def refuses_unchecked(path, message):
    """Without the check of values, what is not finite or no code is let pass, and nothing else."""
    of_values = re.search("values that are not|holds the code|holds a byte", message)
    if not of_values:
        with pytest.raises(ValueError, match=message):
            load_model(path, check=False)
    else:
        load_model(path, check=False)


@pytest.mark.parametrize("table", ["embedding", "head"])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("int4", None, " is missing$"),
        ("scale", None, r"\.scale is missing$"),
        ("multipliers", None, ": int4 weights need multipliers$"),
        ("multipliers", bytes_of(TABLE_MULTIPLIERS, 0), ": multipliers must be from 1 to 15$"),
        ("multipliers", bytes_of(TABLE_MULTIPLIERS, 16), ": multipliers must be from 1 to 15$"),
        ("multipliers", bytes_of((3, 2, 16), 1), r": multipliers are uint8\[3, 2, 16\]; "
         r"a 48 x 32 int4 matrix needs uint8\[3, 1, 16\]$"),
        ("multipliers", np.ones(TABLE_MULTIPLIERS, np.float32), r": multipliers are float32\["),
        ("int4", bytes_of((3, 3, 64)), r": codes are uint8\[3, 3, 64\]; "
         r"a 48 x 32 int4 matrix needs uint8\[3, 4, 64\]$"),
        ("scale", np.ones(32, np.float32), ": scales must be one float32 or 48, one a row; got "),
        ("scale", np.full(48, np.nan, np.float32), ": .*not finite"),
        ("int8", bytes_of(packed_shape("int8", 48, 32)), r" has no place for: \w+\.int8$"),
        ("ternary2", bytes_of(UP_CODES), " cannot be ternary2; linear layers are packed as "),
    ],
)  # fmt: skip
def test_tensors_of_packed_tables(tables_file, table, name, value, message):
    tensors = safetensors.numpy.load_file(tables_file)
    rewritten(tables_file, tensors=change(tensors, f"{table}.{name}", value))
    message = message if "place for" in message else f"{table}{message}"
    refuses(tables_file, message)
    refuses_unchecked(tables_file, message)


@pytest.mark.parametrize("layout", ["int8", "int4"])
def test_a_linear_layer_is_not_packed_as_a_table(packed_file, layout):
    tensors = safetensors.numpy.load_file(packed_file)
    codes = {f"{UP}.{layout}": bytes_of(packed_shape(layout, 48, 32))}
    rewritten(packed_file, tensors=change(tensors, f"{UP}.ternary2") | codes)
    refuses(packed_file, f"weight cannot be {layout}; linear layers are packed as ternary, ")


@pytest.mark.parametrize("place", range(4))
def test_a_single_code_3_is_found_wherever_it_is(packed_file, place):
    tensors = safetensors.numpy.load_file(packed_file)
    codes = tensors[f"{UP}.ternary2"].copy()
    codes[-1, -1, -1] |= 3 << (2 * place)
    rewritten(packed_file, tensors=change(tensors, f"{UP}.ternary2", codes))
    refuses(packed_file, r"blocks\.0\.ffn\.gate_up\.weight: holds the code 3")


@pytest.mark.parametrize("value", [243, 255])
def test_a_single_byte_above_242_is_found(tables_file, value):
    tensors = safetensors.numpy.load_file(tables_file)
    codes = tensors[f"{UP}.ternary1.6"].copy()
    codes[-1, -1, -1] = value
    rewritten(tables_file, tensors=change(tensors, f"{UP}.ternary1.6", codes))
    refuses(tables_file, r"gate_up\.weight: holds a byte above 242, which stands for no five")


def test_a_single_int8_code_0_is_found(tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(path, pack_model(one_block(), tables="int8"))
    tensors = safetensors.numpy.load_file(path)
    codes = tensors["embedding.int8"].copy()
    codes[-1, -1, -1] = 0
    rewritten(path, tensors=change(tensors, "embedding.int8", codes))
    refuses(path, r"embedding: holds the code 0, which stands for no weight$")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_unchecked_bytes_give_wrong_numbers_and_never_more(tmp_path, form, impl):
    path = tmp_path / "model.safetensors"
    save_model(path, pack_model(one_block(), *FORMS[form]))
    np.testing.assert_array_equal(
        forward(load_model(path, impl=impl)), forward(load_model(path, impl=impl, check=False))
    )
    tensors = safetensors.numpy.load_file(path)
    for name, array in tensors.items():
        if array.dtype == np.uint8 and not name.endswith(".multipliers"):
            tensors[name] = np.full_like(array, 0 if name.endswith("int8") else 255)
    rewritten(path, tensors=tensors)
    logits = np.asarray(forward(load_model(path, impl=impl, check=False)))
    assert logits.shape == (1, 8, 256)
    assert np.isfinite(logits).all()


def test_a_table_of_one_scale_and_a_layer_of_one_scale_load(tables_file):
    """A scale is one number or one a row, whatever the matrix."""
    tensors = safetensors.numpy.load_file(tables_file)
    names = ("embedding.scale", f"{UP}.scale")
    rewritten(tables_file, tensors=tensors | {n: np.array(0.5, np.float32) for n in names})
    one = np.asarray(forward(load_model(tables_file)))
    same = {n: np.full(48, 0.5, np.float32) for n in names}
    rewritten(tables_file, tensors=tensors | same)
    np.testing.assert_array_equal(one, forward(load_model(tables_file)))


def test_a_renamed_tensor(packed_file):
    tensors = safetensors.numpy.load_file(packed_file)
    tensors["norm.scales"] = tensors.pop("norm.scale")
    rewritten(packed_file, tensors=tensors)
    refuses(packed_file, r"norm\.scale is missing$")


@pytest.mark.parametrize("change", [{"weights": "float"}, {"float_layers": ["*.qkv"]}])
def test_float_layers_are_not_packed(packed_file, change):
    rewritten(packed_file, config=change)
    refuses(packed_file, r"blocks\.0\.attention\.qkv is packed; its configuration has it in float")


def test_float_layers_that_are_none(packed_file):
    rewritten(packed_file, config={"float_layers": ["*.q"]})
    refuses(packed_file, r"model\.safetensors: no linear layer matches '\*\.q'")


def test_names_that_are_not_printable(packed_file):
    rewritten(packed_file, tensors=safetensors.numpy.load_file(packed_file) | {"a\nb\x1b": LINE})
    refuses(packed_file, r"the tensor name 'a\\nb\\x1b' is not printable")


def test_a_setting_that_wants_other_tensors(packed_file):
    rewritten(packed_file, config={"tie_embeddings": False})
    refuses(packed_file, "head is missing$")
    rewritten(packed_file, config={"tie_embeddings": True, "sub_norm": False})
    refuses(packed_file, r"has no place for: blocks\.0\.attention\.sub_norm\.scale, ")


@pytest.fixture
def screened_file(tmp_path):
    path = tmp_path / "screened.safetensors"
    save_model(path, pack_model(one_block(tie_embeddings=False), "ternary2", "screened"))
    return path


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("screen.int4", None, "no place for: screen"),
        ("screen.dither", None, r"screen\.dither is missing"),
        ("screen.norms", np.ones(255, np.float32), r"screen\.norms is float32\[255\]; a 256 x 32"),
        ("screen.spreads", np.ones(256, np.float64), "known are|is float64"),
        ("screen.dither", np.full(32, np.nan, np.float32), "needs finite float32"),
        ("screen.scale", np.ones((), np.float32), r"screen\.scale must have 256 values"),
        ("screen.multipliers", np.zeros((16, 2, 16), np.uint8), "multipliers must be from 1"),
        ("screen.int4", np.zeros((16, 4, 64), np.uint8), r"screen: codes are uint8\[16, 4, 64\]"),
        ("head", np.ones((256, 32), np.float32), "screen needs a bfloat16 head"),
    ],
)
def test_damaged_screens_are_refused(screened_file, name, value, message):
    tensors = safetensors.numpy.load_file(screened_file)
    with safetensors.safe_open(screened_file, framework="numpy") as file:
        metadata = file.metadata()
    del tensors[name]
    if value is not None:
        tensors[name] = value
    safetensors.numpy.save_file(tensors, screened_file, metadata)
    with pytest.raises(ValueError, match=message):
        load_model(screened_file)
