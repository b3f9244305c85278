"""What other engines' llama-bench and llama-batched-bench print, as recorded."""

import pytest

from bitjax.bench.rivals import batched_rate, bench_rate

HEADER = """\
|    PP |     TG |    B |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |      T s |    S t/s |
|-------|--------|------|--------|----------|----------|----------|----------|----------|----------|
"""
IK = (
    """\
main: n_kv_max = 5120, n_batch = 2048, n_ubatch = 512, flash_attn = 1, is_pp_shared = 0, \
n_gpu_layers = -1, n_threads = 2, n_threads_batch = 2
"""
    + HEADER
    + """\
|   128 |      4 |    1 |    132 |    0.638 |   200.78 |    0.096 |    41.81 |    0.733 |   180.03 |
|   128 |      4 |    8 |   1056 |    5.546 |   184.65 |    0.437 |    73.23 |    5.983 |   176.51 |
|   128 |      4 |   32 |   4224 |   31.499 |   130.04 |    2.013 |    63.58 |   33.512 |   126.04 |
"""
)
BITNET = (
    """\
main: n_kv_max = 5120, n_batch = 2048, n_ubatch = 512, flash_attn = 0, is_pp_shared = 1, \
n_gpu_layers = -1, n_threads = 2, n_threads_batch = 2
"""
    + HEADER
    + """\
|   128 |      8 |    8 |    192 |    0.979 |   130.71 |    0.865 |    74.01 |    1.844 |   104.12 |
|   128 |      8 |   32 |    384 |    0.991 |   129.12 |    3.261 |    78.51 |    4.252 |    90.31 |
"""
)
LLAMA = (
    """\
llama_batched_bench: n_kv_max = 5120, n_batch = 2048, n_ubatch = 512, flash_attn = -1, \
is_pp_shared = 1, is_tg_separate = 0, n_gpu_layers = -1, n_threads = 2, n_threads_batch = 2
"""
    + HEADER
    + """\
|   128 |      4 |    8 |    160 |    2.224 |    57.56 |    0.839 |    38.14 |    3.063 |    52.24 |
"""
)


@pytest.mark.parametrize(
    ("text", "sequences", "rate"),
    [(IK, 1, 41.81), (IK, 8, 73.23), (IK, 32, 63.58), (BITNET, 8, 74.01), (LLAMA, 8, 38.14)],
)
def test_the_decode_rate_of_a_row(text, sequences, rate):
    assert batched_rate(text, sequences) == rate


@pytest.mark.parametrize("text", ["", "error", HEADER, IK[:-8].replace("63.58", "nothing")])
def test_no_such_row(text):
    assert batched_rate(text, 32) is None


def test_another_number_of_sequences():
    assert batched_rate(BITNET, 4) is None


def test_llama_bench():
    recorded = """\
[
WARNING: Behavior may be unexpected when allocating 0 bytes for ggml_calloc!
  {
    "n_gen": 64,
    "avg_ns": 2345484820,
    "avg_ts": 27.286469,
    "stddev_ts": 0.000000,
    "samples_ts": [ 27.2865 ]
  }
]
"""
    assert bench_rate(recorded) == 27.286469
    assert bench_rate('[{"avg_ts": 8}]') == 8
    assert bench_rate("[\n]\n") is None
