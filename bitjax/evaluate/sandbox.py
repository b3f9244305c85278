"""Programs that models write, run where they can do no harm.

Each runs in a process of its own: isolated Python with the standard library alone, an empty
environment and directory, limits of time, memory and output, and a filter of system calls under
which there are no files, no network and no further processes (`sandbox_process.py`). The process is
killed when its time is up. A system without such filters (Linux has them) runs nothing.

A program has passed if it ran to its end: an assertion that fails, or leaving early, has not. It is
not kept from finding out how it is judged: a model that was trained to deceive could pretend.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bitjax.tokenizer import utf8

SECONDS = 3  # as the paper of HumanEval has it (arXiv 2107.03374, its published code)
MEMORY = 1 << 29  # bytes of address space, the interpreter's own included
_PROCESS = Path(__file__).with_name("sandbox_process.py")
_STARTING = 10  # seconds for starting Python on a busy machine, which is not the program's time


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    Attributes:
        passed: it ran to its end.
        said: its error, or what ended it; empty if it passed.
    """

    passed: bool
    said: str = ""


def run_program(program: str, seconds: int = SECONDS, memory: int = MEMORY) -> Outcome:
    """Run a program.

    Args:
        program: in Python.
        seconds: of computing; of waiting, `_STARTING` more.
        memory: bytes of address space.
    """
    token = secrets.token_hex(16)
    task = {"program": program, "token": token, "seconds": seconds, "memory": memory}
    try:
        raw = utf8(json.dumps(task, ensure_ascii=False))
    except ValueError:
        return Outcome(False, "not Unicode")
    with (
        tempfile.TemporaryDirectory(prefix="bitjax-") as folder,
        tempfile.TemporaryFile() as output,
    ):
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(_PROCESS)], stdin=subprocess.PIPE, stdout=output,
            stderr=subprocess.DEVNULL, cwd=folder, env={}, start_new_session=True,
        )  # fmt: skip
        try:
            process.communicate(raw, timeout=seconds + _STARTING)
        except subprocess.TimeoutExpired:
            return Outcome(False, f"ran for more than {seconds + _STARTING} s")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        output.seek(0)
        return _outcome(process.returncode, output.read(), token, seconds)


def _outcome(code: int, raw: bytes, token: str, seconds: int) -> Outcome:
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return Outcome(False, f"computed for more than {seconds} s")
    try:
        result = json.loads(raw)
        if secrets.compare_digest(str(result.get("token", "")).encode(), token.encode()):
            return Outcome(True)
        return Outcome(False, str(result["error"]))
    except (ValueError, KeyError, AttributeError):
        return Outcome(False, f"ended with {code} and said nothing")


def require_sandbox() -> None:
    """Run a program that does nothing.

    Raises:
        ValueError: this system cannot hold programs back; none was run.
    """
    outcome = run_program("pass")
    if not outcome.passed:
        raise ValueError(f"programs are run only where their system calls can be filtered, on "
                         f"Linux for x86-64 or arm64; here: {outcome.said}")  # fmt: skip
