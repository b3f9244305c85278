"""Threads: a limit that a program sets, and one CPU that the system leaves to the process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import bitjax
from bitjax.ops import ffi

CODE = """
import os, sys
cpus = int(sys.argv[1])
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cpus])
sys.path.insert(0, sys.argv[2])
from tiny import tiny_model
from bitjax.infer import Generator, SamplingParams, pack_model
generator = Generator(pack_model(tiny_model(hidden_size=96, intermediate_size=200)))
done = generator.generate(["ab", "a longer prompt"], SamplingParams(max_new_tokens=20))
tasks = [open(f"/proc/self/task/{t}/comm").read() for t in os.listdir("/proc/self/task")]
print(sum("XLAEigen" in name for name in tasks), [c.text for c in done])
"""


def test_a_limit_is_set_and_lifted():
    try:
        bitjax.set_threads(3)
        assert ffi.set_threads(2) == 3
        bitjax.set_threads(None)
        assert ffi.set_threads(None) is None
        with pytest.raises(ValueError, match="wanted 1 or more"):
            bitjax.set_threads(0)
    finally:
        ffi.set_threads(None)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux has affinity masks")
def test_on_one_cpu_the_pool_has_one_thread_and_texts_are_the_same():
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("there is one CPU only")
    # Of two devices, which tests ask for, XLA's pool has two threads at least.
    clean = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    printed = [
        subprocess.run(
            [sys.executable, "-c", CODE, str(cpus), str(Path(__file__).parent)],
            check=True, capture_output=True, text=True, env=clean,
        ).stdout.split(maxsplit=1)
        for cpus in (1, 2)
    ]  # fmt: skip
    assert [int(threads) for threads, _ in printed] == [1, 2]
    assert printed[0][1] == printed[1][1]
