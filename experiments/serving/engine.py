"""The engine against the generator on one packed model, the same prompts, in turn.

    python experiments/serving/engine.py model.safetensors [--sequences 1 8 32] [--rounds 5]

Rates are of whole jobs, prompts of random tokens included, greedy, without guesses. The engine runs
once as it does, and once so that every step waits for the tokens of the one before. Prints a table.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from bitjax.api import load
from bitjax.engine import Engine, EngineConfig, Request, Sampling
from bitjax.infer import Generator, SamplingParams

ENGINE, IN_TURN, GENERATOR = "engine", "engine, steps in turn", "generator"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--answer", type=int, default=64, help="tokens")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    model = load(args.model)
    generator = Generator(model)
    print("| sequences | " + " | ".join((ENGINE, IN_TURN, GENERATOR)) + " | engine / generator |")
    print("|---|---|---|---|---|")
    for count in args.sequences:
        engine = Engine(model, EngineConfig(max_sequences=count, sharing=False, lookup=0))
        engine.load()
        rng = np.random.default_rng(count)
        rates: dict[str, list[float]] = {ENGINE: [], IN_TURN: [], GENERATOR: []}
        for number in range(args.rounds + 1):  # the first is not counted
            prompts = rng.integers(1, 256, (count, args.prompt)).tolist()
            for name, found in rates.items():
                started = time.perf_counter()
                if name == GENERATOR:
                    settings = SamplingParams(args.answer, temperature=0.0)
                    for _ in generator.tokens(prompts, [settings] * count):
                        pass
                else:
                    engine._runner.draws = name == ENGINE
                    sampling = Sampling(args.answer, temperature=0.0, ignore_eos=True)
                    list(
                        engine.generate(Request(f"{i}", p, sampling) for i, p in enumerate(prompts))
                    )
                if number:
                    found.append(count * args.answer / (time.perf_counter() - started))
        ratios = [a / b for a, b in zip(rates[ENGINE], rates[GENERATOR], strict=True)]
        shown = [f"{statistics.median(found):.1f}" for found in rates.values()]
        print(
            f"| {count} | " + " | ".join(shown) + f" | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f}-{max(ratios):.2f}) |",
            flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
