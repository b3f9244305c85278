"""Settings that contradict each other are refused in one sentence."""

import pytest

from bitjax.engine import EngineConfig, Sampling


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"presence_penalty": 2.5}, r"presence_penalty=2.5 is not in \[-2, 2\]"),
        ({"frequency_penalty": -3}, r"frequency_penalty=-3 is not in \[-2, 2\]"),
        ({"n": 0}, r"n=0 is not in 1\.\.1024"),
        ({"n": 2, "temperature": 0}, "n=2 samples at temperature 0 would all be the same"),
        ({"logprobs": 21}, r"logprobs=21 is not in 0\.\.20"),
        ({"stop": ("x",) * 65}, "65 stops; at most 64"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "logit_bias has 1025 tokens"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias has a number that is not finite"),
        ({"temperature": -1}, r"temperature=-1 is not in \[0, inf\)"),
        ({"top_p": 0}, r"top_p=0 is not in \(0, 1\]"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 is below 1"),
    ],
)
def test_sampling(changes, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_sequences": 0}, "max_sequences=0 is below 1"),
        ({"context": 1}, "context=1 is below 2"),
        ({"memory": 0}, "memory=0 is not above 0"),
        ({"memory_share": 1.5}, r"memory_share=1.5 is not in \(0, 1\]"),
        ({"step_tokens": 0}, "step_tokens=0 is below 1"),
        ({"lookup": -1}, "lookup=-1 is below 0"),
        ({"lookup_rows": -1}, "lookup_rows=-1 is below 0"),
        ({"cache_dtype": "int4"}, "cache_dtype='int4' is not one of float32, bfloat16, int8"),
        ({"memory": 1e9}, r"memory=1000000000\.0 is not of type int or None"),
        ({"max_sequences": "8"}, "max_sequences='8' is not of type int"),
    ],
)
def test_sizes(changes, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**changes)
