"""Mutated GGUF files: whatever the bytes, a file is read or refused with a ValueError.

`seeds()` gives small valid files that between them have every tensor type and metadata type,
`mutated(raw, seed)` one damaged copy, and `outcome(path)` reads all there is to read of a file.

    python tests/gguf_fuzz.py COUNT [FIRST_SEED]    prints failures and the slowest file
"""

import random
import struct
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from gguf_files import (
    ARRAY,
    BOOL,
    F32,
    STRING,
    U8,
    U32,
    U64,
    entry,
    model_file,
    model_shapes,
    model_tensors,
)  # fmt: skip

from bitjax.interop.checkpoint import tensor_shapes
from bitjax.interop.gguf import blocks, read_gguf

# Numbers that counts, sizes, offsets and types are replaced by.
NASTY = (
    0,
    1,
    2,
    3,
    7,
    8,
    9,
    31,
    36,
    255,
    *(2**n - k for n in (16, 31, 32, 62, 63, 64) for k in (0, 1)),
)
SIZES = {"D": 256, "F": 256, "H": 256, "G": 128, "blocks": 1}
SETTINGS = {"embedding_length": 256, "feed_forward_length": 256, "block_count": 1}


def tokenizer_entries():
    """A byte-level vocabulary of 5 tokens, and a value of every other type."""
    return [
        entry("tokenizer.ggml.model", STRING, "gpt2"),
        entry("tokenizer.ggml.pre", STRING, "gpt-2"),
        entry("tokenizer.ggml.tokens", ARRAY, (STRING, ["a", "b", "ab", "<s>", "</s>"])),
        entry("tokenizer.ggml.token_type", ARRAY, (U32, [1, 1, 1, 3, 3])),
        entry("tokenizer.ggml.merges", ARRAY, (STRING, ["a b"])),
        entry("tokenizer.ggml.bos_token_id", U32, 3),
        entry("tokenizer.ggml.eos_token_id", U32, 4),
        entry("tokenizer.ggml.add_bos_token", BOOL, True),
        entry("tokenizer.chat_template", STRING, "{{ messages[0].content }}"),
        entry("x.bytes", ARRAY, (U8, [1, 2, 3])),
        entry("x.floats", ARRAY, (F32, [0.5])),
        entry("x.large", U64, 2**40),
    ]


def seeds():
    """Valid files of at most a few hundred KB."""
    rng = np.random.default_rng(0)
    files = [model_file(entries=tokenizer_entries()), model_file("bitnet")]
    factors = {"rope_freqs.weight": np.ones(2, np.float32)}
    files.append(model_file(tensors=model_tensors(head=True) | factors))
    names = [
        name for name, shape in model_shapes("bitnet-b1.58", **SIZES).items()
        if len(shape) == 2 and name.startswith("blk")
    ]  # fmt: skip
    floats = [kind for name, kind in blocks.BY_NAME.items() if name not in ("F32", *blocks.TERNARY)]
    forms = [floats[:7], [*floats[7:], floats[7], floats[7]]]
    forms += [[blocks.BY_NAME[name]] * 7 for name in blocks.TERNARY]
    for form in forms:  # a type for each matrix of a block
        stored = {}
        for name, kind in zip(names, form, strict=True):
            shape = model_shapes("bitnet-b1.58", **SIZES)[name]
            raw = np.zeros(blocks.nbytes(kind, shape), np.uint8)
            if kind.name == "I2_S":
                raw = blocks.encode_i2s(rng.integers(-1, 2, shape, np.int8), 0.5)
            stored[name] = kind.number, raw.tobytes()
        group = [entry("bitjax.i2s_group", U32, 128)]
        tensors = model_tensors("bitnet-b1.58", **SIZES)
        files.append(
            model_file("bitnet-b1.58", tensors=tensors, stored=stored, entries=group, **SETTINGS)
        )
    return files


def mutated(raw, seed):
    """A damaged copy of a file: a few of its first bytes mostly, for they decide the most."""
    rng = random.Random(seed)
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        end = len(data) if rng.random() < 0.1 else min(len(data), 3000)
        at = rng.randrange(max(1, end))
        kind = rng.randrange(7)
        if kind == 0:
            data[at : at + 1] = bytes([data[at] ^ 1 << rng.randrange(8)]) if data else b""
        elif kind == 1:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 2:
            data[at : at + 4] = struct.pack("<I", rng.choice(NASTY) % 2**32)
        elif kind == 3:
            data[at : at + 8] = struct.pack("<Q", rng.choice(NASTY) % 2**64)
        elif kind == 4:
            del data[at : at + rng.choice((1, 4, 8, 64, 4096))]
        elif kind == 5:
            copied = data[at : at + rng.choice((1, 8, 64, 512))]
            place = rng.randrange(len(data) + 1)
            data[place:place] = copied
        else:
            del data[at:]
        if not data:
            break
    return bytes(data)


def outcome(path):
    """What reading everything of a file comes to: "read", or the message of its ValueError."""
    try:
        checkpoint = read_gguf(path)
        for name, shape in tensor_shapes(checkpoint.config).items():
            value = checkpoint.read(name)
            assert tuple(value.shape) == shape, name
    except ValueError as error:
        if str(path) not in str(error):
            raise AssertionError(f"no file named: {error}") from error
        return str(error)
    return "read"


def main():
    """Run COUNT mutations from FIRST_SEED on."""
    count, first = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    files, slowest, read = seeds(), (0.0, 0), 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mutated.gguf"
        for seed in range(first, first + count):
            path.write_bytes(mutated(files[seed % len(files)], seed))
            start = time.perf_counter()
            try:
                read += outcome(path) == "read"
            except BaseException as error:
                print(f"seed {seed}: {type(error).__name__}: {error}")
                raise
            slowest = max(slowest, (time.perf_counter() - start, seed))
    print(f"{count} files: {read} read, the others refused; slowest {slowest[0]:.3f} s, "
          f"seed {slowest[1]}")  # fmt: skip


if __name__ == "__main__":
    main()
