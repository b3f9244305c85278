"""Model files of random weights, decoded here digit by digit, as the format says."""

import json
import os
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import packing_oracle
import pytest
from tiny import tiny_config

from bitjax.infer import dummy
from bitjax.infer.convert import make_screen
from bitjax.infer.dummy import write_dummy
from bitjax.model import bit_linears
from bitjax.model.files import load_model
from bitjax.packing import PackedWeights

LAYOUTS = ["ternary2", "ternary1.6"]
TABLES = ["float32", "bfloat16", "int8", "int4"]
PAIRS = [("ternary2", "int8"), ("ternary1.6", "int4")]  # each form of codes once
# No dimension is a multiple of the 16 rows or the 16, 20, 32 or 4 columns of a block or a group;
# matrices of less than a block of columns (o has 18), and of one and more.
ODD = tiny_config(
    vocab_size=53, hidden_size=45, intermediate_size=37, num_heads=3, num_kv_heads=1, head_dim=6,
    tie_embeddings=False,
)  # fmt: skip
# 32 to 96 thousand weights in a matrix, not in whole blocks either.
WIDE = tiny_config(
    vocab_size=301, hidden_size=270, intermediate_size=150, num_layers=1, num_heads=9,
    num_kv_heads=3, head_dim=14, tie_embeddings=False,
)  # fmt: skip
# All in whole blocks: 128 KiB to 2 MiB a table.
LARGE = tiny_config(
    vocab_size=2048, hidden_size=320, intermediate_size=640, num_heads=4, num_kv_heads=4,
    head_dim=80,
)  # fmt: skip


def matrices(config):
    """Rows and columns of everything that is packed, by name."""
    D, F, h = config.hidden_size, config.intermediate_size, config.head_dim
    H, G = config.num_heads, config.num_kv_heads
    shapes = {"embedding": (config.vocab_size, D)}
    if not config.tie_embeddings:
        shapes["head"] = (config.vocab_size, D)
    for i in range(config.num_layers):
        shapes[f"blocks.{i}.attention.qkv.weight"] = ((H + 2 * G) * h, D)
        shapes[f"blocks.{i}.attention.o.weight"] = (D, H * h)
        shapes[f"blocks.{i}.ffn.gate_up.weight"] = (2 * F, D)
        shapes[f"blocks.{i}.ffn.down.weight"] = (D, F)
    return shapes


def read(path):
    """Raw bytes and shape of every tensor, and where the data starts."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    del header["__metadata__"]
    tensors = {}
    for name, entry in header.items():
        first, last = (start + offset for offset in entry["data_offsets"])
        tensors[name] = np.frombuffer(data[first:last], np.uint8), entry["shape"]
    return tensors, start


def decoded(tensors, name, layout):
    """Weights without scale and multipliers, padding included: `[16 NB, 4 * planes * KB]`."""
    raw, (row_blocks, col_blocks, _) = tensors[f"{name}.{layout}"]
    codes = raw.reshape(row_blocks, col_blocks, 16, 4).astype(int)
    base, planes = packing_oracle.BASE[layout], packing_oracle.PLANES[layout]
    digits = np.stack([codes // base**s % base for s in range(planes)], axis=3)
    w = digits.transpose(0, 2, 1, 3, 4).reshape(16 * row_blocks, 4 * planes * col_blocks)
    return w - packing_oracle.OFFSET[layout]


def packed_matrices(config, layout, tables):
    """(name, rows, cols, layout) of each matrix with codes."""
    for name, (rows, cols) in matrices(config).items():
        if name.endswith(".weight"):
            yield name, rows, cols, layout
        elif tables in ("int8", "int4"):
            yield name, rows, cols, tables


@pytest.mark.parametrize("tables", TABLES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tied", [False, True])
def test_loads_with_full_validation(tmp_path, layout, tables, tied):
    config = tiny_config(**{**vars(ODD), "tie_embeddings": tied})
    path = tmp_path / "model.safetensors"
    write_dummy(path, config, layout, tables)
    model = load_model(path)
    assert model.config == config
    qkv = model.blocks[0].attention.qkv.weight.get_value()
    assert (qkv.layout, qkv.shape) == (layout, (30, 45))
    table = model.embedding.get_value()
    if tables in ("int8", "int4"):
        assert isinstance(table, PackedWeights)
        assert (table.layout, table.shape) == (tables, (53, 45))
    else:
        assert (table.dtype, table.shape) == (jnp.dtype(tables), (53, 45))
    assert (model.head is None) == tied
    np.testing.assert_array_equal(model.norm.scale.get_value(), np.ones(45))


def test_layers_of_another_layout(tmp_path):
    path = tmp_path / "model.safetensors"
    write_dummy(path, ODD, "ternary1.6", layer_layouts=[("*.ffn.down", "ternary2")])
    got = {name: w.weight.get_value().layout for name, w in bit_linears(load_model(path))}
    assert set(got.values()) == {"ternary1.6", "ternary2"}
    assert all((layout == "ternary2") == name.endswith("ffn.down") for name, layout in got.items())
    with pytest.raises(ValueError, match=r"^no linear layer matches 'down'"):
        write_dummy(tmp_path / "none", ODD, layer_layouts=[("down", "ternary2")])
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("config", [ODD, WIDE, LARGE], ids=["odd", "wide", "large"])
@pytest.mark.parametrize(("layout", "tables"), PAIRS)
def test_padding_is_weight_zero(tmp_path, config, layout, tables):
    path = tmp_path / "model.safetensors"
    write_dummy(path, config, layout, tables)
    tensors, _ = read(path)
    for name, rows, cols, form in packed_matrices(config, layout, tables):
        full = decoded(tensors, name, form)
        assert not full[rows:].any(), name
        assert not full[:, cols:].any(), name
        # The last row and the last column are weights: 18 or more of them, all zero by a chance of
        # 3^-18 at most.
        assert full[rows - 1].any(), name
        assert full[:rows, cols - 1].any(), name


@pytest.mark.parametrize(("layout", "tables"), PAIRS)
def test_weights_are_uniform(tmp_path, layout, tables):
    """Each value appears n/v times of n, give or take 6 standard deviations of a binomial count.

    One count is beyond that by a chance of 2e-9; there are some thousand. Counted apart for each
    plane of the bytes, and for what lies in whole blocks and what does not.
    """
    path = tmp_path / "model.safetensors"
    write_dummy(path, WIDE, layout, tables)
    tensors, _ = read(path)
    for name, rows, cols, form in packed_matrices(WIDE, layout, tables):
        low, high = packing_oracle.RANGE[form]
        planes = packing_oracle.PLANES[form]
        w = decoded(tensors, name, form)[:rows, :cols]
        plane_of_col = np.arange(cols) // 4 % planes
        parts = {f"plane {s}": w[:, plane_of_col == s] for s in range(planes)}
        whole = cols // (4 * planes) * 4 * planes
        parts |= {"last columns": w[:, whole:], "last rows": w[rows // 16 * 16 :]}
        for part, values in parts.items():
            assert values.size > 0 or (part == "last columns" and cols % (4 * planes) == 0)
            chance = 1 / (high - low + 1)
            spread = np.sqrt(values.size * chance * (1 - chance))
            counts = np.bincount((values - low).ravel(), minlength=high - low + 1)
            assert len(counts) == high - low + 1, (name, part)
            # A count of a rare event is beyond its binomial spread more often: 9 for Poisson.
            assert (np.abs(counts - values.size * chance) <= 6 * spread + 9).all(), (name, part)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_independent(tmp_path, layout):
    """Products of neighbours, and of rows 16 apart, are as often 1 as -1: sums of n vary by n^.5.

    A product is 0 or, by 4 chances of 9, -1 or 1: its variance is 4/9. Six standard deviations.
    """
    path = tmp_path / "model.safetensors"
    write_dummy(path, WIDE, layout)
    tensors, _ = read(path)
    for name, rows, cols, form in packed_matrices(WIDE, layout, "float32"):
        w = decoded(tensors, name, form)[:rows, :cols]
        for down, right in [(0, 1), (0, 4), (0, 16), (0, 20), (1, 0), (16, 0)]:
            products = w[down:, right:] * w[: rows - down, : cols - right]
            limit = 6 * np.sqrt(products.size * 4 / 9)
            assert abs(products.sum()) <= limit, (name, down, right)


@pytest.mark.parametrize("tables", TABLES)
def test_scales(tmp_path, tables):
    """Linear layers keep the variance of their inputs; tables have a standard deviation of 0.02."""
    path = tmp_path / "model.safetensors"
    write_dummy(path, WIDE, "ternary2", tables)
    tensors, _ = read(path)
    for name, (rows, cols) in matrices(WIDE).items():
        if name.endswith(".weight"):
            scale = tensors[f"{name}.scale"][0].view(np.float32)
            assert scale.shape == (rows,)
            # Ternary digits with equal chances have the variance 2/3.
            np.testing.assert_allclose(scale**2 * cols * 2 / 3, 1, rtol=1e-6)
            continue
        if tables in ("int8", "int4"):
            w = decoded(tensors, name, tables)[:rows, :cols].astype(float)
            if tables == "int4":
                raw, (row_blocks, groups, _) = tensors[f"{name}.multipliers"]
                assert (row_blocks, groups) == (-(-rows // 16), -(-cols // 32))
                multipliers = raw.reshape(row_blocks, groups, 16).transpose(0, 2, 1)
                multipliers = multipliers.reshape(-1, groups)[:rows]
                w *= np.repeat(multipliers, 32, axis=1)[:, :cols]
            w *= tensors[f"{name}.scale"][0].view(np.float32)[:, None]
        else:
            dtype = np.float32 if tables == "float32" else packing_oracle.BF16
            w = tensors[name][0].view(dtype).reshape(rows, cols).astype(float)
        # A standard deviation is known to 1/sqrt(2n) of itself (less for uniform codes): four of
        # these, and 0.5 % because neither the spread of int8 codes nor of int4's is exact.
        assert w.std() == pytest.approx(0.02, rel=4 / np.sqrt(2 * w.size) + 0.005)


def test_a_loaded_model_runs(tmp_path):
    path = tmp_path / "model.safetensors"
    write_dummy(path, ODD, "ternary1.6", "int4")
    logits = load_model(path)(jnp.arange(6).reshape(2, 3))
    assert logits.shape == (2, 3, 53)
    assert np.isfinite(logits).all()
    assert np.std(logits) > 0


# ---- determinism ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "tables"), list(zip(LAYOUTS * 2, TABLES, strict=True)))
def test_a_seed_gives_the_same_bytes(tmp_path, layout, tables):
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path, seed in zip(paths, (5, 5, 6), strict=True):
        write_dummy(path, ODD, layout, tables, seed)
    same, again, other = (path.read_bytes() for path in paths)
    assert same == again
    assert len(same) == len(other)
    assert same != other


def test_no_two_matrices_are_alike(tmp_path):
    """Of the same shape, or in files of neighbouring seeds."""
    codes = []
    for seed in range(3):
        path = tmp_path / f"{seed}"
        write_dummy(path, ODD, "ternary2", "int8", seed)
        codes += [
            raw[:64].tobytes()  # of the first block
            for name, (raw, _) in read(path)[0].items()
            if name.endswith((".ternary2", ".int8"))
        ]
    assert len(codes) == 3 * (4 * ODD.num_layers + 2)
    assert len(set(codes)) == len(codes)


# ---- size, progress, memory ----------------------------------------------------------------------


def predicted_bytes(config, layout, tables):
    """Of the data of a file, from the format's text."""
    total = 0
    for name, (rows, cols) in matrices(config).items():
        form = layout if name.endswith(".weight") else tables
        row_blocks = -(-rows // 16)
        total += {
            "ternary2": row_blocks * -(-cols // 16) * 64 + 4 * rows,
            "ternary1.6": row_blocks * -(-cols // 20) * 64 + 4 * rows,
            "int8": row_blocks * -(-cols // 4) * 64 + 4 * rows,
            "int4": row_blocks * -(-cols // 32) * (4 * 64 + 16) + 4 * rows,
            "float32": rows * cols * 4,
            "bfloat16": rows * cols * 2,
        }[form]
    D, F = config.hidden_size, config.intermediate_size
    norms = 2 * D + config.num_heads * config.head_dim + F
    return total + 4 * (config.num_layers * norms + D)


@pytest.mark.parametrize("tables", TABLES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_on_disk_and_progress(tmp_path, monkeypatch, layout, tables):
    monkeypatch.setattr(dummy, "PART_BYTES", 2**10)  # many parts
    path = tmp_path / "model.safetensors"
    calls = []
    write_dummy(path, WIDE, layout, tables, on_bytes=lambda *call: calls.append(call))
    predicted = predicted_bytes(WIDE, layout, tables)
    assert path.stat().st_size - read(path)[1] == predicted
    done = [done for done, _ in calls]
    assert {total for _, total in calls} == {predicted}
    assert done[0] > 0
    assert (np.diff(done) > 0).all()
    assert done[-1] == predicted
    assert len(calls) > 50


@pytest.mark.parametrize("tables", TABLES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_are_bounded(tmp_path, monkeypatch, layout, tables):
    """A part is a row block (16 rows), or more within PART_BYTES."""
    monkeypatch.setattr(dummy, "PART_BYTES", 2**13)
    written = []
    monkeypatch.setattr(dummy, "write_model_file", lambda *about: written.extend(about[2]))
    write_dummy(tmp_path / "model.safetensors", WIDE, layout, tables)
    for tensor in written:
        parts = list(tensor.parts())
        rows = 1 if tensor.dtype == np.uint8 else 16  # of codes, a row of the array is a block
        unit = rows * np.prod(tensor.shape[1:], dtype=int) * parts[0].itemsize
        if tensor.name.endswith((".scale", ".multipliers")):
            assert sum(part.nbytes for part in parts) == tensor.nbytes
            continue
        joined = np.concatenate(parts)
        assert joined.shape == tensor.shape, tensor.name
        whole = 2 * 2**13 if tensor.dtype == packing_oracle.BF16 else 2**13
        assert max(part.nbytes for part in parts) <= max(whole, unit), tensor.name
        if tensor.nbytes > 2**14:
            assert len(parts) > 1, tensor.name


@pytest.mark.parametrize("tables", TABLES)
def test_memory_does_not_grow_with_the_model(tmp_path, monkeypatch, tables):
    """Some copies of a part, not of a table: the tables' share of the file is 10 to 40 parts."""
    part = 2**16
    monkeypatch.setattr(dummy, "PART_BYTES", part)
    path = tmp_path / "model.safetensors"
    write_dummy(path, LARGE, "ternary2", tables)  # what is loaded and cached once
    tracemalloc.start()
    try:
        write_dummy(path, LARGE, "ternary2", tables)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    size = path.stat().st_size
    # A part, what it was made from, the one before; the scales, the norms, and the abstract model.
    assert peak <= 6 * part + 2**18
    assert size >= 10 * part


# ---- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [None, b"an older file"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_write_leaves_no_file(tmp_path, error, share, before):
    path = tmp_path / "model.safetensors"
    if before is not None:
        path.write_bytes(before)

    def on_bytes(done, total):
        if done >= share * total:
            raise error

    expected = KeyboardInterrupt if error is KeyboardInterrupt else ValueError
    with pytest.raises(expected):
        write_dummy(path, ODD, on_bytes=on_bytes)
    if before is None:
        assert os.listdir(tmp_path) == []
    else:
        assert os.listdir(tmp_path) == [path.name]
        assert path.read_bytes() == before


def test_a_file_is_replaced(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"an older file")
    write_dummy(path, ODD)
    assert os.listdir(tmp_path) == [path.name]
    assert load_model(path).config == ODD


def test_a_place_that_cannot_be_written_is_an_error(tmp_path):
    path = tmp_path / "nowhere" / "model.safetensors"
    with pytest.raises(ValueError, match=r"cannot write .*nowhere.*No such file or directory"):
        write_dummy(path, ODD)


@pytest.mark.parametrize("config", [ODD, LARGE], ids=["untied", "tied"])
def test_the_screen_is_that_of_the_head(tmp_path, config):
    write_dummy(tmp_path / "a", config, "ternary2", "screened")
    model = load_model(tmp_path / "a")
    table = np.asarray((model.embedding if model.head is None else model.head).get_value())
    assert table.dtype == jnp.bfloat16
    wanted = make_screen(table[i : i + 512] for i in range(0, len(table), 512))
    for got, leaf in zip(jax.tree.leaves(model.screen.get_value()), jax.tree.leaves(wanted),
                         strict=True):  # fmt: skip
        np.testing.assert_array_equal(got, leaf)


@pytest.mark.parametrize(("tables", "dtype"), [("float32", "float32"), ("int4", "bfloat16")])
def test_layers_that_stay_float(tmp_path, tables, dtype):
    config = tiny_config(**{**vars(ODD), "float_layers": ("*.o",), "linear_norm_eps": 1e-6})
    path = tmp_path / "model.safetensors"
    write_dummy(path, config, tables=tables)
    model = load_model(path)
    for name, layer in bit_linears(model):
        weight = layer.weight.get_value()
        assert isinstance(weight, PackedWeights) != name.endswith(".o"), name
        if name.endswith(".o"):
            assert weight.dtype == dtype
            assert 0 < np.std(np.asarray(weight, np.float32)) < 0.04
    assert np.isfinite(model(jnp.arange(4)[None])).all()
