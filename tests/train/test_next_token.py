"""What is predicted, and its loss by mean and by sum, against NumPy."""

import jax
import numpy as np
import pytest
from test_step import BATCH, SEGMENTS
from test_step import config as run_config

from bitjax.train import Batch, Trainer
from bitjax.train.next_token import predicted
from bitjax.train.step import FINISHED

# Of four rows 1, 7, 3 and 0 tokens are counted (a row's first token is never predicted).
COUNTED = np.zeros((4, 9), bool)
COUNTED[0, 4], COUNTED[1, 2:], COUNTED[2, [0, 3, 5, 8]] = True, True, True


def test_predicted_are_counted_tokens_within_a_document():
    wanted = np.zeros((4, 8), bool)
    for row in range(4):
        for t in range(8):
            wanted[row, t] = COUNTED[row, t + 1] and SEGMENTS[row, t] == SEGMENTS[row, t + 1]
    batch = Batch(BATCH.tokens, SEGMENTS, COUNTED)
    np.testing.assert_array_equal(np.asarray(predicted(batch)), wanted)
    np.testing.assert_array_equal(
        np.asarray(predicted(batch._replace(segments=None))), COUNTED[:, 1:]
    )
    assert predicted(BATCH) is None
    assert wanted.sum() < COUNTED[:, 1:].sum()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_by_mean_and_sum_are_exact_under_accumulation(reduction):
    batch = Batch(BATCH.tokens, None, COUNTED)
    plain = Trainer(run_config())
    whole = Trainer(run_config(loss_reduction=reduction))
    parts = Trainer(run_config(loss_reduction=reduction, accumulate=4))
    params = whole.init().params
    losses = np.asarray(jax.jit(whole._losses)(params, batch, FINISHED), np.float64)
    loss = losses[COUNTED[:, 1:]].mean()
    found, gradients = jax.jit(whole._gradients)(params, batch)
    found_parts, gradients_parts = jax.jit(parts._gradients)(params, batch)
    assert float(found["loss"]) == pytest.approx(loss, rel=1e-5)
    assert float(found_parts["loss"]) == pytest.approx(loss, rel=1e-5)
    factor = 11 if reduction == "sum" else 1
    wanted = jax.jit(plain._gradients)(params, batch)[1]
    for a, b, c in zip(*map(jax.tree.leaves, (gradients, gradients_parts, wanted)), strict=True):
        scale = np.abs(c).max() * factor
        np.testing.assert_allclose(np.asarray(a), factor * np.asarray(c), atol=1e-5 * scale)
        np.testing.assert_allclose(np.asarray(b), np.asarray(a), atol=1e-5 * scale)


def test_what_is_not_counted_has_no_gradient():
    """A row of which nothing is counted might as well not be there."""
    trainer = Trainer(run_config())
    params = trainer.init().params
    other = BATCH.tokens.copy()
    other[3] = 7
    found = [
        jax.jit(trainer._gradients)(params, Batch(tokens, None, COUNTED))[1]
        for tokens in (BATCH.tokens, other)
    ]
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-7)
