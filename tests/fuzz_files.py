"""Damaged files: whatever their bytes, a model is read or refused with one sentence.

    python tests/fuzz_files.py --cases 100000 [--jobs 2] [--state FILE]

A case is a seed: it names the format, the valid file, and the damage (`fuzz_mutations`). Everything
there is to read is then read: all tensors, the tables of contents, the tokenizer. Allowed are
success, with the shapes of the configuration, and a ValueError that names the file in printable
characters on one line.
Anything else is a failure, and so is the death of the process, a case of more than 20 s, and one
that takes more than 1 GiB of address space (files have a few hundred KB).

Cases run in child processes, of which one that dies or hangs is replaced and the rest goes on. With
--state, a run that was interrupted goes on where it stopped. `--show SEED` runs one case here.
"""

import argparse
import contextlib
import json
import os
import random
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import fuzz_mutations as damage

CASE_SECONDS = 20
CASE_BYTES = 2**30
FORMATS = ("bitjax", "huggingface", "gguf")


def seed_files(folder):
    """Valid models of every form: format -> folders, or files, to be copied and damaged."""
    from gguf_seeds import seeds as gguf_files
    from texts import small_tokenizer
    from tiny import tiny_model

    from bitjax.infer import pack_model
    from bitjax.interop.gguf import write_gguf
    from bitjax.interop.huggingface import write_huggingface
    from bitjax.interop.model_file import checkpoint_of
    from bitjax.model.files import save_model
    from bitjax.tokenizer import BYTES

    def model(**changes):
        made = tiny_model(
            **(
                {"num_layers": 1, "hidden_size": 24, "intermediate_size": 20, "head_dim": 6}
                | changes
            )
        )
        made.tokenizer = small_tokenizer()
        return made

    llama = {"sub_norm": False, "activation": "silu"}
    folder.mkdir(parents=True)
    found = {kind: [] for kind in FORMATS}

    def path(kind):
        found[kind].append(folder / f"{kind}-{len(found[kind])}")
        return found[kind][-1]

    trained = model(tie_embeddings=False, vocab_size=300)
    save_model(path("bitjax"), trained)
    for layout, tables in (("ternary2", "bfloat16"), ("ternary1.6", "int4"), ("ternary2", "int8")):
        save_model(path("bitjax"), pack_model(trained, layout, tables))
    save_model(path("bitjax"), pack_model(trained, "ternary2", "screened", columns=True))
    norms = model(linear_norm_eps=1e-6, float_layers=("*.o",), vocab_size=300)
    save_model(path("bitjax"), pack_model(norms))

    for form, changes in (
        ("packed", {}),
        ("packed", llama | {"tie_embeddings": False}),
        ("packed", llama | {"linear_norm_eps": 1e-6, "float_layers": ("*.o",)}),
        ("bfloat16", {}),
        ("float32", llama | {"weights": "float", "activations": "float"}),
    ):
        made = model(vocab_size=300, **changes)
        write_huggingface(path("huggingface"), checkpoint_of(made), form)
    write_huggingface(path("huggingface"), checkpoint_of(made), "bfloat16", shard_bytes=8000)

    for kind in ("F16", "I2_S", "TQ1_0"):
        wide = (
            {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64} if kind != "F16" else {}
        )
        made = model(vocab_size=300, **llama, **wide)
        made.tokenizer = BYTES  # the other one's way of cutting words has no name in GGUF
        write_gguf(path("gguf"), checkpoint_of(made), kind)
    for raw in gguf_files():
        path("gguf").write_bytes(raw)
    return found


def damaged_copy(sources, seed, folder):
    """Write the case of a seed into `folder`; returns the path of the model."""
    rng = random.Random(seed)
    kind = FORMATS[seed % len(FORMATS)]
    source, target = rng.choice(sources[kind]), folder / "model"
    shutil.rmtree(target, ignore_errors=True)
    target.unlink(missing_ok=True)
    if source.is_file():
        mutate = damage.damaged_gguf if kind == "gguf" else damage.damaged_safetensors
        target.write_bytes(mutate(rng, source.read_bytes()))
        return target
    shutil.copytree(source, target)
    files = sorted(target.iterdir())
    tensors = [file for file in files if file.suffix == ".safetensors"]
    texts = [file for file in files if file.suffix == ".json"]
    if rng.random() < 0.02:
        rng.choice(files).unlink()
    elif rng.random() < 0.5:
        file = rng.choice(tensors)
        file.write_bytes(damage.damaged_safetensors(rng, file.read_bytes()))
    else:
        weights = [3 if f.name in ("config.json", "tokenizer_config.json") else 1 for f in texts]
        file = rng.choices(texts, weights)[0]
        file.write_bytes(damage.damaged_json(rng, file.read_bytes()))
    return target


def outcome(path):
    """What reading everything comes to: "read", or the message of a ValueError.

    Raises:
        AssertionError: shapes are not those of the configuration, or the message does not name the
            file, or would do something to a terminal.
    """
    from bitjax.interop.checkpoint import tensor_shapes
    from bitjax.interop.formats import format_of, open_checkpoint
    from bitjax.interop.stored import contents

    try:
        checkpoint = open_checkpoint(path)
        for name, shape in tensor_shapes(checkpoint.config).items():
            assert tuple(checkpoint.read(name).shape) == shape, name
        assert contents(path, format_of(path), checkpoint.config).tensors
        if checkpoint.tokenizer is not None:
            tokens = checkpoint.tokenizer.encode("a caf\u00e9, 2 + 2")
            checkpoint.tokenizer.decode(tokens)
    except ValueError as error:
        message = str(error)
        assert str(path) in message, f"names no file: {message}"
        assert message.isprintable(), f"not on one line, or with control characters: {message!r}"
        return message
    return "read"


def run_case(sources, seed, folder):
    """`outcome` of a seed, or a traceback."""
    try:
        return outcome(damaged_copy(sources, seed, folder))
    except Exception:  # whatever it is, that is the finding
        return "FAILURE\n" + traceback.format_exc()


def worker(seeds, first, step):
    """Run cases without end, one JSON line each."""
    import resource

    sources = {
        kind: sorted(path for path in seeds.iterdir() if path.name.startswith(kind))
        for kind in FORMATS
    }
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(3):  # imports and compilations are not what is measured
            for source in sources[FORMATS[seed]]:
                assert outcome(source) == "read", source
        held = 1024 * int(Path("/proc/self/status").read_text().split("VmSize:")[1].split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (held + CASE_BYTES,) * 2)
        seed = first
        while True:
            started = time.perf_counter()
            found = run_case(sources, seed, Path(folder))
            seconds = time.perf_counter() - started
            print(json.dumps([seed, round(seconds, 4), found]), flush=True)
            seed += step


class Worker:
    """A child that runs the seeds `next, next + step, ...`."""

    def __init__(self, seeds, first, step):
        self.seeds, self.next, self.step = seeds, first, step
        self.restart()

    def restart(self):
        """Start, or start again with the next seed."""
        command = [sys.executable, __file__, "--worker", str(self.seeds), str(self.next),
                   str(self.step)]  # fmt: skip
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
        )
        self.deadline = time.monotonic() + 10 * CASE_SECONDS  # it imports and compiles first

    def lines(self, wait):
        """Results that have come, each (seed, seconds, what); deaths and hangs are results too."""
        ready, _, _ = select.select([self.process.stdout], [], [], wait)
        line = self.process.stdout.readline() if ready else b""
        if line:
            self.deadline = time.monotonic() + CASE_SECONDS
            self.next += self.step
            return [json.loads(line)]
        if self.process.poll() is not None:
            what = self.process.stderr.read().decode(errors="replace")[-2000:]
            what = f"FAILURE\nthe process ended with {self.process.returncode}: {what}"
        elif time.monotonic() > self.deadline:
            self.stop()
            what = f"FAILURE\nmore than {CASE_SECONDS} s"
        else:
            return []
        seed = self.next
        self.next += self.step
        self.restart()
        return [(seed, float("nan"), what)]

    def stop(self):
        """End the child."""
        self.process.kill()
        self.process.wait()


def run(cases, jobs, state):
    """Run seeds 0..cases-1; returns what came of them."""
    found = {"jobs": jobs, "next": list(range(jobs)), "read": dict.fromkeys(FORMATS, 0),
             "refused": dict.fromkeys(FORMATS, 0), "failures": {}, "slowest": [0.0, None],
             "seconds": 0.0}  # fmt: skip
    if state and state.exists():
        found = json.loads(state.read_text())
        jobs = found["jobs"]
    before, started, counted = found["seconds"], time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        seeds = Path(folder) / "seeds"
        seed_files(seeds)
        workers = [Worker(seeds, first, jobs) for first in found["next"]]
        try:
            while any(each.next < cases for each in workers):
                for each in workers:
                    if each.next >= cases:
                        continue
                    for seed, seconds, what in each.lines(0.05):
                        kind = FORMATS[seed % len(FORMATS)]
                        counted += 1
                        if what.startswith("FAILURE"):
                            found["failures"][str(seed)] = what
                            print(
                                f"seed {seed}, {kind}: {what}".encode(
                                    "ascii", "backslashreplace"
                                ).decode(),
                                flush=True,
                            )
                        else:
                            found["read" if what == "read" else "refused"][kind] += 1
                        found["slowest"] = max(
                            found["slowest"], [seconds, seed], key=lambda x: x[0]
                        )
                        if counted % 1000 == 0:
                            _save(found, workers, before + time.monotonic() - started, state)
                            print(_line(found), flush=True)
        finally:
            _save(found, workers, before + time.monotonic() - started, state)
            for each in workers:
                with contextlib.suppress(OSError):
                    each.stop()
    return found


def _save(found, workers, seconds, state):
    found["next"], found["seconds"] = [each.next for each in workers], seconds
    if state:
        state.write_text(json.dumps(found, indent=1))


def _line(found):
    count = sum(found["read"].values()) + sum(found["refused"].values()) + len(found["failures"])
    parts = [f"{kind}: {found['read'][kind]:,} read, {found['refused'][kind]:,} refused"
             for kind in FORMATS]  # fmt: skip
    return (
        f"{count:,} cases, {count / max(found['seconds'], 1e-9):.0f} a second; {'; '.join(parts)}; "
        f"{len(found['failures'])} failures; slowest {found['slowest'][0]:.2f} s (seed "
        f"{found['slowest'][1]})"
    )


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--state", type=Path)
    parser.add_argument("--show", type=int, metavar="SEED")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        seeds, first, step = arguments.worker
        worker(Path(seeds), int(first), int(step))
    elif arguments.show is not None:
        with tempfile.TemporaryDirectory() as folder:
            sources = seed_files(Path(folder) / "seeds")
            print(run_case(sources, arguments.show, Path(folder)))
    else:
        found = run(arguments.cases, arguments.jobs, arguments.state)
        print(_line(found))
        sys.exit(bool(found["failures"]))


if __name__ == "__main__":
    main()
