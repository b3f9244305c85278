import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from bitjax.config import OptimizerConfig, RunConfig, TrainConfig
from bitjax.ops import ffi
from bitjax.train import Batch, Trainer
from bitjax.train.step import quantization_strength


def config(**train):
    settings = {"steps": 20, "batch_size": 4, "seq_len": 8} | train
    return RunConfig(
        model=tiny_config(vocab_size=32),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        train=TrainConfig(**settings),
    )


BATCH = Batch(np.random.default_rng(0).integers(0, 32, (4, 9)).astype(np.int32))
# Rows of one, two and three documents; the last one's is as long as the row is not.
SEGMENTS = np.array([[1] * 9, [1] * 4 + [2] * 5, [1] * 2 + [2] * 6 + [3], [1] + [2] * 8], np.int32)


def test_the_loss_is_the_mean_negative_log_likelihood():
    trainer = Trainer(config())
    params = trainer.init().params
    logits = np.asarray(trainer.model(params)(jnp.asarray(BATCH.tokens[:, :-1])), np.float64)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    nll = -np.log(np.take_along_axis(p, BATCH.tokens[:, 1:, None], -1)[..., 0])
    assert float(trainer.means(params, BATCH)["loss"]) == pytest.approx(nll.mean(), rel=1e-5)
    found = np.asarray(trainer.likelihoods(params, BATCH))
    np.testing.assert_allclose(found, -nll.sum(axis=1), rtol=1e-5)


def test_one_step_of_a_fixed_model_gives_the_pinned_metrics():
    trainer = Trainer(config())
    _, metrics = trainer.step(trainer.init(), BATCH)
    assert float(metrics["loss"]) == pytest.approx(PINNED_LOSS, rel=1e-4)
    assert float(metrics["gradient_norm"]) == pytest.approx(PINNED_NORM, rel=1e-3)
    assert float(metrics["learning_rate"]) == pytest.approx(0.005)


def test_steps_overfit_one_batch():
    trainer = Trainer(config(steps=60))
    state, losses = trainer.init(), []
    for _ in range(60):
        state, metrics = trainer.step(state, BATCH)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * np.log(32)  # log(32): knowing nothing
    assert int(state.step) == 60


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["joined", "apart"])
def test_accumulated_gradients_equal_the_whole_batch(segments):
    whole, parts = Trainer(config()), Trainer(config(accumulate=4))
    state, batch = whole.init(), Batch(BATCH.tokens, segments)
    loss, gradients = jax.jit(whole._gradients)(state.params, batch)
    loss_parts, gradients_parts = jax.jit(parts._gradients)(state.params, batch)
    assert float(loss["loss"]) == pytest.approx(float(loss_parts["loss"]), rel=1e-6)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(gradients_parts), strict=True):
        # Four partial sums in another order, on gradients of order 0.1.
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-6)


def test_documents_apart_are_as_alone():
    """With float activations: a shifted position turns keys and queries by other angles, whose
    difference is the same but for float32's rounding, some 1e-6 of logits of order 1."""
    model = tiny_config(vocab_size=32, activations="float")
    trainer = Trainer(dataclasses.replace(config(), model=model))
    params = trainer.init().params
    found = float(trainer.means(params, Batch(BATCH.tokens, SEGMENTS))["loss"])
    total, count = 0.0, 0
    for row, segments in zip(BATCH.tokens, SEGMENTS, strict=True):
        for document in np.unique(segments):
            tokens = row[segments == document][None]
            if tokens.shape[1] > 1:
                n = tokens.shape[1] - 1
                total += float(trainer.means(params, Batch(tokens))["loss"]) * n
                count += n
    assert count == int(trainer.objective.items(Batch(BATCH.tokens, SEGMENTS))) == 8 + 7 + 6 + 7
    assert found == pytest.approx(total / count, rel=1e-5)
    assert found != pytest.approx(float(trainer.means(params, BATCH)["loss"]), rel=1e-3)


def test_state_is_donated_and_compiled_once():
    trainer = Trainer(config())
    state = trainer.init()
    old = state.params["embedding"][...]
    for _ in range(3):
        state, _ = trainer.step(state, BATCH)
    assert old.is_deleted()
    assert trainer.step._cache_size() == 1


def test_same_seed_same_start_other_seed_other_start():
    first, again, other = (Trainer(config(seed=s)).init() for s in (0, 0, 1))
    leaves = [np.asarray(s.params["embedding"][...]) for s in (first, again, other)]
    np.testing.assert_array_equal(leaves[0], leaves[1])
    assert not np.array_equal(leaves[0], leaves[2])


def test_bfloat16_compute_keeps_float32_masters():
    trainer = Trainer(config(compute_dtype="bfloat16"))
    state, metrics = trainer.step(trainer.init(), BATCH)
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert float(metrics["loss"]) == pytest.approx(PINNED_LOSS, rel=0.02)


def test_twin_differs_in_number_formats_alone():
    ternary = config()
    twin = dataclasses.replace(ternary, model=ternary.model.full_precision_twin())
    a, b = Trainer(ternary).init(), Trainer(twin).init()
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_lowers_for_cuda_without_a_cpu_custom_call():
    trainer = Trainer(config())
    state = jax.eval_shape(trainer.init)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), BATCH)
    text = trainer.step.trace(state, batch).lower(lowering_platforms=("cuda",)).as_text()
    assert "bitjax" not in text
    assert "dot_general" in text


# One step from seed 0; recorded when the forward and backward passes agreed with the oracles.
PINNED_LOSS = 4.33625
PINNED_NORM = 5.97895


@pytest.mark.parametrize("scale", ["tensor", "row", "group"])
@pytest.mark.parametrize("kind", ["ternary", "ternary_median", "ternary_learned", "binary"])
def test_every_quantiser_can_be_trained(kind, scale):
    """Traced only: the values are those of tests/quant."""
    model = tiny_config(
        vocab_size=32, num_layers=1, weights=kind, weight_scale=scale, activations="int4",
        weight_group=4 if scale == "group" else 0, hadamard=True,
    )  # fmt: skip
    drawn = config(stochastic_rounding="both", quantization_warmup_steps=2)
    trainer = Trainer(dataclasses.replace(drawn, model=model))
    state = jax.eval_shape(trainer.init)
    after, metrics = jax.eval_shape(trainer.step, state, BATCH)
    assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, state)
    assert metrics["loss"].shape == ()


def test_the_strength_of_quantisation_grows_to_one():
    found = [float(quantization_strength(t, 4)) for t in (0, 1, 4, 9)]
    assert found == [0, 0.25, 1, 1]
    assert float(quantization_strength(0, 0)) == 1


def test_a_warm_up_starts_at_the_full_precision_twin_and_ends_quantised():
    trainer = Trainer(config(quantization_warmup_steps=2))
    twin = dataclasses.replace(trainer.config, model=trainer.config.model.full_precision_twin())
    state = trainer.init()
    wanted = (
        float(Trainer(twin).means(state.params, BATCH)["loss"]),
        float(trainer.means(state.params, BATCH)["loss"]),
    )
    later = jax.tree.map(jnp.copy, dataclasses.replace(state, step=jnp.int32(2)))
    _, first = trainer.step(state, BATCH)
    _, last = trainer.step(later, BATCH)
    assert abs(wanted[0] - wanted[1]) > 1e-3  # else the test could not tell
    assert float(first["loss"]) == pytest.approx(wanted[0], rel=1e-5)
    assert float(last["loss"]) == pytest.approx(wanted[1], rel=1e-6)


@pytest.mark.skipif(
    not ffi.available() or not ffi.training_products(), reason="no AVX-512 BF16 and VNNI here"
)
def test_integer_products_give_the_loss_to_the_bit_and_gradients_to_bfloat16():
    found = {}
    for products in ("xla", "integer"):
        trainer = Trainer(config(products=products))
        params = trainer.init().params
        step = jax.value_and_grad(lambda x, t=trainer: t.means(x, BATCH)["loss"])
        compiled = jax.jit(step).lower(params)
        assert ("bitjax_train_backward" in compiled.as_text()) == (products == "integer")
        found[products] = compiled.compile()(params)
    loss, gradients = found["integer"]
    wanted, expected = found["xla"]
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        assert jnp.linalg.norm(a - b) <= 2.0**-8 * 4 * jnp.linalg.norm(b)
    assert any(
        (np.asarray(a) != np.asarray(b)).any()
        for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True)
    )


@pytest.mark.skipif(not ffi.available(), reason="the extension is not installed")
@pytest.mark.parametrize(("segments", "remat"), [(None, False), (SEGMENTS, True)])
def test_fused_attention_gives_the_same_loss_and_gradients(segments, remat):
    batch, found = BATCH._replace(segments=segments), {}
    for attention in ("xla", "fused"):
        settings = TrainConfig(batch_size=4, seq_len=8, attention=attention, remat=remat)
        model = tiny_config(vocab_size=32, head_dim=16)
        trainer = Trainer(RunConfig(model=model, train=settings))
        params = trainer.init().params
        step = jax.value_and_grad(lambda x, t=trainer: t.means(x, batch)["loss"])
        lowered = jax.jit(step).lower(params)
        assert ("bitjax_train_attention_backward" in lowered.as_text()) == (attention == "fused")
        found[attention] = lowered.compile()(params)
    (loss, gradients), (wanted, expected) = found["fused"], found["xla"]
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        # Where rounding moves an activation over a code's border, by a step of that code.
        assert jnp.linalg.norm(a - b) <= 1e-2 * jnp.linalg.norm(b)
