"""A strict run: two CPU devices, rank promotion raises, warnings are errors (pyproject.toml).

Programs compiled once are shared by all tests of a run, subprocesses included.
"""

import atexit
import os
import shutil
import tempfile

if "PYTEST_XDIST_WORKER" in os.environ:
    cache = os.environ["JAX_COMPILATION_CACHE_DIR"]  # that of the process which started this one
else:
    cache = tempfile.mkdtemp(prefix="bitjax-test-")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
# Tables are as wide as they need: readline, which pytest loads, tells child processes, its workers
# too, of a screen of 80 columns.
os.environ.pop("COLUMNS", None)
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
)
os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
os.environ["BITJAX_CACHE_DIR"] = ""  # jax's serves
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
