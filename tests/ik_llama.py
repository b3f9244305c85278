"""ik_llama.cpp, whose bitnet-b1.58 graph has ReLU^2: a GGUF file's logits, in another process.

    python ik_llama.py MODEL TOKENS.npy LOGITS.npy

The package ik-llama-cpp-python holds it compiled for recent x86 CPUs; on others the process dies.
"""

import ctypes
import importlib.util
import signal
import subprocess
import sys

import numpy as np
import pytest


def logits(path, tokens, folder):
    """Float32 `[n, vocab]` after each of the tokens, or a skip."""
    if importlib.util.find_spec("ik_llama_cpp") is None:
        pytest.skip("ik-llama-cpp-python is not installed; the extra 'parity' has it")
    given, found = folder / "tokens.npy", folder / "logits.npy"
    np.save(given, np.asarray(tokens, np.int32))
    command = [sys.executable, __file__, str(path), str(given), str(found)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    if done.returncode == -signal.SIGILL:
        pytest.skip("ik-llama-cpp-python is compiled for another CPU")
    assert done.returncode == 0, done.stderr[-2000:]
    return np.load(found)


def main():
    """See above."""
    from ik_llama_cpp import _ctypes_api as api

    path, given, found = sys.argv[1:]
    tokens = np.load(given)
    api._lib.llama_get_logits.restype = ctypes.POINTER(ctypes.c_float)
    api._lib.llama_get_logits.argtypes = [ctypes.c_void_p]
    api.llama_backend_init()
    model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
    assert model, f"{path} does not load"
    params = api.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 256
    params.n_threads = params.n_threads_batch = 1
    params.logits_all = True
    params.flash_attn = False  # it computes in float16
    params.type_k = 0  # float32; values have to be float16
    context = api.llama_init_from_model(model, params)
    vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    batch = api.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i] = int(token), i, 1
        batch.seq_id[i][0], batch.logits[i] = 0, 1
    assert api.llama_decode(context, batch) == 0
    flat = api._lib.llama_get_logits(context)
    np.save(found, np.ctypeslib.as_array(flat, (len(tokens), vocab_size)))


if __name__ == "__main__":
    main()
