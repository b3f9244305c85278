"""Small valid GGUF files that between them have every tensor type and metadata type."""

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

from bitjax.interop.gguf import blocks

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
