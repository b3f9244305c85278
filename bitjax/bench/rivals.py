"""Other engines, timed by their own programs: those of llama.cpp and its forks.

`llama-bench` times one sequence; `llama-batched-bench`, looked for beside it, many.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Rival:
    """A `llama-bench` and a GGUF file, with further flags.

    Attributes:
        name: in tables.
        program: path of `llama-bench`.
        model: path of the GGUF file.
        flags: passed on, e.g. `("-rtr", "1")`.
    """

    name: str
    program: Path
    model: Path
    flags: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Rival:
        """From `NAME=PROGRAM,MODEL[,FLAG...]`.

        Raises:
            ValueError: another form, or a file that is not there.
        """
        name, equals, rest = text.partition("=")
        parts = rest.split(",")
        if not (name and equals and len(parts) >= 2):
            raise ValueError(f"--against {text!r} is not NAME=LLAMA_BENCH,MODEL.gguf[,FLAG...]")
        program, model = Path(parts[0]), Path(parts[1])
        for path in (program, model):
            if not path.is_file():
                raise ValueError(f"--against {name}: there is no file {path}")
        return cls(name, program, model, tuple(parts[2:]))

    def measure(self, work: str, threads: int, prompt: int, decoded: int) -> float | None:
        """Tokens per second at "decode", "prompt P", "batch B" or "shared B".

        Args:
            work: as `bitjax.bench.model` names it.
            threads: of the engine.
            prompt, decoded: tokens of each sequence of a batch.

        Returns:
            None for a batch where there is no `llama-batched-bench`.

        Raises:
            ValueError: the program fails, or prints something else.
        """
        kind, _, size = work.partition(" ")
        if kind == "context":  # older ones cannot begin at a depth
            return None
        if kind in ("batch", "shared"):
            return self._measure_batch(int(size), kind == "shared", threads, prompt, decoded)
        sizes = ("-p", "0", "-n", "64") if kind == "decode" else ("-p", size, "-n", "0")
        command = [str(self.program), "-m", str(self.model), "-t", str(threads), *sizes,
                   "-r", "1", "-o", "json", *self.flags]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        rate = bench_rate(done.stdout)
        if rate is None:
            raise _failed(command, done)
        return rate

    def _measure_batch(
        self, sequences: int, shared: bool, threads: int, prompt: int, decoded: int
    ) -> float | None:
        program = self.program.with_name("llama-batched-bench")
        if not program.is_file():
            return None
        flags = list(self.flags)
        if "-rtr" in flags:  # takes a value in llama-bench, and none here
            del flags[flags.index("-rtr") + 1]
        # Sequences x all their tokens: enough also where an engine divides the context evenly.
        command = [str(program.resolve()), "-m", str(self.model.resolve()), *flags,
                   "-b", "2048", "-ub", "512", "-t", str(threads),
                   "-c", str(sequences * (prompt + decoded)),
                   "-tb", str(threads), "-npp", str(prompt), "-ntg", str(decoded),
                   "-npl", str(sequences), *(["-pps"] if shared else [])]  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:  # ik_llama.cpp leaves a log where it runs
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
        # ik_llama.cpp prints its table to the standard error.
        rate = batched_rate(f"{done.stdout}\n{done.stderr}", sequences)
        if rate is None:
            raise _failed(command, done)
        return rate


def _failed(command: list[str], done: subprocess.CompletedProcess[str]) -> ValueError:
    last = (done.stderr.strip().splitlines() or [f"no message, exit code {done.returncode}"])[-1]
    return ValueError(f"{' '.join(command)} failed: {last}")


def bench_rate(text: str) -> float | None:
    """Tokens per second from llama-bench's JSON; ik_llama.cpp prints warnings between its lines."""
    rates = re.findall(r'"avg_ts": *([0-9]+(?:\.[0-9]+)?)', text)
    return float(rates[-1]) if rates else None


def batched_rate(text: str, sequences: int) -> float | None:
    """Tokens per second of all sequences while decoding, from llama-batched-bench's table."""
    columns: list[str] = []
    for line in text.splitlines():
        if not line.startswith("|"):
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if "S_TG t/s" in cells and "B" in cells:
            columns = cells
        elif len(cells) == len(columns) and cells[columns.index("B")] == str(sequences):
            try:
                return float(cells[columns.index("S_TG t/s")])
            except ValueError:
                return None
    return None
