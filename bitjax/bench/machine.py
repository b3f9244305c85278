"""On what a benchmark ran: for its JSON."""

from __future__ import annotations

import platform
import resource
import sys
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


def peak_resident() -> int:
    """Bytes of memory that this process has held at most, pages of mapped files included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # getrusage(2): bytes there, kB here


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
