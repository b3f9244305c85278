"""Time a packed model: decoding, prompts, batches, loading and memory; other engines in turn.

The measured quantities, as other engines' benchmarks have them:

    decode      tokens/s of one sequence, each token fed back, from a short context
    prompt P    tokens/s of a prompt of P tokens, up to the first drawn token
    context C   tokens/s of one sequence over the last tokens before position C
    batch B     tokens/s of B sequences together while decoding, after prompts of 128 tokens
    shared B    the same after one prompt that all of them share

The floor of a decoded token is the bytes that it must read (packed layers, norms, head and cache)
over the memory's read bandwidth; of a prompt, its integer operations over the dot product's peak.
Both limits are measured in the same run. Resident memory, with the pages of the mapped file, is the
process's peak up to each kind of work. Rounds of everything are interleaved, so that a noisy
machine's moods meet all engines alike; ratios are taken round by round.

Energy, `bitjax.bench.energy`, is that of the decode.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bitjax import terminal
from bitjax.api import load
from bitjax.bench.ceilings import dot_peak, read_bandwidth, threads
from bitjax.bench.energy import PackageMeter, modelled_joules
from bitjax.bench.machine import machine, peak_resident
from bitjax.bench.rivals import Rival
from bitjax.config import CacheDType
from bitjax.infer import Generator, SamplingParams
from bitjax.model import Transformer, bit_linears
from bitjax.ops import ffi
from bitjax.ops.reference import KEY_BLOCK

DECODED = 64  # tokens a decode round times
BATCH_PROMPT, BATCH_DECODED = 128, 32
SHORT_PROMPT = 16
LONG_CONTEXT = 4096


def bench_model(
    path: Path,
    prompts: Sequence[int],
    contexts: Sequence[int] | None,
    batches: Sequence[int],
    rivals: Sequence[Rival],
    rounds: int,
    cache_dtype: CacheDType = "bfloat16",  # other engines: float16
    workers: int | None = None,
) -> dict[str, Any]:
    """Print a table of rates, their spread and fraction of each limit; then one line of JSON.

    Args:
        path: a packed model file.
        prompts: prompt lengths.
        contexts: positions that one sequence is decoded up to; None: 4,096, or the model's limit.
        batches: numbers of sequences.
        rivals: other engines, which take their turn in every round.
        rounds: interleaved repetitions; medians are reported.
        cache_dtype: of keys and values.
        workers: threads of every engine; all that this process may use if None.

    Raises:
        ValueError: not a model file, a prompt beyond the context, or an engine that fails.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a model file")
    with contextlib.ExitStack() as stack:
        stack.callback(ffi.set_threads, ffi.set_threads(workers))
        workers = workers or threads()
        started = time.perf_counter()
        model = load(path, check=False)
        generator = Generator(model, cache_dtype)
        loaded = time.perf_counter() - started
        _decode(generator, 1, SHORT_PROMPT, 2)
        first_token = time.perf_counter() - started
        works: dict[str, Any] = {"decode": lambda: _decode(generator, 1, SHORT_PROMPT, DECODED)}
        for P in prompts:
            works[f"prompt {P}"] = lambda P=P: _prompt(generator, P)
        limit = model.config.max_seq_len
        if contexts is None:
            contexts = [min(LONG_CONTEXT, limit)]
        if beyond := [C for C in contexts if limit < C]:
            raise ValueError(f"--context {beyond[0]} is beyond the model's context of {limit}")
        for C in contexts:
            works[f"context {C}"] = lambda C=C: _decode(generator, 1, C - DECODED - 2, DECODED)
        for B in batches:
            works[f"batch {B}"] = lambda B=B: _decode(generator, B, BATCH_PROMPT, BATCH_DECODED)
            works[f"shared {B}"] = lambda B=B: _decode(
                generator, B, BATCH_PROMPT, BATCH_DECODED, shared=True
            )
        resident = {}  # the highest so far, before the limits are measured with arrays of their own
        for name, work in works.items():
            work()  # compiles
            resident[name] = peak_resident()

        rates: dict[str, list[float]] = {name: [] for name in works}
        theirs: dict[str, dict[str, list[float]]] = {
            r.name: {name: [] for name in works} for r in rivals
        }
        read, peak, joules = [], [], []
        meter = PackageMeter()
        for _ in range(rounds):
            read.append(read_bandwidth(workers))
            peak.append(dot_peak(workers))
            for name, work in works.items():
                rates[name].append(work())
                for rival in rivals:
                    rate = rival.measure(name, workers, BATCH_PROMPT, BATCH_DECODED)
                    if rate is not None:
                        theirs[rival.name][name].append(rate)
            if meter.readable:
                joules.append(_decode_joules(generator, meter))
        limits = _limits(model, cache_dtype, statistics.median(read), statistics.median(peak))
        results = {
            name: {
                "tokens_per_s": statistics.median(values),
                "slowest": min(values),
                "fastest": max(values),
                "limit": limits(name),
                "of_limit": statistics.median(values) / limits(name),
                "against": {
                    rival: _ratio(values, other[name])
                    for rival, other in theirs.items()
                    if other[name]
                },
            }
            for name, values in rates.items()
        }
        document: dict[str, Any] = {
            **machine(),
            "threads": workers,
            "model": path.name,
            "cache": cache_dtype,
            "file_bytes": path.stat().st_size,
            "load_s": loaded,
            "first_token_s": first_token,
            "peak_resident_bytes": resident,
            "read_gb_per_s": [value / 1e9 for value in read],
            "peak_gop_per_s": [value / 1e9 for value in peak],
            "results": results,
            "energy": _energy(model, joules),
            "rivals": theirs,
        }
        _print_table(document)
        print(json.dumps(document))
        return document


def _decode(
    generator: Generator, sequences: int, prompt: int, count: int, shared: bool = False
) -> float:
    """Tokens per second of all sequences together; the first tokens are not timed."""
    tokens = _begun(generator, sequences, prompt, count, shared)
    started = time.perf_counter()
    for _ in range(count):
        next(tokens)
    return sequences * count / (time.perf_counter() - started)


def _decode_joules(generator: Generator, meter: PackageMeter) -> float:
    """Joules per token of the work that `decode` times."""
    tokens = _begun(generator, 1, SHORT_PROMPT, DECODED, shared=False)
    meter.joules()
    for _ in range(DECODED):
        next(tokens)
    return meter.joules() / DECODED


def _begun(
    generator: Generator, sequences: int, prompt: int, count: int, shared: bool
) -> Iterator[np.ndarray]:
    """Steps of a generation that has taken the first two: the prompt's, and a decode step's."""
    prompts = _random_prompts(generator, 1 if shared else sequences, prompt)
    if shared:
        prompts *= sequences
    params = [SamplingParams(max_new_tokens=count + 2, temperature=0)] * sequences
    tokens = generator.tokens(prompts, params)
    next(tokens)
    next(tokens)
    return tokens


def _prompt(generator: Generator, length: int) -> float:
    params = [SamplingParams(max_new_tokens=1, temperature=0)]
    prompts = _random_prompts(generator, 1, length)
    started = time.perf_counter()
    next(generator.tokens(prompts, params))
    return length / (time.perf_counter() - started)


def _random_prompts(generator: Generator, sequences: int, length: int) -> list[list[int]]:
    limit = generator.config.max_seq_len
    if length < 1:
        raise ValueError(f"a context must be more than the {DECODED + 2} tokens that are decoded")
    if length >= limit:
        raise ValueError(f"a prompt of {length} tokens leaves no room in the context of {limit}")
    rng = np.random.default_rng(0)
    return rng.integers(0, generator.config.vocab_size, (sequences, length)).tolist()


def _limits(model: Transformer, cache_dtype: CacheDType, read: float, peak: float) -> Any:
    """The most tokens per second that each kind of work can reach on this machine."""
    config = model.config
    packed = [layer.weight.get_value() for _, layer in bit_linears(model)]
    # Of columns, a token reads those of non-zero activations, in place of as many rows or more.
    layers = sum(p.nbytes - (0 if p.columns is None else p.columns.nbytes) for p in packed)
    # Of a screened head, a token reads the screen and little of the table.
    head = next(p for p in (model.screen, model.head, model.embedding) if p is not None).get_value()
    head_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(head))
    weights = sum(np.prod(p.shape) for p in packed)
    cache = jax.eval_shape(lambda: model.empty_cache(1, KEY_BLOCK, cache_dtype))
    cache_slot = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)) / KEY_BLOCK
    head_weights = config.vocab_size * config.hidden_size

    def limit(name: str) -> float:
        kind, _, size = name.partition(" ")
        if kind == "prompt":
            return peak / (2 * float(weights))
        sequences, slots = {
            "decode": lambda: (1, SHORT_PROMPT + DECODED / 2),
            "context": lambda: (1, int(size) - DECODED / 2),
            "batch": lambda: (int(size), BATCH_PROMPT + BATCH_DECODED / 2),
            "shared": lambda: (int(size), BATCH_PROMPT + BATCH_DECODED / 2),
        }[kind]()
        moved = layers + head_bytes + sequences * cache_slot * slots
        work = 2 * sequences * float(weights + head_weights)
        return sequences / max(moved / read, work / peak)

    return limit


def _energy(model: Transformer, measured: list[float]) -> dict[str, Any]:
    """What a decoded token costs, measured or modelled; and the arithmetic of it in float16."""
    context = SHORT_PROMPT + DECODED // 2
    parts = modelled_joules(model, context)
    return {
        "source": "measured" if measured else "modelled",
        "joules_per_token": statistics.median(measured or [sum(parts.values())]),
        "rounds": measured,
        "modelled": parts,
        "modelled_float16": modelled_joules(model, context, quantized=False),
    }


def _ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def _print_table(document: dict[str, Any]) -> None:
    rows = []
    for name, r in document["results"].items():
        rows.append((
            name, "bitjax", f"{r['tokens_per_s']:.1f} ({r['slowest']:.1f}-{r['fastest']:.1f})",
            f"{r['of_limit']:.0%} of {r['limit']:.0f}",
        ))  # fmt: skip
        for rival, ratio in r["against"].items():
            rate = statistics.median(document["rivals"][rival][name])
            spread = "{median:.2f}x ({lowest:.2f}-{highest:.2f})".format(**ratio)
            rows.append(("", rival, f"{rate:.1f}", f"bitjax is {spread}"))
    size = document["file_bytes"]
    rows.append((
        "load", "bitjax", f"{document['first_token_s']:.2f} s",
        f"to the first token; file of {size / 1e9:.2f} GB",
    ))  # fmt: skip
    for name in dict.fromkeys(("decode", list(document["results"])[-1])):
        resident = document["peak_resident_bytes"][name]
        rows.append((
            "memory", "bitjax", f"{resident / 1e9:.2f} GB",
            f"peak up to {name}, {resident / size:.2f}x the file",
        ))  # fmt: skip
    energy = document["energy"]
    float16 = sum(energy["modelled_float16"].values()) / sum(energy["modelled"].values())
    rows.append((
        "energy", energy["source"], f"{energy['joules_per_token']:.3g} J a token",
        f"arithmetic: float16 takes {float16:.1f}x",
    ))  # fmt: skip
    read, peak = (statistics.median(document[key]) for key in ("read_gb_per_s", "peak_gop_per_s"))
    terminal.table(
        ("work", "engine", "tokens/s", "limit, or ratio"),
        rows,
        title=f"{document['model']}, {document['threads']} threads; memory reads {read:.1f} GB/s, "
        f"dot products {peak:.0f} GOP/s",
    )
