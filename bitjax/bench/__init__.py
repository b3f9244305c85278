"""Measuring: kernels, models, other engines, and the machine's own limits in the same run."""

from bitjax.bench.kernels import bench_kernels
from bitjax.bench.model import bench_model

__all__ = ["bench_kernels", "bench_model"]
