"""What an output head's number format costs in quality, and what an exact one costs to compute.

    bitjax train configs/shakespeare.py --out runs/shakespeare
    python experiments/heads/run.py runs/shakespeare

takes a ternary run directory, packs its model with every format of the head, and measures on the
held-out text: errors of logits, bits per byte, and greedy tokens, fed the text and running free.
Only the head differs: all models look tokens up in the float32 embedding. A head of the shape of
BitNet b1.58 2B4T with Gaussian weights, under Gaussian rows, shows how many logits a screened head
computes where nothing stands out: a hard case. Rewrites `results.json` and the tables in
`README.md` beside this file. The text is the packaged tiny Shakespeare (public domain).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitjax import ops
from bitjax.config import ModelConfig
from bitjax.infer.convert import TableFormat, make_screen, pack_table
from bitjax.model import Transformer
from bitjax.ops import ffi
from bitjax.packing import PackedWeights, Screen
from bitjax.train import Trainer, data
from bitjax.train.checkpoint import read_run

HERE = Path(__file__).parent
START, END = "<!-- results -->", "<!-- end of results -->"
FORMATS: tuple[TableFormat, ...] = ("float32", "bfloat16", "int8", "int4", "screened")
PROMPTS, FREE = 64, 128  # free-running: held-out prompts of 32 bytes, bytes each
SHAPE = (128_256, 2560)  # of the head of BitNet b1.58 2B4T
ROWS = 32  # of Gaussian activations
RANKS = (1, 10, 50, 64, 200)

Head = Callable[[jax.Array], jax.Array]  # hidden [m, D] -> logits [m, V]


def head_of(table: jax.Array, form: TableFormat, rank: int = 1) -> Head:
    """The logits of a head in some format, compiled."""
    packed = pack_table("head", table, form)
    if form == "screened":
        screen = make_screen([np.asarray(packed)])
        return jax.jit(lambda h: ops.screened_logits(h, packed, screen, ranks(h, rank))[0])
    if isinstance(packed, PackedWeights):
        return jax.jit(lambda h: ops.packed_matmul(h, packed))
    return jax.jit(lambda h: h @ packed.astype(jnp.float32).T)


def ranks(hidden: jax.Array, rank: int) -> jax.Array:
    """One rank for every row."""
    return jnp.full(hidden.shape[:1], rank, jnp.int32)


def teacher_forced(
    model: Transformer, heads: dict[str, Head], text: np.ndarray, length: int
) -> dict[str, dict[str, float]]:
    """Errors against the float32 head on consecutive windows of a text."""
    count = (len(text) - 1) // length
    tokens = text[: count * length].reshape(count, length)
    targets = text[1 : count * length + 1].reshape(count, length)
    hidden_of = jax.jit(
        lambda t: model.extend(t, jnp.broadcast_to(jnp.arange(length), t.shape), None)[0]
    )
    sums: dict[str, dict[str, list[Any]]] = {name: {} for name in heads}
    for first in range(0, count, 16):
        batch = jnp.asarray(tokens[first : first + 16], jnp.int32)
        hidden = hidden_of(batch).reshape(-1, model.config.hidden_size)
        wanted = targets[first : first + 16].reshape(-1)
        exact = np.asarray(heads["float32"](hidden), np.float64)
        stored = np.asarray(heads["bfloat16"](hidden)).argmax(1)
        base = cross_entropy(exact, wanted)
        for name, head in heads.items():
            logits = np.asarray(head(hidden), np.float64)
            error = logits - exact
            change = (cross_entropy(logits, wanted) - base) / np.log(2)
            found = {
                "square": np.square(error).mean(),
                "variance": exact.var(axis=1).mean(),
                "largest": np.abs(error).max(),
                "change": change.reshape(-1, length).mean(axis=1),
                "same": (logits.argmax(1) == exact.argmax(1)).mean(),
                "stored": (logits.argmax(1) == stored).mean(),
                "bits": cross_entropy(logits, wanted).mean() / np.log(2),
            }
            for key, value in found.items():
                sums[name].setdefault(key, []).append(value)
    results = {}
    for name, found in sums.items():
        change = np.concatenate(found["change"])
        results[name] = {
            "positions": count * length,
            "relative_rms": float(np.sqrt(np.mean(found["square"]) / np.mean(found["variance"]))),
            "largest_error": float(max(found["largest"])),
            "bits_per_byte": float(np.mean(found["bits"])),
            "bits_per_byte_change": float(change.mean()),
            "standard_error": float(change.std(ddof=1) / np.sqrt(len(change))),
            "same_token": float(np.mean(found["same"])),
            "same_token_as_bfloat16": float(np.mean(found["stored"])),
        }
    return results


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Nats of each target."""
    top = logits.max(axis=1, keepdims=True)
    total = np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0]
    return total - logits[np.arange(len(targets)), targets]


def free_running(
    model: Transformer, heads: dict[str, Head], text: np.ndarray
) -> dict[str, dict[str, float]]:
    """How long greedy texts stay those of the float32 head."""
    starts = np.linspace(0, len(text) - 33, PROMPTS).astype(int)
    prompts = jnp.asarray(np.stack([text[s : s + 32] for s in starts]), jnp.int32)

    @jax.jit
    def extend(tokens: jax.Array, first: int, cache: Any) -> Any:
        positions = jnp.broadcast_to(first + jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, cache = model.extend(tokens, positions, cache)
        return hidden[:, -1], cache

    texts = {}
    for name, head in heads.items():
        hidden, cache = extend(prompts, 0, model.empty_cache(PROMPTS, 32 + FREE))
        written = [jnp.argmax(head(hidden), -1)]
        for step in range(FREE - 1):
            hidden, cache = extend(written[-1][:, None], 32 + step, cache)
            written.append(jnp.argmax(head(hidden), -1))
        texts[name] = np.stack([np.asarray(w) for w in written], axis=1)
    results = {}
    for name, wrote in texts.items():
        same = np.cumprod(wrote == texts["float32"], axis=1)
        results[name] = {
            "same_texts": int(same[:, -1].sum()),
            "same_bytes": float(same.sum(axis=1).mean()),
            "same_texts_as_bfloat16": int((wrote == texts["bfloat16"]).all(axis=1).sum()),
        }
    return results


def gaussian() -> dict[str, Any]:
    """Errors and computed rows of a Gaussian head, a part of the vocabulary after another."""
    V, D = SHAPE
    rng = np.random.default_rng(0)
    pieces = [
        (rng.standard_normal((min(4096, V - i), D), np.float32) * np.float32(0.02)).astype(
            jnp.bfloat16
        )
        for i in range(0, V, 4096)
    ]
    started = time.perf_counter()
    screen: Screen = make_screen(pieces)
    seconds = time.perf_counter() - started
    table = jnp.asarray(np.concatenate(pieces))
    hidden = jnp.asarray(rng.standard_normal((ROWS, D), np.float32))
    computed = {}
    for rank in RANKS:
        # A row alone meets the screen in two parts, as in decoding; many together in one.
        counts = {
            together: np.concatenate([
                np.asarray(ops.screened_logits(rows, table, screen, ranks(rows, rank))[1])
                for rows in jnp.split(hidden, ROWS // together)
            ])
            for together in (1, ROWS)
        }  # fmt: skip
        computed[rank] = {
            together: {
                "median": float(np.median(count)), "least": int(count.min()),
                "most": int(count.max()),
            }
            for together, count in counts.items()
        }  # fmt: skip
    exact = np.concatenate([
        np.asarray(hidden) @ piece.astype(np.float32).T for piece in pieces
    ], axis=1)  # fmt: skip
    errors = {}
    for form in ("int8", "int4"):
        heads = [head_of(jnp.asarray(piece, jnp.float32), form) for piece in pieces]
        logits = np.concatenate([np.asarray(head(hidden)) for head in heads], axis=1)
        errors[form] = compare(logits, exact)
    rank_1 = np.asarray(ops.screened_logits(hidden, table, screen, ranks(hidden, 1))[0])
    errors["screened"] = compare(rank_1, exact)
    return {
        "shape": SHAPE, "rows": ROWS, "computed": computed, "errors": errors,
        "table_bytes": table.nbytes, "screen_bytes": screen.nbytes, "screen_seconds": seconds,
    }  # fmt: skip


def compare(logits: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Errors relative to the logits' standard deviation, and how often the largest is the same."""
    error = logits - exact
    return {
        "relative_rms": float(error.std() / exact.std()),
        "largest_error": float(np.abs(error).max() / exact.std()),
        "same_token": float((logits.argmax(1) == exact.argmax(1)).mean()),
    }


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run directory of a ternary model")
    arguments = parser.parse_args()
    config, _, state = read_run(arguments.run)
    model = Trainer(config).model(state.params)
    shape: ModelConfig = model.config
    text = data.load_text(config.data).valid
    table = (model.embedding if model.head is None else model.head)[...]
    heads = {form: head_of(table, form) for form in FORMATS}
    results: dict[str, Any] = {
        "kernel": ffi.active_kernel() if ffi.available() else "pure JAX",
        "head": [shape.vocab_size, shape.hidden_size],
        "teacher_forced": teacher_forced(model, heads, text, config.train.seq_len),
        "free_running": free_running(model, heads, text),
        "gaussian": gaussian(),
    }
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    publish(results)


def publish(results: dict[str, Any]) -> None:
    """Rewrite the tables beside this file."""
    forced, free = results["teacher_forced"], results["free_running"]
    V, D = results["head"]
    lines = [
        f"Trained head, {V} x {D}; {forced['float32']['positions']:,} held-out bytes; "
        f"{PROMPTS} greedy texts of {FREE} bytes:",
        "",
        "| head | rms error / deviation of logits | largest error | bits per byte: change | "
        "same greedy byte (as bfloat16's) | same texts (as bfloat16's) | bytes until they differ |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, f in forced.items():
        lines.append(
            f"| {name} | {f['relative_rms']:.2g} | {f['largest_error']:.2g} | "
            f"{f['bits_per_byte_change']:+.6f} ± {f['standard_error']:.6f} | "
            f"{f['same_token']:.3%} ({f['same_token_as_bfloat16']:.3%}) | "
            f"{free[name]['same_texts']} ({free[name]['same_texts_as_bfloat16']}) | "
            f"{free[name]['same_bytes']:.1f} |"
        )
    g = results["gaussian"]
    V, D = g["shape"]
    lines += [
        "",
        f"Gaussian head, {V:,} x {D:,}, {g['rows']} Gaussian rows; table "
        f"{g['table_bytes'] / 1e6:.0f} MB, screen {g['screen_bytes'] / 1e6:.0f} MB:",
        "",
        "| head | rms error / deviation | largest error / deviation | same greedy token |",
        "|---|---|---|---|",
    ]
    for name, e in g["errors"].items():
        lines.append(
            f"| {name} | {e['relative_rms']:.4f} | {e['largest_error']:.2f} | "
            f"{e['same_token']:.1%} |"
        )
    lines += [
        "",
        "| largest logits that must be exact | logits computed, rows one by one: median (range) | "
        f"of all | {g['rows']} rows at once | of all |",
        "|---|---|---|---|---|",
    ]
    for rank, counts in g["computed"].items():
        cells = [
            f"{c['median']:,.0f} ({c['least']:,}-{c['most']:,}) | {c['median'] / V:.3%}"
            for c in counts.values()
        ]
        lines.append(f"| {rank} | {' | '.join(cells)} |")
    tables = "\n".join(lines)
    print(tables)
    readme = HERE / "README.md"
    before, _, rest = readme.read_text().partition(START)
    readme.write_text(f"{before}{START}\n{tables}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
