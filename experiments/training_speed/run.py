"""How long a training step takes, here and in PyTorch, measured in one interleaved run.

    python experiments/training_speed/run.py [--sizes 1M 6M 27M] [--rounds 5] [--seconds 1]
    python experiments/training_speed/run.py --check

Every variant lives in a process of its own, compiled and warm, and waits; in every round each in
turn, in an order that changes, takes as many whole optimiser steps as fill `--seconds`. Ratios are
of the same round. `--check` instead compares loss and gradients of both implementations on the
same weights. Rewrites `results.json` and the table in `README.md` beside this file.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bitjax.allocator import reuse_freed_memory
from bitjax.bench.machine import machine
from bitjax.config import ModelConfig, OptimizerConfig, RunConfig, TrainConfig

HERE = Path(__file__).parent
START, END = "<!-- results -->", "<!-- end of results -->"
T = 256  # tokens predicted a sequence
# Of the ladder: hidden size, layers, sequences a step.
SIZES = {"1M": (128, 6, 16), "6M": (256, 7, 16), "27M": (512, 8, 8)}
VARIANTS = {
    "bitjax float32": {},
    "bitjax float32, full precision": {"twin": True},
    "bitjax float32 fused": {"attention": "fused"},
    "bitjax float32 fused, full precision": {"twin": True, "attention": "fused"},
    "bitjax integer": {"products": "integer"},
    "bitjax integer fused": {"products": "integer", "attention": "fused"},
    "torch float32": {},
    "torch float32, compiled": {"compile": True},
    "torch bfloat16": {"autocast": True},
    "torch bfloat16, compiled": {"autocast": True, "compile": True},
}  # fmt: skip
TORCH_F32 = ("torch float32", "torch float32, compiled")
TORCH_BF16 = ("torch bfloat16", "torch bfloat16, compiled")
# Times as fast as the best of others.
COMPARISONS = [
    ("**float32 / torch's best float32**", "bitjax float32", TORCH_F32),
    ("**float32 fused / torch's best float32**", "bitjax float32 fused", TORCH_F32),
    ("**integer / torch's best float32**", "bitjax integer", TORCH_F32),
    ("**integer fused / torch's best float32**", "bitjax integer fused", TORCH_F32),
    ("**integer / torch's best bfloat16**", "bitjax integer", TORCH_BF16),
    ("**integer fused / torch's best bfloat16**", "bitjax integer fused", TORCH_BF16),
    ("**float32 / our full precision**", "bitjax float32", ("bitjax float32, full precision",)),
    (
        "**float32 fused / our full precision fused**",
        "bitjax float32 fused",
        ("bitjax float32 fused, full precision",),
    ),
    ("**integer / our full precision**", "bitjax integer", ("bitjax float32, full precision",)),
    (
        "**integer fused / our full precision fused**",
        "bitjax integer fused",
        ("bitjax float32 fused, full precision",),
    ),
]
Step = Callable[[], float]  # takes one step; returns its loss


def config_of(size: str, twin: bool = False, **train: Any) -> RunConfig:
    """The run measured; `train` overrides settings of its section."""
    D, layers, sequences = SIZES[size]
    model = ModelConfig(
        hidden_size=D, intermediate_size=3 * D, num_layers=layers, num_heads=D // 64,
        num_kv_heads=D // 64, head_dim=64, max_seq_len=T,
    )  # fmt: skip
    return RunConfig(
        model=model.full_precision_twin() if twin else model,
        optimizer=OptimizerConfig(warmup_steps=0),
        train=TrainConfig(batch_size=sequences, seq_len=T, log_codes=False, **train),
    )


def tokens_of(config: RunConfig) -> np.ndarray:
    """A batch, int32 `[B, T + 1]`: random, for what tokens say takes no time."""
    shape = (config.train.batch_size, T + 1)
    return np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)


def our_step(config: RunConfig) -> Step:
    import jax

    from bitjax.corpus.loader import Batch
    from bitjax.train import Trainer

    trainer = Trainer(config)
    state = trainer.init()
    batch = Batch(jax.numpy.asarray(tokens_of(config)))

    def step() -> float:
        nonlocal state
        state, metrics = trainer.step(state, batch)
        return float(metrics["loss"])

    return step


def torch_model_of(config: RunConfig) -> Any:
    """The PyTorch model with the weights that `Trainer.init` makes."""
    import torch
    from torch_model import Model

    from bitjax.model import Transformer
    from bitjax.train import Trainer

    trainer = Trainer(config)
    model: Transformer = trainer.model(trainer.init().params)
    ours = {"embedding": model.embedding, "norm.scale": model.norm.scale}
    for i, block in enumerate(model.blocks):
        at, ffn = block.attention, block.ffn
        ours |= {
            f"blocks.{i}.attention_norm.scale": block.attention_norm.scale,
            f"blocks.{i}.qkv.weight": at.qkv.weight,
            f"blocks.{i}.attention_sub_norm.scale": at.sub_norm.scale,
            f"blocks.{i}.o.weight": at.o.weight,
            f"blocks.{i}.ffn_norm.scale": block.ffn_norm.scale,
            f"blocks.{i}.gate_up.weight": ffn.gate_up.weight,
            f"blocks.{i}.ffn_sub_norm.scale": ffn.sub_norm.scale,
            f"blocks.{i}.down.weight": ffn.down.weight,
        }
    theirs = Model(config.model)
    theirs.load_state_dict({k: torch.tensor(np.asarray(v[...])) for k, v in ours.items()})
    return theirs


def torch_step(config: RunConfig, autocast: bool = False, compile: bool = False) -> Step:
    import torch
    from torch_model import optimizer_of

    model = torch_model_of(config)
    optimizer = optimizer_of(model, config.optimizer)
    tokens = torch.tensor(tokens_of(config), dtype=torch.long)
    run = torch.compile(model) if compile else model

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = run(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        optimizer.step()
        return float(loss.detach())

    return step


def make_step(variant: str, size: str) -> Step:
    settings = dict(VARIANTS[variant])
    if variant.startswith("torch"):
        return torch_step(config_of(size), **settings)
    return our_step(config_of(size, **settings))


def work(variant: str, size: str) -> None:
    """A worker: for every line of input, "seconds", takes steps and answers in JSON."""
    reuse_freed_memory()  # as `bitjax train` does; the same for PyTorch, whom it helps too
    step = make_step(variant, size)
    losses = [step() for _ in range(2)]
    print(json.dumps({"losses": losses}), flush=True)
    for line in sys.stdin:
        started, taken = time.perf_counter(), 0
        while taken == 0 or time.perf_counter() - started < float(line):
            step()
            taken += 1
        answer = {"steps": taken, "seconds": time.perf_counter() - started}
        print(json.dumps(answer), flush=True)


def measure(size: str, variants: list[str], rounds: int, seconds: float) -> dict[str, Any]:
    """Seconds a step, round by round, and the losses of the first steps, for each variant."""
    workers, found = {}, {}
    for variant in variants:  # one after the other: spinning threads of two would share cores
        command = [sys.executable, __file__, "--worker", variant, "--sizes", size]
        pipe = subprocess.PIPE
        workers[variant] = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        losses = json.loads(workers[variant].stdout.readline())["losses"]
        found[variant] = {"losses": losses, "seconds": []}
        print(f"{size}, {variant}: warm, losses {losses}", flush=True)
    order = random.Random(0)
    for _ in range(rounds):
        for variant in order.sample(variants, len(variants)):
            worker = workers[variant]
            worker.stdin.write(f"{seconds}\n")
            worker.stdin.flush()
            answer = json.loads(worker.stdout.readline())
            found[variant]["seconds"].append(answer["seconds"] / answer["steps"])
            print(f"{size}, {variant}: {found[variant]['seconds'][-1]:.3f} s a step", flush=True)
            time.sleep(0.02)  # for threads that spin to sleep
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    return found


def check(size: str) -> None:
    """Loss and gradients of both implementations on the same weights, in float32."""
    import jax
    import torch

    from bitjax.corpus.loader import Batch
    from bitjax.train import Trainer

    config = config_of(size)
    trainer = Trainer(config)
    batch = Batch(jax.numpy.asarray(tokens_of(config)[:2]))
    params = trainer.init().params
    loss, gradients = jax.jit(jax.value_and_grad(lambda p: trainer.means(p, batch)["loss"]))(params)
    model = torch_model_of(config)
    theirs = model(torch.tensor(np.asarray(batch.tokens), dtype=torch.long))
    theirs.backward()
    ours = np.asarray(gradients["blocks"][0]["ffn"]["down"]["weight"][...])
    gradient = model.blocks[0].down.weight.grad.numpy()
    error = np.abs(ours - gradient).max() / np.abs(gradient).max()
    print(f"{size}: loss {float(loss):.7f} here, {float(theirs):.7f} in torch; "
          f"gradient of the first block's down differs by {error:.1e} of its largest")  # fmt: skip
    if abs(float(loss) - float(theirs)) > 1e-4 or error > 2e-2:
        raise SystemExit("the two models are not the same")


def table(results: dict[str, Any]) -> str:
    """One row a variant, one column a size: tokens a second, and times the step of torch."""
    names = list(dict.fromkeys(v for found in results["sizes"].values() for v in found))
    lines = ["| variant | " + " | ".join(results["sizes"]) + " |"]
    lines.append("|---" * (1 + len(results["sizes"])) + "|")
    for variant in names:
        cells = []
        for size, found in results["sizes"].items():
            if variant not in found:
                cells.append("")
                continue
            tokens = SIZES[size][2] * T
            s = found[variant]["seconds"]
            cells.append(f"{tokens / statistics.median(s):,.0f} ({tokens / max(s):,.0f}-"
                         f"{tokens / min(s):,.0f})")  # fmt: skip
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    for name, variant, against in COMPARISONS:
        cells = []
        for found in results["sizes"].values():
            others = [v for v in found if v in against]
            if variant not in found or not others:
                cells.append("")
                continue
            r = ratios(found, variant, others)
            cells.append(f"{statistics.median(r):.2f} ({min(r):.2f}-{max(r):.2f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ratios(found: dict[str, Any], variant: str, against: list[str]) -> list[float]:
    """How many times as fast as the best of others (by median), round by round."""
    best = min(against, key=lambda v: statistics.median(found[v]["seconds"]))
    return [b / a for a, b in zip(found[variant]["seconds"], found[best]["seconds"], strict=True)]


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each turn")
    parser.add_argument("--check", action="store_true", help="compare the two models instead")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(arguments.worker, arguments.sizes[0])
    if arguments.check:
        for size in arguments.sizes:
            check(size)
        return None
    path = HERE / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {"sizes": {}}
    results["machine"] = machine()
    for size in arguments.sizes:
        found = measure(size, arguments.variants, arguments.rounds, arguments.seconds)
        results["sizes"][size] = found
        path.write_text(json.dumps(results, indent=1) + "\n")
    publish(results)
    return None


def publish(results: dict[str, Any]) -> None:
    """Rewrite the table beside this file."""
    text = table(results)
    print(text)
    readme = HERE / "README.md"
    before, _, rest = readme.read_text().partition(START)
    readme.write_text(f"{before}{START}\n{text}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
