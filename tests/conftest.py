"""A strict run: two CPU devices, rank promotion raises, warnings are errors (pyproject.toml)."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
)

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
