"""Every row of the table of speeds: bitjax and other engines, interleaved.

    python experiments/inference_limit/run.py MODELS --rounds 4 \\
        --engine "bitnet.cpp=llama-bench,bn-i2_s.gguf" \\
        --engine "ik R4=llama-bench,ik-iq2_bn.gguf,-rtr,1"

MODELS is a folder for the dummy models, which are written where they are missing. A round runs
`bitjax bench` once for each part below, with the engines that the part names and that were given.
Every result is kept in `results.json` as it comes; started again, the command adds the rounds that
are missing (`--fresh` forgets those that are there). Rewrites the table in `README.md` beside this
file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitjax.bench.rivals import Rival
from bitjax.cli import main as bitjax
from bitjax.replacing import replace_text

HERE = Path(__file__).parent
START, END = "<!-- results -->", "<!-- end of results -->"

SHAPE_2B = ("b1.58-2b4t",)
MODELS = {
    "2b": (*SHAPE_2B, "--tables", "screened"),
    "2b-columns": (*SHAPE_2B, "--tables", "screened", "--columns"),
    "2b-2bits": (*SHAPE_2B, "--bits", "2", "--tables", "int4"),
    "100b": ("100b",),
}
ONE = ("ik R4", "ik IQ2_BN", "ik IQ1_BN", "bitnet.cpp", "llama.cpp TQ2_0", "llama.cpp Q4_0")


@dataclass(frozen=True)
class Part:
    """One `bitjax bench`: its model, options, kernel ("": the best), and other engines."""

    name: str
    model: str
    options: str
    engines: tuple[str, ...] = ()
    kernel: str = ""
    rounds: int = 99  # at most, for what takes minutes


PARTS = (
    Part("two threads", "2b-columns", "--prompt 128 512 --context 4096 --batch", ONE),
    Part("without columns", "2b", "--prompt --context --batch", ONE[:4]),
    Part("one thread", "2b", "--threads 1 --prompt 128 512 --context --batch", ("ik R4",)),
    Part("one thread, prompts of 128", "2b", "--threads 1 --prompt 128 --context --batch",
         ("bitnet.cpp", "ik IQ2_BN")),
    Part("AVX2", "2b-2bits", "--prompt 128 --context --batch", ("bitnet.cpp",), "avx2"),
    Part("AVX2, one thread", "2b-2bits", "--threads 1 --prompt 128 --context --batch",
         ("bitnet.cpp",), "avx2"),
    Part("batches", "2b", "--prompt --context --batch 8 32", ("ik R4",)),
    Part("batches, once", "2b", "--prompt --context --batch 8 32",
         ("bitnet.cpp", "llama.cpp TQ2_0"), rounds=1),
    Part("large batches", "2b", "--prompt --context --batch 32 128", ("ik R4",), rounds=1),
    Part("100B", "100b", "--prompt 128 512 --context --batch", rounds=2),
)  # fmt: skip


def measure(part: Part, models: Path, engines: dict[str, str]) -> dict[str, Any]:
    """The JSON of one round of a part."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "bitjax.cli",
        "bench",
        str(models / f"{part.model}.safetensors"),
    ]
    command += [*part.options.split(), "--cache", "int8", "--rounds", "1"]
    for name in part.engines:
        if name in engines:
            command += ["--against", engines[name]]
    environment = os.environ | ({"BITJAX_KERNEL": part.kernel} if part.kernel else {})
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def table(rounds: list[dict[str, Any]]) -> str:
    """Markdown: for each work of each part, our rate, its share of the limit, and each engine."""
    lines = [
        "| work | bitjax, tokens/s | of the limit | other engines: ratio of bitjax to them |",
        "|---|---|---|---|",
    ]
    for part in PARTS:
        of_part = [r["document"] for r in rounds if r["part"] == part.name]
        if not of_part:
            continue
        for work in of_part[0]["results"]:
            results = [document["results"][work] for document in of_part]
            ours = [r["tokens_per_s"] for r in results]
            # Of the highest limit of all rounds: a moment's noise makes one too low.
            share = f"{statistics.median(ours) / max(r['limit'] for r in results):.0%}"
            others = []
            for engine in part.engines:
                theirs = [document["rivals"].get(engine, {}).get(work, []) for document in of_part]
                both = [(a, *b) for a, b in zip(ours, theirs, strict=True) if b]
                if both:
                    ratios = spread([a / b for a, b in both], "{:.2f}x")
                    others.append((statistics.median(b for _, b in both), engine, ratios))
            cells = "; ".join(f"{e} {rate:.0f}: {ratio}" for rate, e, ratio in sorted(others)[::-1])
            lines.append(f"| {part.name}: {work} | {spread(ours, '{:.3g}')} | {share} | {cells} |")
        first = statistics.median(document["first_token_s"] for document in of_part)
        peak = max(document["peak_resident_bytes"]["decode"] for document in of_part)
        size = of_part[0]["file_bytes"]
        read, dots = (
            spread([x for document in of_part for x in document[key]], "{:.0f}")
            for key in ("read_gb_per_s", "peak_gop_per_s")
        )
        lines.append(
            f"| {part.name}: rounds, the machine | {len(of_part)} | {read} GB/s, {dots} GOP/s "
            f"| first token after {first:.2f} s; peak memory up to decode {peak / 1e9:.2f} GB, "
            f"{peak / size:.2f}x the file of {size / 1e9:.2f} GB |"
        )
    return "\n".join(lines)


def spread(values: list[float], form: str) -> str:
    low, middle, high = (form.format(f(values)) for f in (min, statistics.median, max))
    return middle if low == high else f"{middle} ({low}-{high})"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("models", type=Path)
    parser.add_argument(
        "--engine", action="append", default=[], metavar="NAME=LLAMA_BENCH,GGUF[,FLAG...]"
    )
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--parts", nargs="+", default=[p.name for p in PARTS], metavar="PART")
    parser.add_argument("--fresh", action="store_true")
    arguments = parser.parse_args()
    try:
        engines = {Rival.parse(text).name: text for text in arguments.engine}
    except ValueError as error:
        parser.error(str(error).replace("--against", "--engine"))
    if unknown := [name for name in engines if name not in ONE]:
        parser.error(f"no part has an engine {unknown[0]!r}; those known: {', '.join(ONE)}")
    if unknown := set(arguments.parts) - {part.name for part in PARTS}:
        parser.error(f"no part {min(unknown)!r}; there are: {'; '.join(p.name for p in PARTS)}")
    parts = [part for part in PARTS if part.name in arguments.parts]
    arguments.models.mkdir(parents=True, exist_ok=True)
    for name in dict.fromkeys(part.model for part in parts):
        path = arguments.models / f"{name}.safetensors"
        if not path.exists() and (code := bitjax(["dummy", *MODELS[name], "-o", str(path)])):
            return code
    store = HERE / "results.json"
    rounds = json.loads(store.read_text()) if store.exists() and not arguments.fresh else []
    for number in range(arguments.rounds):
        for part in parts:
            if number >= part.rounds or sum(r["part"] == part.name for r in rounds) > number:
                continue
            print(f"round {number + 1} of {arguments.rounds}: {part.name}", flush=True)
            try:
                document = measure(part, arguments.models, engines)
            except subprocess.CalledProcessError as error:  # which has said why
                return error.returncode
            rounds.append({"part": part.name, "document": document})
            replace_text(store, json.dumps(rounds, indent=1) + "\n")
    made = table(rounds)
    readme = HERE / "README.md"
    before, rest = readme.read_text().split(START)
    replace_text(readme, f"{before}{START}\n{made}\n{END}{rest.split(END)[1]}")
    print(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
