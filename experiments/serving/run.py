"""Servers under load: `bitjax serve` against llama.cpp's server and those of its forks.

    python experiments/serving/run.py model.safetensors \
        --against "ik=llama-server,model.gguf,-rtr" [--against ...] [--rounds 1]

Every client sends one request at the same instant and reads its stream: prompts of random tokens,
greedy, ends ignored. Every engine in turn, in an order that changes, is started, warmed up by one
request, loaded, and ended; all have as many threads, slots for all clients, and room for all their
tokens. Rewrites `results.json` and the table in `README.md` beside this file.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitjax.bench.energy import PackageMeter
from bitjax.bench.machine import machine
from bitjax.bench.rivals import Rival

HERE = Path(__file__).parent
START, END = "<!-- results -->", "<!-- end of results -->"
OURS = "bitjax"
TICKS = os.sysconf("SC_CLK_TCK")
LONGEST = 900  # seconds that a load may take


@dataclass(frozen=True)
class Load:
    """Clients at once; tokens of a prompt that all share, and of its own; tokens of an answer."""

    clients: int
    shared: int
    own: int
    answer: int = 32

    @property
    def name(self) -> str:
        beginning = f"{self.shared} shared + " if self.shared else ""
        return f"{self.clients} x ({beginning}{self.own} prompt, {self.answer} answer)"

    def prompts(self, seed: int) -> list[list[int]]:
        """Token ids: those of bytes, which all vocabularies have."""
        draw = random.Random(seed)
        start = draw.choices(range(1, 256), k=self.shared)
        return [start + draw.choices(range(1, 256), k=self.own) for _ in range(self.clients)]


LOADS = (
    Load(1, 0, 128, 64), Load(8, 0, 128), Load(32, 0, 128), Load(128, 0, 32),
    Load(8, 256, 32), Load(32, 256, 32),
)  # fmt: skip


@dataclass
class Answer:
    """When the parts of an answer arrived, in seconds; how many tokens it has."""

    sent: float
    arrived: list[float]
    tokens: int


def command_of(engine: Rival | Path, load: Load, port: int, threads: int) -> list[str]:
    """What starts a server with room for a load."""
    each = load.shared + load.own + load.answer + 8
    if isinstance(engine, Rival):
        # llama.cpp divides its context among the slots.
        return [str(engine.program.resolve()), "-m", str(engine.model.resolve()), *engine.flags,
                "--port", str(port), "-np", str(load.clients), "-c", str(load.clients * each),
                "-t", str(threads), "-tb", str(threads), "-b", "2048", "-ub", "512"]  # fmt: skip
    return [sys.executable, "-P", "-m", "bitjax.cli", "serve", str(engine.resolve()), "--port",
            str(port), "--sequences", str(load.clients), "--context", str(each)]  # fmt: skip


@contextlib.contextmanager
def served(command: list[str], port: int) -> Iterator[int]:
    """A server that answers, by its process."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("w") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, cwd=folder)
        try:
            while "200" not in _first_line(port):
                if process.poll() is not None:
                    raise SystemExit(f"{' '.join(command)} ended:\n{log.read_text()[-2000:]}")
                time.sleep(0.2)
            yield process.pid
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _first_line(port: int) -> str:
    try:
        with socket.create_connection(("127.0.0.1", port), 5) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            return connection.recv(64).split(b"\r\n")[0].decode()
    except OSError:
        return ""


async def ask(port: int, prompt: list[int], answer: int, ours: bool) -> Answer:
    """Send a request and read its stream."""
    body: dict[str, Any] = {
        "prompt": prompt, "temperature": 0, "stream": True, "ignore_eos": True
    }  # fmt: skip
    body |= {"max_tokens": answer} if ours else {"n_predict": answer, "cache_prompt": True}
    raw = json.dumps(body).encode()
    path = "/v1/completions" if ours else "/completion"
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(raw)}\r\nConnection: close\r\n\r\n"
    )
    found = Answer(time.perf_counter(), [], 0)
    writer.write(head.encode() + raw)
    async for line in reader:
        if not line.startswith(b"data: {"):
            continue
        part = json.loads(line[6:])
        if "error" in part:
            raise SystemExit(f"{path} answered {part}")
        choice = part["choices"][0] if ours else part
        if choice.get("text" if ours else "content"):
            found.arrived.append(time.perf_counter())
        if ours and choice["finish_reason"]:
            found.tokens = answer if choice["finish_reason"] == "length" else 0
        elif not ours and part.get("stop"):
            found.tokens = part["tokens_predicted"]
    writer.close()
    if found.tokens != answer or not found.arrived:
        raise SystemExit(f"{path} ended after {found.tokens} of {answer} tokens")
    return found


async def all_at_once(port: int, load: Load, ours: bool, seed: int) -> list[Answer]:
    """The answers of all clients."""
    asked = [ask(port, prompt, load.answer, ours) for prompt in load.prompts(seed)]
    return await asyncio.wait_for(asyncio.gather(*asked), LONGEST)


def core_seconds(pid: int) -> float:
    """What a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def measure(engine: Rival | Path, load: Load, threads: int, seed: int) -> dict[str, float]:
    """Start a server and load it."""
    ours = not isinstance(engine, Rival)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with served(command_of(engine, load, port, threads), port) as pid:
        warm = Load(min(2, load.clients), 0, 16, 4)
        asyncio.run(all_at_once(port, warm, ours, seed + 1000))
        meter, used, start = PackageMeter(), core_seconds(pid), time.perf_counter()
        answers = asyncio.run(all_at_once(port, load, ours, seed))
        seconds, used = time.perf_counter() - start, core_seconds(pid) - used
        joules = meter.joules() if meter.readable else None
    tokens = sum(answer.tokens for answer in answers)
    first = sorted(answer.arrived[0] - answer.sent for answer in answers)
    gaps = sorted(b - a for x in answers for a, b in zip(x.arrived, x.arrived[1:], strict=False))
    found = {
        "tokens_per_second": tokens / seconds,
        "first_50": quantile(first, 0.5), "first_95": quantile(first, 0.95),
        "gap_50": quantile(gaps, 0.5), "gap_99": quantile(gaps, 0.99),
        "core_seconds_per_token": used / tokens,
    }  # fmt: skip
    return found if joules is None else found | {"joules_per_token": joules / tokens}


def quantile(ordered: list[float], share: float) -> float:
    """Of values in ascending order: the smallest that so many do not exceed."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def table(results: dict[str, Any]) -> str:
    """Medians over rounds, as Markdown."""
    lines = [
        "| load | engine | answers' tokens/s | ours is | first token: median, 95 % (s) "
        "| between tokens: median, 99 % (ms) | core seconds a token |",
        "|---|---|---|---|---|---|---|",
    ]
    for load, engines in results["loads"].items():
        for name, rounds in engines.items():
            middle = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
            ratios = [
                a["tokens_per_second"] / b["tokens_per_second"]
                for a, b in zip(engines[OURS], rounds, strict=False)
            ]
            ratio = "" if name == OURS else f"{statistics.median(ratios):.2f} times as fast"
            lines.append(
                f"| {load} | {name} | {middle['tokens_per_second']:.1f} | {ratio} "
                f"| {middle['first_50']:.2f}, {middle['first_95']:.2f} "
                f"| {1e3 * middle['gap_50']:.0f}, {1e3 * middle['gap_99']:.0f} "
                f"| {middle['core_seconds_per_token']:.4f} |"
            )
    return "\n".join(lines)


def publish(results: dict[str, Any]) -> None:
    """Rewrite what lies beside this file."""
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    readme = HERE / "README.md"
    before, _, rest = readme.read_text().partition(START)
    readme.write_text(f"{before}{START}\n{table(results)}\n{END}{rest.partition(END)[2]}")


def main() -> None:
    """All loads and engines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--against", action="append", default=[], type=Rival.parse,
                        metavar="NAME=LLAMA_SERVER,GGUF[,FLAG...]")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--loads", type=int, nargs="*", help="numbers of loads, from 0")
    arguments = parser.parse_args()
    threads = machine()["threads"]
    engines: dict[str, Rival | Path] = {OURS: arguments.model}
    engines |= {rival.name: rival for rival in arguments.against}
    results: dict[str, Any] = {"machine": machine(), "loads": {}}
    chosen = LOADS if arguments.loads is None else [LOADS[i] for i in arguments.loads]
    order = random.Random(0)
    for seed in range(arguments.rounds):
        for load in chosen:
            kept = results["loads"].setdefault(load.name, {name: [] for name in engines})
            for name in order.sample(list(engines), len(engines)):
                found = measure(engines[name], load, threads, seed)
                kept[name].append(found)
                print(load.name, name, {k: round(v, 4) for k, v in found.items()}, flush=True)
        publish(results)


if __name__ == "__main__":
    main()
