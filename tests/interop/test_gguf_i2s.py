"""The form of I2_S matrices: stated, detected where norms show it, and else asked for."""

import re

import numpy as np
import pytest
from gguf_files import U32, entry, model_file, model_shapes

from bitjax.interop.gguf import blocks, read_gguf

SIZES = {"D": 256, "F": 256, "H": 256, "G": 128}
SETTINGS = {"embedding_length": 256, "feed_forward_length": 256}
NORMS = {"attn_q": "attn_norm", "attn_k": "attn_norm", "attn_v": "attn_norm",
         "attn_output": "attn_sub_norm", "ffn_gate": "ffn_norm", "ffn_up": "ffn_norm",
         "ffn_down": "ffn_sub_norm"}  # fmt: skip


def file_of(group, *, trained, F=256, entries=None):
    """A model in I2_S. If trained, a column has the more weights the larger its norm weight."""
    rng = np.random.default_rng(3)
    shapes = model_shapes("bitnet-b1.58", **SIZES | {"F": F})
    tensors = {name: rng.uniform(0.5, 1.5, shape).astype(np.float32) for name, shape in
               shapes.items()}  # fmt: skip
    codes, stored = {}, {}
    for name, shape in shapes.items():
        _, block, part, *_ = [*name.split("."), "", ""]
        if part not in NORMS:
            continue
        norm = tensors[f"blk.{block}.{NORMS[part]}.weight"]
        share = 0.5 + 0.2 * (norm - 1) if trained else 0.5
        codes[name] = rng.choice(np.array([-1, 1], np.int8), shape) * (rng.random(shape) < share)
        stored[name] = 36, blocks.encode_i2s(codes[name].astype(np.int8), 0.5, group).tobytes()
    settings = SETTINGS | {"feed_forward_length": F}
    raw = model_file("bitnet-b1.58", tensors=tensors, stored=stored, entries=entries, **settings)
    return raw, codes


def read(tmp_path, raw, **arguments):
    path = tmp_path / "file.gguf"
    path.write_bytes(raw)
    return read_gguf(path, **arguments)


def assert_right(checkpoint, codes):
    np.testing.assert_array_equal(
        checkpoint.read("blocks.1.ffn.down").codes, codes["blk.1.ffn_down.weight"]
    )


@pytest.mark.parametrize("group", blocks.I2S_GROUPS)
def test_detected(tmp_path, group):
    raw, codes = file_of(group, trained=True)
    assert_right(read(tmp_path, raw), codes)


@pytest.mark.parametrize("group", blocks.I2S_GROUPS)
def test_asked_for(tmp_path, group):
    raw, codes = file_of(group, trained=False)
    message = "may be in groups of 128 values .* 64 .* 4 .*; nothing in the file tells which"
    with pytest.raises(ValueError, match=message):
        read(tmp_path, raw)
    assert_right(read(tmp_path, raw, i2s_group=group), codes)
    stated, codes = file_of(group, trained=False, entries=[entry("bitjax.i2s_group", U32, group)])
    assert_right(read(tmp_path, stated), codes)


def test_only_whole_groups(tmp_path):
    raw, codes = file_of(64, trained=True, F=320)  # 128 is no part of 320
    assert_right(read(tmp_path, raw), codes)
    with pytest.raises(
        ValueError, match=re.escape("of shape [256, 320] cannot be in groups of 128")
    ):
        read(tmp_path, raw, i2s_group=128)
    with pytest.raises(ValueError, match="i2s_group=32 is not one of"):
        read(tmp_path, raw, i2s_group=32)
    raw, _ = file_of(64, trained=False, entries=[entry("bitjax.i2s_group", U32, 32)])
    with pytest.raises(ValueError, match=r"bitjax.i2s_group=32 is not known"):
        read(tmp_path, raw)
