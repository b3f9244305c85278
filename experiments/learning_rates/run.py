"""How the best learning rate moves with a model's width: a sweep of both arms, and a rule.

    taskset -c 0 python experiments/learning_rates/run.py

Models of the demo's form (4 layers, heads of 32, a feed-forward network of three widths) are
trained on 512,000 bytes of tiny Shakespeare at rates a factor of 2 apart, until the best has worse
neighbours on both sides. A parabola through the three gives every width's optimum, a line through
the optima (in logarithms) the rule. Without the widest models it predicts their best rate, and the
parabola says what that would have cost.

Results are added to `results.json` beside this file as they come; what is there is not run again.
README.md says what was found.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from bitjax.allocator import reuse_freed_memory
from bitjax.config import OptimizerConfig, RunConfig, WeightQuantizer
from bitjax.presets import shakespeare
from bitjax.train import Trainer
from bitjax.train.loop import validate
from bitjax.train.source import open_source

HERE = Path(__file__).parent
ARMS: dict[str, WeightQuantizer] = {"ternary": "ternary", "full precision": "float"}
FIRST = {"ternary": 8e-3, "full precision": 4e-3}  # the rate that a search begins with
SEEDS = {32: 2, 64: 2, 128: 1}  # narrow models cost little
STEPS, SEQUENCES, SEQ_LEN = 500, 8, 128
VALID_ROWS = 256  # of SEQ_LEN bytes each

Result = dict[str, Any]


def config(arm: str, width: int, rate: float, seed: int) -> RunConfig:
    """The demo's run of an arm, with another width and rate; initial weights shrink as 1/sqrt(D),
    which leaves a layer's outputs as large as before."""
    demo = shakespeare(ARMS[arm], seed=seed)
    wide = dataclasses.replace(
        demo.model, hidden_size=width, intermediate_size=3 * width, num_heads=width // 32,
        num_kv_heads=width // 32, head_dim=32,
        init_std=demo.model.init_std * math.sqrt(demo.model.hidden_size / width),
    )  # fmt: skip
    old = demo.optimizer
    second = old.stage_two_learning_rate
    optimizer: OptimizerConfig = dataclasses.replace(
        old,
        learning_rate=rate,
        stage_two_learning_rate=None if second is None else rate * second / old.learning_rate,
    )
    train = dataclasses.replace(demo.train, steps=STEPS, batch_size=SEQUENCES, seq_len=SEQ_LEN)
    return dataclasses.replace(demo, model=wide, optimizer=optimizer, train=train)


def measured(arm: str, width: int, rate: float, seed: int) -> Result:
    """Train one model; its loss on held-out rows, in nats per byte, and the seconds it took."""
    started = time.process_time()
    run = config(arm, width, rate, seed)
    source, trainer = open_source(run), Trainer(run)
    state = trainer.init()
    for step in range(STEPS):
        state, _ = trainer.step(state, source.batch(step))
    loss = validate(trainer, state, source.valid(VALID_ROWS))["loss"]
    return {
        "arm": arm, "width": width, "rate": rate, "seed": seed,
        "loss": loss if math.isfinite(loss) else None,
        "cpu_seconds": round(time.process_time() - started, 1),
    }  # fmt: skip


class Results:
    """What was measured, kept in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.all: list[Result] = json.loads(path.read_text()) if path.exists() else []

    def get(self, arm: str, width: int, rate: float, seed: int) -> Result:
        """The result of a run, which is run if it was not yet."""
        for old in self.all:
            if (old["arm"], old["width"], old["rate"], old["seed"]) == (arm, width, rate, seed):
                return old
        new = measured(arm, width, rate, seed)
        print(json.dumps(new), flush=True)
        self.all.append(new)
        self._path.write_text("[\n" + ",\n".join(map(json.dumps, self.all)) + "\n]\n")
        return new


def _comparable(loss: float | None) -> float:
    return math.inf if loss is None else loss


def parabola(losses: dict[float, float | None]) -> np.ndarray | None:
    """Coefficients of the parabola, in log2 of the rate, through the best rate and its two
    neighbours; None if it has not both.

    Raises:
        ValueError: one of these diverged.
    """
    rates = sorted(losses)
    finite = [_comparable(losses[rate]) for rate in rates]
    best = int(np.argmin(finite))
    if best in (0, len(rates) - 1):
        return None
    if not math.isfinite(finite[best - 1] + finite[best + 1]):
        raise ValueError(f"a run beside the best rate {rates[best]} diverged")
    return np.polyfit(np.log2(rates[best - 1 : best + 2]), finite[best - 1 : best + 2], 2)


def search(results: Results, arm: str, width: int, seed: int) -> np.ndarray:
    """The parabola of one model: from the first rate on, by factors of 2 as the loss falls."""
    losses: dict[float, float | None] = {}
    rate = FIRST[arm]
    while True:
        for factor in (0.5, 1, 2):
            losses[factor * rate] = results.get(arm, width, factor * rate, seed)["loss"]
        found = parabola(losses)
        if found is not None:
            return found
        rate = min(losses, key=lambda r: _comparable(losses[r]))


def optima(results: Results, arm: str) -> list[tuple[int, int, float]]:
    """Width, seed and best rate of every model of the sweep."""
    found = []
    for width, seeds in SEEDS.items():
        for seed in range(seeds):
            a, b, _ = search(results, arm, width, seed)
            found.append((width, seed, float(2 ** (-b / (2 * a)))))
    return found


def rule(found: list[tuple[int, int, float]]) -> tuple[float, float, float]:
    """`rate = at_128 * (128 / width)^power` by least squares in logarithms, every width alike.

    Returns:
        at_128, power, and the power's standard error from the scatter about the line.
    """
    widths = np.array([width for width, _, _ in found], float)
    weights = np.array([1 / sum(w == width for w, _, _ in found) for width in widths])
    x, y = np.log(128 / widths), np.log([rate for _, _, rate in found])
    design = np.stack([np.ones_like(x), x], axis=1)
    inverse = np.linalg.inv(design.T @ (weights[:, None] * design))
    level, power = inverse @ design.T @ (weights * y)
    left = y - design @ np.array([level, power])
    spread = (weights * left**2).sum() / weights.sum() * len(found) / max(len(found) - 2, 1)
    middle = inverse @ (design.T * weights**2) @ design @ inverse
    return float(np.exp(level)), float(power), float(np.sqrt(spread * middle[1, 1]))


def plot(results: Results, rules: dict[str, tuple[float, float, float]], path: Path) -> None:
    """Loss against rate for every width of both arms, the best rates marked."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, arm in zip(axes, ARMS, strict=True):
        for width in SEEDS:
            by_rate: dict[float, list[float]] = {}
            for r in results.all:
                if (r["arm"], r["width"]) == (arm, width) and r["loss"] is not None:
                    by_rate.setdefault(r["rate"], []).append(r["loss"])
            rates = sorted(by_rate)
            (line,) = axis.plot(rates, [np.mean(by_rate[r]) for r in rates], "o-", label=str(width))
            at_128, power, _ = rules[arm]
            axis.axvline(at_128 * (128 / width) ** power, color=line.get_color(), linestyle=":")
        axis.set(xscale="log", title=arm, xlabel="learning rate (dotted: the rule)")
        axis.set_xlim(8e-4, 8e-2)
    axes[0].set_ylabel("held-out loss, nats per byte")
    axes[1].legend(title="width")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def table(results: Results, arm: str, widths: list[int]) -> str:
    """Mean losses over seeds as Markdown, a row a width."""
    rates = sorted({r["rate"] for r in results.all if r["arm"] == arm and r["width"] in widths})
    lines = ["| width | " + " | ".join(f"{r:.3g}" for r in rates) + " |"]
    lines.append("|" + "---|" * (len(rates) + 1))
    for width in widths:
        cells = []
        for rate in rates:
            seen = [r["loss"] for r in results.all if (r["arm"], r["width"], r["rate"]) ==
                    (arm, width, rate)]  # fmt: skip
            whole = seen and all(loss is not None for loss in seen)
            cells.append(f"{np.mean(seen):.3f}" if whole else "diverged" if seen else "")
        lines.append(f"| {width} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Sweep, fit, predict, try the prediction, show all."""
    reuse_freed_memory()
    results = Results(HERE / "results.json")
    rules = {}
    for arm in ARMS:
        found = optima(results, arm)
        rules[arm] = at_128, power, error = rule(found)
        print(f"\n{arm}: rate = {at_128:.3g} * (128 / width)^{power:.2f} (+- {error:.2f})")
        for width, seed, best in found:
            print(f"  width {width}, seed {seed}: best rate {best:.3g}")
        print(table(results, arm, list(SEEDS)))
        widest = max(SEEDS)
        at_128, power, _ = rule([f for f in found if f[0] != widest])
        predicted = at_128 * (128 / widest) ** power
        a, b, _ = search(results, arm, widest, 0)
        cost = a * (math.log2(predicted) + b / (2 * a)) ** 2
        print(
            f"without {widest}: power {power:.2f}, {predicted:.2e} at {widest}, where that costs "
            f"{cost:.4f} nats more than the best rate"
        )
    plot(results, rules, HERE / "rates.png")
    print(f"\n{sum(r['cpu_seconds'] for r in results.all) / 60:.1f} core-minutes")


if __name__ == "__main__":
    main()
