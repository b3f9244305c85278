"""llama.cpp as an independent implementation: any GGUF file's logits, greedy text and tokens.

The package xllamacpp holds llama.cpp compiled, with its C interface exported; nothing of bitjax or
of the package's Python side is used. Structures are those of llama.h at the version that
pyproject.toml pins; `llama_context_default_params` shows whether they still are.
"""

import ctypes as c
import functools
import importlib.util

import numpy as np
import pytest

UINTS = (
    "n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq", "n_outputs_max",
    "n_outputs_max_per_seq", "n_threads", "n_threads_batch", "ctx_type", "rope_scaling_type",
    "pooling_type", "attention_type", "flash_attn_type",
)  # fmt: skip
FLOATS = ("base", "scale", "ext_factor", "attn_factor", "beta_fast", "beta_slow")
F32 = 0  # ggml type


class ContextParams(c.Structure):
    """llama_context_params; what follows the types of the cache stays as it comes."""

    _fields_ = (
        *((name, c.c_uint32) for name in UINTS),
        *((name, c.c_float) for name in FLOATS),
        ("yarn_orig_ctx", c.c_uint32), ("defrag_thold", c.c_float),
        ("cb_eval", c.c_void_p), ("cb_eval_user_data", c.c_void_p),
        ("type_k", c.c_int), ("type_v", c.c_int), ("rest", c.c_uint8 * 512),
    )  # fmt: skip


class ModelParams(c.Structure):
    """llama_model_params, only passed on. Larger than it is, which its callee does not see."""

    _fields_ = (("all", c.c_uint8 * 1024),)


class Batch(c.Structure):
    """llama_batch."""

    _fields_ = (
        ("n_tokens", c.c_int32), ("token", c.POINTER(c.c_int32)), ("embd", c.c_void_p),
        ("pos", c.POINTER(c.c_int32)), ("n_seq_id", c.POINTER(c.c_int32)),
        ("seq_id", c.POINTER(c.POINTER(c.c_int32))), ("logits", c.POINTER(c.c_int8)),
    )  # fmt: skip


SIGNATURES = {
    "backend_init": (None, []),
    "log_set": (None, [c.c_void_p, c.c_void_p]),
    "model_default_params": (ModelParams, []),
    "context_default_params": (ContextParams, []),
    "model_load_from_file": (c.c_void_p, [c.c_char_p, ModelParams]),
    "init_from_model": (c.c_void_p, [c.c_void_p, ContextParams]),
    "model_get_vocab": (c.c_void_p, [c.c_void_p]),
    "vocab_n_tokens": (c.c_int32, [c.c_void_p]),
    "get_memory": (c.c_void_p, [c.c_void_p]),
    "memory_clear": (None, [c.c_void_p, c.c_bool]),
    "batch_init": (Batch, [c.c_int32] * 3),
    "batch_free": (None, [Batch]),
    "decode": (c.c_int32, [c.c_void_p, Batch]),
    "get_logits": (c.POINTER(c.c_float), [c.c_void_p]),
    "tokenize": (
        c.c_int32,
        [c.c_void_p, c.c_char_p, c.c_int32, c.POINTER(c.c_int32), c.c_int32, c.c_bool, c.c_bool],
    ),
    "free": (None, [c.c_void_p]),
    "model_free": (None, [c.c_void_p]),
}
messages: list[str] = []  # errors and warnings of llama.cpp, for a failed assertion to show


@c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)
def _keep(level, text, _):
    if level in (3, 4):
        messages.append(text.decode(errors="replace"))


@functools.cache
def library():
    """The functions of llama.h, or a skip that says what is missing."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None:
        pytest.skip("xllamacpp (llama.cpp, compiled) is not installed; the extra 'parity' has it")
    found = c.CDLL(spec.submodule_search_locations[0] + "/xllamacpp.abi3.so")
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(found, f"llama_{name}")
        function.restype, function.argtypes = result, arguments
    found.llama_log_set(_keep, None)
    found.llama_backend_init()
    defaults = found.llama_context_default_params()
    expected = (512, 2048, 512, -1.0, 1, 1)
    names = ("n_ctx", "n_batch", "n_ubatch", "defrag_thold", "type_k", "type_v")
    assert tuple(getattr(defaults, name) for name in names) == expected, "llama.h has changed"
    return found


class LlamaCpp:
    """A model run by llama.cpp on the CPU, its cache in float32. Use as a context manager."""

    def __init__(self, path, length=512):
        self._lib = lib = library()
        self._model = lib.llama_model_load_from_file(
            str(path).encode(), lib.llama_model_default_params()
        )
        assert self._model, "".join(messages[-5:])
        params = lib.llama_context_default_params()
        for name in ("n_ctx", "n_batch", "n_ubatch", "n_outputs_max", "n_outputs_max_per_seq"):
            setattr(params, name, length)
        params.n_threads = params.n_threads_batch = 1  # more would spin where others compute
        params.flash_attn_type = 0  # disabled: it computes in float16
        params.type_k = params.type_v = F32
        self._context = lib.llama_init_from_model(self._model, params)
        assert self._context, "".join(messages[-5:])
        self._vocab = lib.llama_model_get_vocab(self._model)
        self.vocab_size = lib.llama_vocab_n_tokens(self._vocab)
        self._length = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)

    def logits(self, tokens, start=0):
        """Float32 `[n, vocab]` after each of the tokens, which stand at `start`, start + 1, ..."""
        lib = self._lib
        if start == 0:
            lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        batch = lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = int(token), start + i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, 1
        status = lib.llama_decode(self._context, batch)
        lib.llama_batch_free(batch)
        assert status == 0, "".join(messages[-5:])
        flat = lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(flat, (len(tokens), self.vocab_size)).copy()

    def greedy(self, tokens, count):
        """The likeliest continuation, token by token."""
        chosen = [int(self.logits(tokens)[-1].argmax())]
        while len(chosen) < count:
            row = self.logits(chosen[-1:], len(tokens) + len(chosen) - 1)
            chosen.append(int(row[-1].argmax()))
        return chosen

    def tokenize(self, text, special=False):
        """Token ids of a text, without a token for its beginning."""
        raw = text.encode()
        ids = (c.c_int32 * (len(raw) + 8))()
        count = self._lib.llama_tokenize(self._vocab, raw, len(raw), ids, len(ids), False, special)
        return list(ids[:count])


def nats(logits, tokens):
    """Mean negative log-likelihood of tokens[1:] under the logits of tokens[:-1]."""
    logits = np.asarray(logits[:-1], np.float64)
    top = logits.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0]
    return float((log_sum - logits[np.arange(len(logits)), tokens[1:]]).mean())
