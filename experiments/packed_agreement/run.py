"""Packed inference of a trained model, kernel by kernel: agreement with training, and speed.

    python experiments/packed_agreement/run.py bitjax-demo/ternary

takes a ternary run directory (here the demo's), packs its model, and for every kernel this machine
can run, and for the pure-JAX reference, compares the packed logits with the training-time logits
on held-out text, and times decoding. Kernels take turns in one run, so that their speeds compare on
a noisy machine. Rewrites `results.json` and the table in `README.md` beside this file.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bitjax.infer import Generator, SamplingParams, pack_model
from bitjax.model import Transformer, bit_linears
from bitjax.ops import ffi
from bitjax.train import Trainer, data
from bitjax.train.checkpoint import read_run

HERE = Path(__file__).parent
START, END = "<!-- results -->", "<!-- end of results -->"
SEQUENCES = 8  # of training length, spread over the held-out text
ROUNDS = 7  # turns of every kernel; the median is reported


def with_impl(model: Transformer, impl: str) -> Transformer:
    """The model with every packed product computed by `impl`."""
    model = nnx.clone(model)
    for _, layer in bit_linears(model):
        layer.impl = impl
    return model


def unfused(model: Transformer) -> Transformer:
    """The model with norms, gates and residuals outside its packed products."""
    model = nnx.clone(model)
    for _, layer in bit_linears(model):
        layer.fuse = False
    return model


def agreement(trained: Transformer, packed: Transformer, tokens: jax.Array) -> dict[str, Any]:
    """Largest differences of logits, operation by operation and compiled."""
    by_operation = jnp.abs(trained(tokens) - unfused(packed)(tokens)).max()
    compiled = []
    for model in (trained, packed):
        graph, params = nnx.split(model)
        compiled.append(jax.jit(lambda p, t, g=graph: nnx.merge(g, p)(t))(params, tokens))
    a, b = compiled
    return {
        "by_operation": float(by_operation),
        "compiled": float(jnp.abs(a - b).max()),
        "same_argmax": float((a.argmax(-1) == b.argmax(-1)).mean()),
        "largest_logit": float(jnp.abs(a).max()),
    }


def main() -> None:
    """Compare, time, publish."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run directory of a ternary model")
    arguments = parser.parse_args()
    config, _, state = read_run(arguments.run)
    trained = Trainer(config).model(state.params)
    packed = pack_model(trained)
    windows = data.windows(data.load_text(config.data).valid, config.train.seq_len, SEQUENCES)
    tokens = jnp.asarray(windows[:, :-1])

    prompt = bytes(np.asarray(windows[0, :16], np.uint8)).decode(errors="replace")
    params = SamplingParams(max_new_tokens=200, temperature=0)
    results = {}
    generators = {}
    for name in (*ffi.kernels(), "reference"):
        model = with_impl(packed, "reference" if name == "reference" else "ffi")
        ffi.force_kernel(None if name == "reference" else name)
        results[name] = agreement(trained, model, tokens)
        generators[name] = Generator(model)
        generators[name].compile(prompt, params)
    rates: dict[str, list[float]] = {name: [] for name in results}
    texts = {}
    for _ in range(ROUNDS):
        for name, generator in generators.items():
            ffi.force_kernel(None if name == "reference" else name)
            done = generator.generate([prompt], params)[0]
            rates[name].append(done.tokens_per_second)
            texts[name] = done.text
    ffi.force_kernel(None)
    for name, result in results.items():
        result["tokens_per_second"] = statistics.median(rates[name])
        result["slowest"], result["fastest"] = min(rates[name]), max(rates[name])
        result["same_text"] = texts[name] == texts["reference"]
    publish(results, len(windows) * config.train.seq_len)


def publish(results: dict[str, dict[str, Any]], positions: int) -> None:
    """Rewrite the results and the table beside this file."""
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    lines = [
        f"Logits at {positions:,} held-out positions; greedy decoding of 200 tokens, one sequence.",
        "",
        "| kernel | operation by operation | compiled, fused | same next byte | same greedy text "
        "| tokens/s | of reference |",
        "|---|---|---|---|---|---|---|",
    ]
    base = results["reference"]["tokens_per_second"]
    for name, r in results.items():
        rate = r["tokens_per_second"]
        lines.append(
            f"| {name} | {r['by_operation']:.2g} | {r['compiled']:.2g} "
            f"| {r['same_argmax']:.2%} | {'yes' if r['same_text'] else 'no'} "
            f"| {rate:,.0f} ({r['slowest']:,.0f}-{r['fastest']:,.0f}) | {rate / base:.1f}x |"
        )
    table = "\n".join(lines)
    print(table)
    readme = HERE / "README.md"
    before, _, rest = readme.read_text().partition(START)
    readme.write_text(f"{before}{START}\n{table}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
