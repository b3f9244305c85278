"""On what a benchmark ran: for its JSON."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import jax

from bitjax import __version__
from bitjax.bench.ceilings import threads
from bitjax.ops import ffi


def machine() -> dict[str, Any]:
    """Processor, threads, versions and active kernel."""
    return {
        "bitjax": __version__,
        "jax": jax.__version__,
        "processor": _processor(),
        "threads": threads(),
        "kernel": ffi.active_kernel() if ffi.available() else "reference",
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
