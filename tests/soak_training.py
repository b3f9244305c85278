"""Killed again and again at random instants, a run ends with the parameters of an unbroken one.

    python tests/soak_training.py [--kills 60] [--seed 0] [--folder DIR]

A tiny run saves every few steps, so that many kills (SIGKILL) fall into the writing of a
checkpoint; a fifth are SIGTERM, after which the process must end by itself. Each restart must go on
after the newest checkpoint that had been finished. At the end the final parameters, optimiser state
and reports must be those of the unbroken run, to the bit.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from tiny import tiny_config

CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from bitjax.config import RunConfig, from_json
from bitjax.train import Interrupted, train
config = from_json(RunConfig, Path(sys.argv[1]).read_text())
try:
    train(config, Path(sys.argv[2]), lambda r: print(r.step, flush=True))
except Interrupted:
    sys.exit(3)
"""
ROOT = Path(__file__).resolve().parent.parent
MOST_SECONDS = 1.0  # after a process's first report, until it is killed
UNBEGUN = 0.1  # of the kills come while the process is still starting


def write_config(folder, steps):
    from bitjax.config import DataConfig, OptimizerConfig, RunConfig, TrainConfig, to_json

    text = folder / "text.txt"
    text.write_bytes(bytes(np.random.default_rng(0).integers(97, 110, 20_000, dtype=np.uint8)))
    config = RunConfig(
        model=tiny_config(num_layers=1),
        data=DataConfig(text=str(text)),
        optimizer=OptimizerConfig(warmup_steps=2),
        train=TrainConfig(
            steps=steps, batch_size=2, seq_len=8, log_every=1, eval_every=50, checkpoint_every=3,
            peak_gflops=100.0, spike_factor=5.0, on_spike="skip",
        ),
    )  # fmt: skip
    path = folder / "config.json"
    path.write_text(to_json(config))
    return path


def finished_steps(run):
    folder = run / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return [int(name) for name in names if name.isdecimal()]


def start(config, run):
    command = [sys.executable, "-c", CHILD, str(config), str(run), str(ROOT)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def killed_once(config, run, chance):
    """Run until a random instant; returns the first step reported, or None, and the signal."""
    number = signal.SIGTERM if chance.random() < 0.2 else signal.SIGKILL
    with start(config, run) as process:
        if number == signal.SIGKILL and chance.random() < UNBEGUN:
            time.sleep(chance.uniform(0, 3))
            process.kill()
            return None, number
        first = process.stdout.readline()
        time.sleep(chance.uniform(0, MOST_SECONDS))
        process.send_signal(number)
        process.stdout.read()
    wanted = (3,) if number == signal.SIGTERM else (-signal.SIGKILL,)
    if process.returncode not in (*wanted, 0):
        raise SystemExit(f"FAILED: the process ended with {process.returncode} after {number}")
    return int(first) if first else None, number


def soak(folder, kills, seed):
    from bitjax.train import read_metrics
    from bitjax.train.checkpoint import UNFINISHED, read_run

    chance = random.Random(seed)
    config, run, whole = write_config(folder, 15 * kills), folder / "run", folder / "unbroken"
    done = in_writing = 0
    newest = 0
    while done < kills:
        first, number = killed_once(config, run, chance)
        if first is not None and first <= newest:
            raise SystemExit(f"FAILED: step {newest} was saved, but the run went on at {first}")
        newest_now = max(finished_steps(run), default=0)
        if newest_now < newest:
            raise SystemExit(f"FAILED: checkpoint {newest} is lost, the newest is {newest_now}")
        newest = newest_now
        in_writing += any((run / "checkpoints").glob(f"*{UNFINISHED}*"))
        done += 1
        print(f"{done}/{kills}: {signal.Signals(number).name}, checkpoint {newest}", flush=True)
    for directory in (run, whole):
        with start(config, directory) as process:
            process.stdout.read()
        if process.returncode != 0:
            raise SystemExit(f"FAILED: {directory} ended with {process.returncode}")
    import jax

    leaves = [jax.tree.leaves(read_run(directory)[2]) for directory in (run, whole)]
    if not all(np.array_equal(a, b) for a, b in zip(*leaves, strict=True)):
        raise SystemExit("FAILED: the final states differ")
    curves = [
        [(r["step"], r["loss"], r.get("valid_loss"), r["layers"]) for r in read_metrics(directory)]
        for directory in (run, whole)
    ]
    if curves[0] != curves[1]:
        raise SystemExit("FAILED: the reports differ")
    print(
        f"{kills} kills, {in_writing} of them while a checkpoint was being written or deleted: "
        f"final state ({len(leaves[0])} arrays) and {len(curves[0])} reports are bit-identical"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None, help="kept; default: temporary")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="bitjax-soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    # Restarts share compiled programs.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "programs")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
    try:
        soak(folder, arguments.kills, arguments.seed)
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
