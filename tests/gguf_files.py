"""GGUF files byte by byte, well-formed or not, made without bitjax."""

import struct

import numpy as np

U8, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10
FORMATS = {U8: "B", U32: "I", F32: "f", BOOL: "?", U64: "Q"}
TYPE_F32 = 0


def string(text):
    """Length and bytes."""
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def entry(key, kind, value):
    """A metadata entry; arrays are (kind of items, items)."""
    return string(key) + struct.pack("<I", kind) + item(kind, value)


def item(kind, value):
    """A value without its type."""
    if kind == STRING:
        return string(value)
    if kind == ARRAY:
        inner, values = value
        head = struct.pack("<IQ", inner, len(values))
        return head + b"".join(item(inner, one) for one in values)
    return struct.pack("<" + FORMATS[kind], value)


def info(name, shape, offset, kind=TYPE_F32):
    """An entry of the tensor table; the shape slowest dimension first."""
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return string(name) + sizes + struct.pack("<IQ", kind, offset)


def assemble(entries, infos, data=b"", *, version=3, counts=None, alignment=32):
    """A file of these parts."""
    tensors, keys = counts or (len(infos), len(entries))
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join([*entries, *infos])
    return head + bytes(-len(head) % alignment) + data


# A model of architecture llama: 2 layers of 8 dimensions, 2 heads on 1, and 5 tokens.
SHAPE = {
    "vocab_size": 5, "context_length": 16, "embedding_length": 8, "block_count": 2,
    "feed_forward_length": 12, "attention.head_count": 2, "attention.head_count_kv": 1,
}  # fmt: skip


def model_shapes(architecture="llama", blocks=2, D=8, F=12, H=8, G=4, V=5, head=False):
    """Names and shapes of a model's tensors."""
    parts = {
        "attn_norm": (D,), "attn_q": (H, D), "attn_k": (G, D), "attn_v": (G, D),
        "attn_output": (D, H), "ffn_norm": (D,), "ffn_gate": (F, D), "ffn_up": (F, D),
        "ffn_down": (D, F),
    }  # fmt: skip
    if architecture != "llama":
        parts |= {"attn_sub_norm": (H,), "ffn_sub_norm": (F,)}
    names = {"token_embd.weight": (V, D), "output_norm.weight": (D,)}
    if head:
        names["output.weight"] = (V, D)
    return names | {
        f"blk.{i}.{part}.weight": shape for i in range(blocks) for part, shape in parts.items()
    }


def model_tensors(architecture="llama", seed=0, **sizes):
    """Random float32 tensors of such a model."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(0, 0.3, shape).astype(np.float32) if len(shape) > 1
        else rng.uniform(0.5, 1.5, shape).astype(np.float32)
        for name, shape in model_shapes(architecture, **sizes).items()
    }  # fmt: skip


def model_entries(architecture="llama", **changes):
    """Metadata of such a model; a change to None leaves an entry out."""
    values = SHAPE | {"attention.layer_norm_rms_epsilon": 1e-5} | changes
    kinds = {int: U32, float: F32, bool: BOOL, str: STRING, tuple: ARRAY}
    return [
        entry("general.architecture", STRING, architecture),
        *(
            entry(f"{architecture}.{key}", kinds[type(value)], value)
            for key, value in values.items()
            if value is not None
        ),
    ]


def model_file(architecture="llama", *, tensors=None, stored=None, entries=None, **changes):
    """Bytes of a model file.

    Args:
        architecture: of it.
        tensors: float32 arrays by name.
        stored: (type number, bytes) of some of them instead.
        entries: metadata entries to add.
        changes: to the architecture's metadata.
    """
    tensors = model_tensors(architecture) if tensors is None else tensors
    infos, data = [], b""
    for name, values in tensors.items():
        kind, raw = (stored or {}).get(name, (TYPE_F32, values.tobytes()))
        infos.append(info(name, values.shape, len(data), kind))
        data += raw + bytes(-len(raw) % 32)
    return assemble([*model_entries(architecture, **changes), *(entries or [])], infos, data)
