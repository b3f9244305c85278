"""Damage done to files: to their bytes, and to what the bytes mean in JSON, safetensors and GGUF.

    bytes         bits flipped, bytes set, parts cut out, cut off, repeated, put in, overwritten by
                  numbers that are 0, negative, huge, or next to a power of two
    JSON          values replaced, names repeated, doubled, removed or made huge, deep nesting
    safetensors   its header likewise, and offsets, dtypes, shapes and header length by themselves
    GGUF          counts, lengths, dimensions, types and offsets, found beside known names

Every function takes a `random.Random` and bytes and returns bytes; the same seed, the same damage.
"""

import json
import struct

# Numbers that sizes, counts, offsets and types are replaced by.
NASTY = (
    0, 1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 33, 63, 64, 65, 255, 256, 1000,
    *(2**n + k for n in (15, 16, 24, 31, 32, 40, 62, 63, 64) for k in (-1, 0, 1)),
)  # fmt: skip
VALUES = (
    None, True, False, -1, 0.5, -1e308, 1e-300, float("nan"), float("inf"), "", "F32", "U8", "I64",
    "BOOL", "F8_E5M2", "bitnet", "llama", "\x00", "\x1b[2J", "../../etc/passwd", "\ud800", [], {},
    [[]], [0], [1, 2, 3], [-1], [2**63], {"a": 1}, "x" * 10_000, 10**400, *NASTY,
)  # fmt: skip


def nasty_bytes(rng):
    """A little-endian number of 1, 2, 4 or 8 bytes."""
    size = rng.choice((1, 2, 4, 4, 8, 8))
    return (rng.choice(NASTY) % 2 ** (8 * size)).to_bytes(size, "little")


def damaged_bytes(rng, raw, head=3000):
    """A few changes, mostly among the first `head` bytes, which decide the most."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        if not data:
            break
        at = rng.randrange(len(data) if rng.random() < 0.25 else min(len(data), head))
        kind = rng.randrange(8)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.randrange(256)
        elif kind in (2, 3):
            number = nasty_bytes(rng)
            data[at : at + len(number)] = number
        elif kind == 4:
            del data[at : at + rng.choice((1, 4, 8, 64, 4096))]
        elif kind == 5:
            place = rng.randrange(len(data) + 1)
            data[place:place] = data[at : at + rng.choice((1, 8, 64, 512))]
        elif kind == 6:
            data[at:at] = rng.randbytes(rng.choice((1, 8, 64, 4096)))
        else:
            del data[at:]
    return bytes(data)


def damaged_json(rng, text):
    """JSON text with values, names or nesting changed; sometimes no JSON any more."""
    kind = rng.randrange(8)
    if kind == 0:
        return damaged_bytes(rng, text, len(text))
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return damaged_bytes(rng, text, len(text))
    if kind == 1:  # a repeated name
        items = list(value.items()) if isinstance(value, dict) and value else [("a", 1)]
        items.append((rng.choice(items)[0], rng.choice(VALUES)))
        inside = ", ".join(f"{json.dumps(str(n))}: {dumped(v)}" for n, v in items)
        return f"{{{inside}}}".encode("utf-8", "surrogatepass")
    if kind == 2:
        deep = rng.choice((100, 10_000))
        return text.replace(b":", b": " + b"[" * deep, 1)
    for _ in range(rng.choice((1, 1, 2, 5))):
        _change_value(rng, value)
    return dumped(value).encode("utf-8", "surrogatepass")


def dumped(value):
    """JSON, with NaN and the infinities as Python writes them, and numbers of any length."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**300:
        return "1" + "0" * 400
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(n))}: {dumped(v)}" for n, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dumped, value)) + "]"
    return json.dumps(value)


def _change_value(rng, value):
    """One change somewhere inside, in place."""
    while isinstance(value, dict | list) and value:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = rng.choice(keys)
        inner = value[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.8:
            value = inner
            continue
        kind = rng.randrange(6)
        if kind == 0:
            del value[key]
        elif kind == 1 and isinstance(value, dict):
            value[rng.choice(("x", "", "a" * 5000, f"{key}.", str(key)[:-1]))] = value.pop(key)
        elif kind == 2 and isinstance(value, dict):
            value[str(rng.choice(VALUES))[:50]] = rng.choice(VALUES)
        elif kind == 3 and isinstance(value, list):
            value.insert(rng.randrange(len(value) + 1), rng.choice(VALUES))
        elif kind == 4 and isinstance(inner, int) and not isinstance(inner, bool):
            value[key] = inner + rng.choice((-64, -1, 1, 64, inner))
        else:
            other = value[rng.choice(keys)] if rng.random() < 0.3 else rng.choice(VALUES)
            value[key] = json.loads(dumped(other)) if isinstance(other, dict | list) else other
        return


def damaged_safetensors(rng, raw):
    """A safetensors file with a changed header, header length or data."""
    kind = rng.randrange(12)
    if kind < 2 or len(raw) < 10:
        return damaged_bytes(rng, raw)
    if kind > 5:
        return _other_tensors(rng, raw)
    length = int.from_bytes(raw[:8], "little")
    header, data = raw[8 : 8 + length], raw[8 + length :]
    if kind == 2:
        number = rng.choice((*NASTY, length - 1, length + 1, length + 8, len(raw) - 8, len(raw)))
        return (number % 2**64).to_bytes(8, "little") + header + data
    if kind == 3 and data:  # values
        data = damaged_bytes(rng, data, len(data))
    elif kind == 4:
        header = _damaged_entries(rng, header)
    else:
        header = damaged_json(rng, header)
    return len(header).to_bytes(8, "little") + header + data


def _other_tensors(rng, raw):
    """A well-formed file with other names, dtypes, shapes, values or metadata."""
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    metadata = header.pop("__metadata__", {})
    tensors = {
        name: [entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])]]
        for name, entry in header.items()
    }
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        name = rng.choice(sorted(tensors))
        tensor = tensors[name]
        kind = rng.randrange(9)
        if kind == 0 and len(tensors) > 1:
            del tensors[name]
        elif kind == 1:
            tensors[_other_name(rng, name)] = tensors.pop(name)
        elif kind == 2:
            tensors[_other_name(rng, name)] = list(tensor)
        elif kind == 3:
            tensors[rng.choice(sorted(tensors))] = list(tensor)
        elif kind == 4:
            tensor[1] = rng.choice((tensor[1][::-1], [*tensor[1], 1], [1, *tensor[1]]))
        elif kind == 5:  # as many rows more or fewer
            rows = rng.choice((0, 1, 2, 15, 16, 17, 64))
            size = len(tensor[2]) // max(1, tensor[1][0]) if tensor[1] else 0
            tensor[1:] = [[rows, *tensor[1][1:]], (tensor[2] * (rows + 1))[: rows * size]]
        elif kind == 6:  # the same bytes, or as many, of another type
            sizes = {"F32": 4, "I32": 4, "F16": 2, "BF16": 2, "U8": 1, "I8": 1, "F64": 8, "BOOL": 1}
            other = rng.choice(sorted(sizes))
            count = len(tensor[2]) // sizes[tensor[0]]
            tensor[0], tensor[2] = other, (tensor[2] * 8)[: count * sizes[other]]
        elif kind == 7:
            nasty = b"\x00\xff\x7f\x80\x7e\x03\xf3"
            values = bytearray(tensor[2])
            for _ in range(min(len(values), rng.choice((1, 2, 8)))):
                values[rng.randrange(len(values))] = rng.choice(nasty)
            tensor[2] = bytes(values)
        elif "bitjax" in metadata:
            inner = damaged_json(rng, metadata["bitjax"].encode())
            metadata["bitjax"] = inner.decode("utf-8", "replace")
    return _file_of(tensors, metadata)


def _other_name(rng, name):
    changed = name.replace("0", rng.choice(("1", "00", "-1", "9" * 20)), 1)
    return rng.choice(
        (changed, f"{name}.scale", f"{name}.ternary2", f"{name}.columns", f"{name}_scale", "",
         name.replace("weight", "bias"), name.partition(".")[2], "x" * 10_000, "a\nb\x1b[2J")
    )  # fmt: skip


def _file_of(tensors, metadata):
    header, data = {"__metadata__": metadata}, b""
    for name, (dtype, shape, values) in tensors.items():
        header[name] = {
            "dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(values)],
        }  # fmt: skip
        data += values
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def _damaged_entries(rng, text):
    """One thing about the tensors: names exchanged, offsets, dtype, shape, or our metadata."""
    header = json.loads(text)
    metadata = header.get("__metadata__", {})
    names = [name for name in header if name != "__metadata__"]
    a, b = rng.choice(names), rng.choice(names)
    kind = rng.randrange(7)
    if kind == 0:
        header[a], header[b] = header[b], header[a]
    elif kind == 1:
        header[a]["data_offsets"] = header[b]["data_offsets"]
    elif kind == 2:
        header[a]["data_offsets"][rng.randrange(2)] = rng.choice(NASTY)
    elif kind == 3:
        header[a]["dtype"] = rng.choice(("F32", "F16", "BF16", "U8", "I8", "F64", "BOOL", "I64"))
    elif kind == 4 and header[a]["shape"]:
        shape = header[a]["shape"]
        header[a]["shape"] = rng.choice((shape[::-1], [*shape, 1], shape[1:], [0, *shape],
                                         [rng.choice(NASTY), *shape[1:]]))  # fmt: skip
    elif "bitjax" in metadata:
        inner = damaged_json(rng, metadata["bitjax"].encode())
        metadata["bitjax"] = inner.decode("utf-8", "replace")
    else:
        header[b + rng.choice(("x", ".scale", ".weight"))] = header.pop(b)
    return dumped(header).encode()


def damaged_gguf(rng, raw):
    """A GGUF file with a field beside a name changed, the counts at its start, or any bytes."""
    kind = rng.randrange(8)
    if kind == 0:
        return damaged_bytes(rng, raw)
    if kind == 2:
        return damaged_bytes(rng, raw, len(raw))
    data = bytearray(raw)
    if kind == 1:
        at = rng.choice((4, 8, 16))
        data[at : at + 4] = struct.pack("<I", rng.choice(NASTY) % 2**32)
        return bytes(data)
    known = (b"blk.", b"general.", b"tokenizer.", b"llama.", b"bitnet", b".weight", b"bitjax.")
    found = [i for name in known for i in _places(data, name)]
    if not found:
        return damaged_bytes(rng, raw)
    for _ in range(rng.choice((1, 1, 3))):
        at = rng.choice(found)
        # The length before a name, or what comes behind it: types, dimensions, sizes, offsets.
        place = at - 8 if rng.random() < 0.3 else at + rng.randrange(64)
        number = nasty_bytes(rng)
        place = max(0, min(place, len(data) - len(number)))
        data[place : place + len(number)] = number
    return bytes(data)


def _places(data, name):
    places, at = [], data.find(name)
    while at >= 0 and len(places) < 1000:
        places.append(at)
        at = data.find(name, at + 1)
    return places
