"""Ternary against full precision at equal shape, tokens and seeds: the demo's twins, repeated.

    python experiments/shakespeare_twins/run.py --out /tmp/twins --seeds 0 1 2

Trains the two arms of `bitjax demo` for every seed (each with its own schedule), scores all
held-out bytes, and rewrites `results.json`, `loss.png` and the table in `README.md` beside this
file after every finished pair. Interrupted, the same command goes on.

Data: tiny Shakespeare, 1,115,394 bytes, public domain; packaged with bitjax, published at
https://github.com/karpathy/char-rnn (data/tinyshakespeare/input.txt). `--text` takes another file.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from bitjax import terminal
from bitjax.allocator import reuse_freed_memory
from bitjax.config import WeightQuantizer
from bitjax.evaluate import model_scorer, score_text
from bitjax.plots import plot_losses
from bitjax.presets import shakespeare
from bitjax.train import Trainer, data, read_metrics, train

HERE = Path(__file__).parent
ARMS: dict[str, WeightQuantizer] = {"ternary": "ternary", "full precision": "float"}
START, END = "<!-- results -->", "<!-- end of results -->"


def run_arm(weights: WeightQuantizer, text: str, seed: int, directory: Path) -> dict[str, Any]:
    """Train (or resume) one model and score the held-out bytes."""
    config = shakespeare(weights, text, seed)
    with terminal.training_progress(f"seed {seed} {weights:<8}") as on_report:
        state = train(config, directory, on_report)
    held_out = data.load_text(config.data).valid
    score = score_text(
        model_scorer(Trainer(config).model(state.params)), held_out, config.train.seq_len
    )
    last = [r["loss"] for r in read_metrics(directory)][-10:]
    return {
        "seed": seed,
        "weights": weights,
        "bits_per_byte": score.bits_per_byte,
        "standard_error": score.bits_per_byte_error,
        "train_bits_per_byte": statistics.mean(last) / math.log(2),
        "tokens": config.train.steps * config.train.batch_size * config.train.seq_len,
    }


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown; the gap's interval is Student's t over seeds."""
    by = {(r["seed"], r["weights"]): r for r in results}
    seeds = sorted({r["seed"] for r in results if (r["seed"], "float") in by})
    seeds = [s for s in seeds if (s, "ternary") in by]
    lines = ["| seed | ternary | full precision | gap |", "|---|---|---|---|"]
    gaps = []
    for seed in seeds:
        ternary, full = by[seed, "ternary"], by[seed, "float"]
        gaps.append(ternary["bits_per_byte"] - full["bits_per_byte"])
        lines.append(
            f"| {seed} | {ternary['bits_per_byte']:.4f} ± {ternary['standard_error']:.4f} "
            f"| {full['bits_per_byte']:.4f} ± {full['standard_error']:.4f} | {gaps[-1]:+.4f} |"
        )
    if len(gaps) > 1:
        # Two-sided 95 % quantiles of Student's t for n - 1 degrees of freedom.
        t = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}.get(len(gaps), 1.96)
        half = t * statistics.stdev(gaps) / math.sqrt(len(gaps))
        means = [
            statistics.mean(by[s, w]["bits_per_byte"] for s in seeds) for w in ("ternary", "float")
        ]
        lines.append(
            f"| mean | {means[0]:.4f} | {means[1]:.4f} "
            f"| {statistics.mean(gaps):+.4f} (95 %: ± {half:.4f}) |"
        )
    return "\n".join(lines)


def publish(results: list[dict[str, Any]], runs: Path) -> None:
    """Rewrite the results, the table and the plot beside this file."""
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    readme = HERE / "README.md"
    before, _, rest = readme.read_text().partition(START)
    after = rest.partition(END)[2]
    readme.write_text(f"{before}{START}\n{table(results)}\n{END}{after}")
    first = results[0]["seed"]
    curves = {label: read_metrics(runs / f"{w}-{first}") for label, w in ARMS.items()}
    if all(curves.values()):
        plot_losses(HERE / "loss.png", curves)


def main() -> None:
    """Parse, run every arm and seed, publish as results come."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the training runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--text", default="", help="another training text")
    arguments = parser.parse_args()
    reuse_freed_memory()
    results: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        for weights in ARMS.values():
            runs = arguments.out / f"{weights}-{seed}"
            results.append(run_arm(weights, arguments.text, seed, runs))
        publish(results, arguments.out)


if __name__ == "__main__":
    main()
