"""What a narrower KV cache costs a trained model.

    python experiments/kv_cache/run.py bitjax-demo/ternary

takes a ternary run directory (here the demo's), packs its model, and runs held-out text through
caches of float32, bfloat16 and int8, teacher-forced and free-running. Rewrites `results.json` and
the table in `README.md` beside this file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bitjax.config import CacheDType
from bitjax.infer import Generator, SamplingParams, pack_model
from bitjax.model import Transformer
from bitjax.ops import ffi
from bitjax.train import Trainer, data
from bitjax.train.checkpoint import read_run

HERE = Path(__file__).parent
START, END = "<!-- results -->", "<!-- end of results -->"
SEQUENCES = 128  # teacher-forced, of training length, spread over the held-out text
PROMPTS, PROMPT, FREE = 64, 64, 64  # free-running: prompts, their bytes, bytes drawn after each
# (cache, kernel): the last, float32 rounded in another order, is what rounding alone does.
ROWS: tuple[tuple[CacheDType, str | None], ...] = (
    ("float32", None), ("bfloat16", None), ("int8", None), ("float32", "scalar"),
)  # fmt: skip


def teacher_forced(model: Transformer, tokens_BxT: jax.Array, cache_dtype: CacheDType) -> jax.Array:
    """Logits `[B, T, V]` through the cache; attention gives the bits of token by token."""
    graph, params = nnx.split(model)
    B, T = tokens_BxT.shape

    @jax.jit
    def run(params: Any, tokens_BxT: jax.Array) -> jax.Array:
        model = nnx.merge(graph, params)
        positions_BxT = jnp.broadcast_to(jnp.arange(T), (B, T))
        hidden, _ = model.extend(tokens_BxT, positions_BxT, model.empty_cache(B, T, cache_dtype))
        return model.logits(hidden)

    return run(params, tokens_BxT)


def free_running(model: Transformer, prompts: np.ndarray, cache_dtype: CacheDType) -> np.ndarray:
    """Greedy tokens `[prompts, FREE]`."""
    params = [SamplingParams(max_new_tokens=FREE, temperature=0)] * len(prompts)
    steps = Generator(model, cache_dtype).tokens(prompts.tolist(), params)
    return np.stack([next(steps) for _ in range(FREE)], axis=1)


def main() -> None:
    """Run, compare, publish."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run directory of a ternary model")
    arguments = parser.parse_args()
    config, _, state = read_run(arguments.run)
    model = pack_model(Trainer(config).model(state.params))
    valid = data.load_text(config.data).valid
    windows = data.windows(valid, config.train.seq_len, SEQUENCES)
    tokens_BxT, targets_BxT = jnp.asarray(windows[:, :-1]), jnp.asarray(windows[:, 1:])
    prompts = data.windows(valid, PROMPT, PROMPTS)[:, :PROMPT]

    results: list[dict[str, Any]] = []
    logits, texts = [], []
    for cache_dtype, kernel in ROWS:
        ffi.force_kernel(kernel)
        logits.append(teacher_forced(model, tokens_BxT, cache_dtype).block_until_ready())
        texts.append(free_running(model, prompts, cache_dtype))
        ours, exact = logits[-1], logits[0]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(ours), targets_BxT[..., None], axis=-1)
        same = texts[-1] == texts[0]
        before = np.where(same.all(axis=1), FREE, same.argmin(axis=1))
        results.append({
            "cache": cache_dtype,
            "kernel": kernel or ffi.active_kernel(),
            "rms_over_std": float(jnp.sqrt(jnp.mean((ours - exact) ** 2)) / exact.std()),
            "bits_per_byte": float(-chosen.mean() / np.log(2)),
            "same_argmax": float((ours.argmax(-1) == exact.argmax(-1)).mean()),
            "same_text": float(same.all(axis=1).mean()),
            "bytes_until_other": float(before.mean()),
        })  # fmt: skip
    ffi.force_kernel(None)
    publish(results, tokens_BxT.size)


def publish(results: list[dict[str, Any]], positions: int) -> None:
    """Write `results.json` and the table of `README.md`."""
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    first = results[0]
    rows = [
        f"{positions:,} held-out bytes, teacher-forced; {PROMPTS} prompts of {PROMPT} bytes and "
        f"{FREE} greedy bytes after each. Compared with the first row.",
        "",
        "| cache | kernel | rms of logits / their std | bits per byte | same next byte "
        "| same greedy text | bytes until the first other |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        rows.append(
            f"| {r['cache']} | {r['kernel']} | {r['rms_over_std']:.1e} "
            f"| {r['bits_per_byte']:.5f} ({r['bits_per_byte'] - first['bits_per_byte']:+.5f}) "
            f"| {r['same_argmax']:.2%} | {r['same_text']:.0%} | {r['bytes_until_other']:.1f} |"
        )
    readme = HERE / "README.md"
    text = readme.read_text()
    head, rest = text.split(START)
    _, tail = rest.split(END)
    readme.write_text(f"{head}{START}\n" + "\n".join(rows) + f"\n{END}{tail}")


if __name__ == "__main__":
    main()
