"""Other engines, timed by their own program: `llama-bench` of llama.cpp and its forks."""

from __future__ import annotations

import dataclasses
import json
import subprocess
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

    def measure(self, work: str, threads: int) -> float | None:
        """Tokens per second at "decode" or "prompt P"; None for work that llama-bench has not.

        Raises:
            ValueError: the program fails or prints no JSON.
        """
        kind, _, size = work.partition(" ")
        if kind in ("batch", "context"):  # older ones cannot begin at a depth
            return None
        sizes = {
            "decode": ("-p", "0", "-n", "64"),
            "prompt": ("-p", size, "-n", "0"),
        }[kind]
        command = [str(self.program), "-m", str(self.model), "-t", str(threads), *sizes,
                   "-r", "1", "-o", "json", *self.flags]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        try:
            return float(json.loads(done.stdout)[-1]["avg_ts"])
        except (ValueError, LookupError, TypeError):
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"{' '.join(command)} failed: {last}") from None
