"""What `bitjax inspect` counts: codes, scales, bits and zeros of every matrix, in every format."""

import numpy as np
import oracle
import pytest
from tiny import tiny_model

from bitjax.infer import pack_model
from bitjax.inspection import inspect, matrices, summary
from bitjax.interop.formats import format_of, open_checkpoint
from bitjax.interop.gguf import write_gguf
from bitjax.interop.huggingface import write_huggingface
from bitjax.interop.model_file import checkpoint_of
from bitjax.interop.stored import contents
from bitjax.model.files import save_model

NAMES = [
    f"blocks.0.{name}" for name in
    ("attention.q", "attention.k", "attention.v", "attention.o", "ffn.gate", "ffn.up", "ffn.down")
]  # fmt: skip
# Rows of 256, as TQ2_0 needs them, and heads of hidden_size / num_heads.
SHAPE = {
    "num_layers": 1, "hidden_size": 256, "intermediate_size": 256, "num_heads": 4,
    "num_kv_heads": 2, "head_dim": 64, "activation": "silu", "sub_norm": False,
}  # fmt: skip
WEIGHTS = 5 * 256 * 256 + 2 * 128 * 256


def wanted(model):
    """Name, shape, counts of -1, 0 and +1, and scale of each matrix, by the oracle."""
    attention, ffn = model.blocks[0].attention, model.blocks[0].ffn
    H, G, F = (sum(attention.qkv.segments[:n]) for n in (1, 2, 0))
    F = ffn.gate_up.segments[0]
    parts = [
        *np.split(np.asarray(attention.qkv.weight[...]), [H, G]),
        np.asarray(attention.o.weight[...]),
        *np.split(np.asarray(ffn.gate_up.weight[...]), [F]),
        np.asarray(ffn.down.weight[...]),
    ]
    for name, w in zip(NAMES, parts, strict=True):
        codes, scale = oracle.absmean_ternary(w)
        yield name, w.shape, tuple(int((codes == c).sum()) for c in (-1, 0, 1)), scale


@pytest.fixture(scope="module")
def model():
    return tiny_model(**SHAPE)


def write(model, form, folder):
    path = folder / form
    if form == "float":
        save_model(path, model)
    elif form.startswith("ternary"):
        save_model(path, pack_model(model, form))
    elif form in ("packed", "bfloat16"):
        write_huggingface(path, checkpoint_of(model), form)
    else:
        write_gguf(path, checkpoint_of(model), form)
    return path


# Number format and bits of a weight in files: scales come to it.
FORMS = {
    "float": ("F32", 32),
    "ternary2": ("ternary2", 2),
    "ternary1.6": ("ternary1.6", 13 * 64 * 8 / (16 * 256)),  # 13 blocks of 20 columns for 256
    "packed": ("U8", 2),
    "bfloat16": ("BF16", 16),
    "TQ2_0": ("TQ2_0", 2.0625),
    "TQ1_0": ("TQ1_0", 1.6875),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_format(model, form, tmp_path, capsys):
    path = write(model, form, tmp_path)
    checkpoint = open_checkpoint(path)
    held = contents(path, format_of(path), checkpoint.config)
    rows = list(matrices(checkpoint, held))
    for row, (name, shape, counts, scale) in zip(rows, wanted(model), strict=True):
        assert (row.name, row.shape, row.held) == (name, shape, FORMS[form][0])
        # Master weights rounded to bfloat16 may fall on the other side of a threshold.
        np.testing.assert_allclose(row.counts, counts, atol=0 if form != "bfloat16" else 200)
        assert sum(row.counts) == shape[0] * shape[1]
        np.testing.assert_allclose(row.scales, [scale], rtol=2e-3 if form[0] in "Tb" else 1e-6)
    assert f"{WEIGHTS:,} weights" in summary(rows, held)
    bits = float(summary(rows, held).split(" bits each")[0].split()[-1])
    assert bits == pytest.approx(FORMS[form][1], abs=0.2 if "ternary" in form else 0.006)
    zeros = sum(counts[1] for _, _, counts, _ in wanted(model)) / WEIGHTS
    assert float(summary(rows, held).split("%")[0].split()[-1]) == pytest.approx(
        100 * zeros, abs=0.06 if form != "bfloat16" else 1
    )
    inspect(path)
    out = capsys.readouterr().out
    assert "hidden_size" in out
    assert FORMS[form][0] in out
    assert summary(rows, held) in out
    assert len(held.tensors) == len({tensor.name for tensor in held.tensors})


def test_a_full_precision_model_and_float_layers(tmp_path):
    for changes in ({"weights": "float", "activations": "float"}, {"float_layers": ("*",)}):
        rows = list(matrices(checkpoint_of(tiny_model(num_layers=1, **changes)), None))
        assert [row.name for row in rows] == NAMES
        assert {(row.counts, row.scales) for row in rows} == {(None, ())}
        assert summary(rows, None) == "linear layers: 4,608 weights"


def test_scales_of_rows_are_a_range(tmp_path, capsys):
    model = pack_model(tiny_model(num_layers=1))
    layer = model.blocks[0].attention.o
    packed = layer.weight.get_value()
    scales = np.linspace(1, 2, packed.rows, dtype=np.float32)
    layer.weight.set_value(type(packed)(packed.codes, scales, None, *packed.shape, packed.layout))
    save_model(tmp_path / "m", model)
    inspect(tmp_path / "m")
    assert "1..2" in capsys.readouterr().out


def test_blocks_that_are_alike_are_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    model = tiny_model(num_layers=3, float_layers=("blocks.1.ffn.down",))
    save_model(tmp_path / "m", pack_model(model))
    inspect(tmp_path / "m")
    lines = [line.split("│") for line in capsys.readouterr().out.splitlines()]
    rows = [[cell.strip() for cell in cells[1:-1]] for cells in lines if len(cells) > 3]
    (q,) = (row for row in rows if row[0] == "attention.q")
    counts = np.zeros(3)
    scales = []
    for block in model.blocks:
        w = np.asarray(block.attention.qkv.weight[...])[: q_rows(model)]
        codes, scale = oracle.absmean_ternary(w)
        counts += [(codes == c).sum() for c in (-1, 0, 1)]
        scales.append(scale)
    shares = " ".join(f"{100 * count / counts.sum():4.1f}" for count in counts)
    shape = f"{q_rows(model)}x32"
    assert q[1:] == ["3", shape, "ternary2", shares, f"{min(scales):.2g}..{max(scales):.2g}"]
    # A float layer is no part of the line of the ternary ones.
    assert [row[1:5:2] for row in rows if row[0] == "ffn.down"] == [["2", "ternary2"], ["1", "F32"]]
    assert ["*.ffn.gate_up.weight.ternary2", "3", "U8"] in [row[:3] for row in rows]
    inspect(tmp_path / "m", every=True)
    out = capsys.readouterr().out
    for name in ("blocks.2.attention.q", "blocks.1.ffn.gate_up.weight.ternary2"):
        assert name in out


def q_rows(model):
    return model.blocks[0].attention.qkv.segments[0]
