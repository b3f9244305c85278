"""Engines over tiny models, and what they compute, row by row."""

import contextlib
import dataclasses
import functools
import hashlib

import jax
import numpy as np
from tiny import changed, tiny_model

import bitjax.engine.engine as engine_module
from bitjax.engine import Engine, EngineConfig
from bitjax.infer import pack_model

CONTEXT = 192  # three pages
FORMS = ("int4", "screened", "bfloat16", "float32", "float", "own norms", "float activations")


@functools.cache
def model_of(form):
    """A tiny model of some form: the format of its head, or of its layers."""
    settings = {"head_dim": 16, "max_seq_len": CONTEXT, "tie_embeddings": False, "seed": 3}
    if form == "float":
        return tiny_model(weights="float", activations="float", **settings)
    if form == "own norms":  # two norms before a product: what does not fit into its custom call
        return pack_model(tiny_model(linear_norm_eps=1e-5, **settings), "ternary2", "int8")
    if form == "float activations":
        return pack_model(tiny_model(activations="float", **settings), "ternary2", "int4")
    return pack_model(tiny_model(**settings), "ternary1.6", form)


def engine_of(form, **sizes):
    """An engine whose model uses the custom calls."""
    return Engine(changed(model_of(form), impl="ffi"), EngineConfig(**sizes))


@contextlib.contextmanager
def rescheduled(engine, spare=None, **changes):
    """The same compiled programs under other sizes; with `spare`, only so many pages are left."""
    scheduler, store = engine._scheduler, engine._store
    assert not engine.pending
    before = scheduler.config, scheduler._tables
    scheduler._expected = 1.0 if spare is None else 0.0  # so that pages run out
    sizes = dataclasses.replace(scheduler.config, **changes)
    engine.config = scheduler.config = sizes
    scheduler._tables = before[1][: sizes.max_sequences]
    forget(store)
    store.sharing = sizes.sharing
    taken = [store.take() for _ in range(store.available - spare)] if spare else []
    try:
        yield engine
    finally:
        assert store.used == len(taken)
        store.release(taken)
        forget(store)
        engine.config = scheduler.config = before[0]
        scheduler._tables = before[1]
        store.sharing = scheduler.config.sharing


def forget(store):
    """Drop what was kept of finished sequences."""
    for _ in range(len(store._idle)):
        _, page = store._idle.popitem()
        store._forget(page)
        store._free.append(page)


@contextlib.contextmanager
def watched(engine):
    """Every logit that the engine draws from: seed, sample and position -> hash of the row.

    Behind a wrong guess a row is computed for nothing; its position is drawn again, and counts.
    """
    rows, runner, settings = {}, engine._runner, []
    original, plain_settings = engine_module.sample, engine_module.plain_settings

    def sample(logits, draws):
        for draw in draws:
            digest = hashlib.sha256(logits[draw.row].tobytes()).hexdigest()
            rows[draw.sampling.seed, draw.sample, draw.position] = digest
        return original(logits, draws)

    def kept_settings(draws):
        settings[:] = draws
        return plain_settings(draws)

    def draw(hidden, ranks, *operands):
        """Tokens drawn by a program, which hands out no logits: those of the other program."""
        drawn = type(runner).draw(runner, hidden, ranks, *operands)
        logits = runner.logits(hidden, np.arange(len(ranks), dtype=np.int32), ranks)
        expected, _ = sample(logits, settings)
        np.testing.assert_array_equal(np.asarray(drawn)[: len(ranks)], expected)
        return drawn

    engine_module.sample, engine_module.plain_settings = sample, kept_settings
    runner.draw = draw
    try:
        yield rows
    finally:
        engine_module.sample, engine_module.plain_settings = original, plain_settings
        del runner.draw


def what(completion):
    """All of a completion but its timings, and how it came about."""
    return completion.id, completion.choices, completion.usage.prompt_tokens, completion.error


@contextlib.contextmanager
def watched_logits(engine):
    """Every last row of logits."""
    seen, original = [], engine._runner.logits

    def logits(*operands):
        seen.append(original(*operands)[0].copy())
        return seen[-1][None]

    engine._runner.logits = logits
    try:
        yield seen
    finally:
        del engine._runner.logits


def full_logits(model, tokens):
    """Logits of every position by the model without a cache."""
    padded = tokens + [0] * (CONTEXT - len(tokens))  # causal: what follows is not read
    return np.asarray(jax.jit(model)(np.asarray([padded], np.int32)))[0]
