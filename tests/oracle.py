"""Independent NumPy oracles, in float64 where the exact value is meant; nothing from bitjax."""

import fnmatch
import itertools

import numpy as np


def absmean_ternary(w):
    """Codes in {-1, 0, 1} and scale, by the equations of figure 3 of the b1.58 training tips."""
    w = np.asarray(w, np.float32)
    scale = np.maximum(np.mean(np.abs(w), dtype=np.float64), 1e-5).astype(np.float32)
    return np.clip(np.rint(w * (np.float32(1) / scale)), -1, 1), scale


def absmax_int8(x):
    """Codes and per-row scale of activations `[..., K]`."""
    x = np.asarray(x, np.float32)
    absmax = np.maximum(np.abs(x).max(axis=-1, keepdims=True), np.float32(1e-5))
    codes = np.clip(np.rint(x * (np.float32(127) / absmax)), -128, 127)
    return codes, absmax / 127.0


def ternary_product(x, w_codes, w_scale):
    """`dequant(int8(x)) @ dequant(w).T`: exact integers, then float64 scaling."""
    codes, x_scale = absmax_int8(x)
    acc = codes.astype(np.int64) @ np.asarray(w_codes, np.int64).T
    return acc * (x_scale.astype(np.float64) * float(w_scale))


def transformer(params, config, tokens, int8_head=False):
    """Logits `[T, V]` of one sequence: a slow, plain float64 decoder without batch or cache.

    `params` maps dotted names to arrays; `config` is a plain dict of the model's settings. With
    `int8_head` the head's inputs are quantised, as a packed head's are.
    """
    heads, groups, size = config["num_heads"], config["num_kv_heads"], config["head_dim"]

    def norm(x, name):
        scale = np.asarray(params[name + ".scale"], np.float64)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config["norm_eps"]) * scale

    def linear(x, name, rows=slice(None), matrix=0):
        w = np.asarray(params[name + ".weight"], np.float64)[rows]
        if config["inner_norm"]:
            x = norm(x, name + ".norm")
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in config["float_layers"]):
            return x @ w.T
        if config["linear_norm_eps"] is not None:
            scale = np.asarray(params[name + ".norm.scale"], np.float64)
            scale = scale if scale.ndim == 1 else scale[matrix]
            x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config["linear_norm_eps"]) * scale
        if config["weights"] == "ternary":
            codes, scale = absmean_ternary(w)
            w = codes * np.float64(scale)
        elif config["weights"] == "binary":
            w = np.where(w > w.mean(), 1.0, -1.0) * np.abs(w).mean()
        if config["activations"] == "int8":
            codes, scale = absmax_int8(x)
            x = codes * scale.astype(np.float64)
        return x @ w.T

    def frequency(exponent):
        f, scaling = config["rope_theta"] ** -exponent, config["rope_scaling"]
        if scaling["kind"] == "none":
            return f
        if scaling["kind"] == "linear":
            return f / scaling["factor"]
        wavelength, context = 2 * np.pi / f, scaling["original_max_seq_len"]
        longest, shortest = (context / scaling[f"{end}_freq_factor"] for end in ("low", "high"))
        if wavelength > longest:
            return f / scaling["factor"]
        if wavelength < shortest:
            return f
        # Between, the share of f itself grows linearly with the turns made in the context.
        turns, least, most = (context / w for w in (wavelength, longest, shortest))
        share = (turns - least) / (most - least)
        return (1 - share) * f / scaling["factor"] + share * f

    def rotate(x, position):  # [heads, size]
        half = size // 2
        angle = position * np.array([frequency(i / half) for i in range(half)])
        a, b = x[:, :half], x[:, half:]
        return np.concatenate(
            [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=1
        )

    def attention(x, name):
        ends = np.cumsum([0, heads * size, groups * size, groups * size])
        queries, keys, values = (
            linear(x, name + ".qkv", slice(a, b), i)
            for i, (a, b) in enumerate(itertools.pairwise(ends))
        )
        out = np.zeros((len(x), heads * size))
        for t in range(len(x)):
            q = rotate(queries[t].reshape(heads, size), t)
            for head in range(heads):
                group = head // (heads // groups)
                scores, mixed = [], []
                for s in range(t + 1):
                    k = rotate(keys[s].reshape(groups, size), s)[group]
                    scores.append(q[head] @ k / np.sqrt(size))
                    mixed.append(values[s].reshape(groups, size)[group])
                p = np.exp(np.array(scores) - max(scores))
                out[t, head * size : (head + 1) * size] = (p / p.sum()) @ np.array(mixed)
        return linear(norm(out, name + ".sub_norm") if config["sub_norm"] else out, name + ".o")

    def ffn(x, name):
        half = config["intermediate_size"]
        gate = linear(x, name + ".gate_up", slice(0, half))
        gate = gate / (1 + np.exp(-gate)) if config["activation"] == "silu" else np.maximum(
            gate, 0
        ) ** 2  # fmt: skip
        hidden = gate * linear(x, name + ".gate_up", slice(half, None), 1)
        return linear(norm(hidden, name + ".sub_norm") if config["sub_norm"] else hidden,
                      name + ".down")  # fmt: skip

    x = np.asarray(params["embedding"], np.float64)[tokens]
    for i in range(config["num_layers"]):
        block = f"blocks.{i}"
        pre = (lambda x, n: x) if config["inner_norm"] else norm
        x = x + attention(pre(x, block + ".attention_norm"), block + ".attention")
        x = x + ffn(pre(x, block + ".ffn_norm"), block + ".ffn")
    table = params["embedding"] if config["tie_embeddings"] else params["head"]
    x = norm(x, "norm")
    if int8_head:
        codes, scale = absmax_int8(x)
        x = codes * scale.astype(np.float64)
    return x @ np.asarray(table, np.float64).T
