"""Spikes: the rule against NumPy, and what a run does on one."""

import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from bitjax.config import DataConfig, OptimizerConfig, RunConfig, TrainConfig, override
from bitjax.train import Batch, Diverged, Trainer, data, read_metrics, spikes, train
from bitjax.train.checkpoint import read_run

NAN = float("nan")


def test_the_rule_is_numpys_on_a_random_walk_with_spikes_and_nans():
    window, factor = 5, 3.0
    guard = spikes.new_guard(TrainConfig(spike_window=window, spike_factor=factor))
    generator = np.random.default_rng(0)
    losses, norms, in_a_row, seen = [], [], 0, 0
    step = jax.jit(lambda g, x, y: ((s := spikes.judge(g, x, y, factor)), spikes.noted(g, x, y, s)))
    for _ in range(200):
        loss, norm = np.float32(generator.lognormal(0, 0.7, 2))
        if generator.random() < 0.1:
            loss, norm = [(NAN, norm), (loss, np.inf), (NAN, NAN)][generator.integers(3)]
        wanted = not (np.isfinite(loss) and np.isfinite(norm))
        if len(losses) >= window and not wanted:
            above = [x > factor * np.median(past[-window:])
                     for x, past in ((loss, losses), (norm, norms))]  # fmt: skip
            wanted = any(above)
        spike, guard = step(guard, jnp.float32(loss), jnp.float32(norm))
        assert bool(spike) == wanted
        if not wanted:
            losses.append(loss)
            norms.append(norm)
        in_a_row, seen = (in_a_row + 1, seen + 1) if wanted else (0, seen)
        assert int(guard.in_a_row) == in_a_row
    assert 20 < seen < 150


def test_no_guard_unless_asked_for():
    assert spikes.new_guard(TrainConfig()) is None
    assert spikes.new_guard(TrainConfig(on_spike="skip")) is not None
    assert spikes.new_guard(TrainConfig(spike_factor=2.0)) is not None


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(np.random.default_rng(0).integers(97, 110, 4000, dtype=np.uint8)))
    return RunConfig(
        model=tiny_config(num_layers=1),
        data=DataConfig(text=str(path)),
        optimizer=OptimizerConfig(warmup_steps=2),
        train=TrainConfig(
            steps=9, batch_size=2, seq_len=8, log_every=1, eval_every=0, checkpoint_every=3,
            peak_gflops=100.0, log_codes=False, on_spike="skip", spike_limit=3,
        ),
    )  # fmt: skip


TIGHT = ["train.on_spike=stop", "train.spike_factor=1.0001", "train.spike_window=2"]


def test_a_spiked_step_changes_no_weight_and_no_moment_but_the_counters(config):
    trainer = Trainer(override(config, TIGHT))
    batch = Batch(np.random.default_rng(1).integers(97, 110, (2, 9)).astype(np.int32))
    state = trainer.init()
    for _ in range(2):  # the window; nothing is judged before it is full
        state, metrics = trainer.step(state, batch)
        assert int(metrics["spikes_in_a_row"]) == 0
    before = jax.tree.map(np.array, state)
    guard = spikes.Guard(state.guard.losses * 1e-3, *list(vars(state.guard).values())[1:])
    after, metrics = trainer.step(type(state)(**(vars(state) | {"guard": guard})), batch)
    assert int(metrics["spikes_in_a_row"]) == 1
    assert int(after.step) == 3
    for a, b in zip(
        jax.tree.leaves((after.params, after.opt_state)),
        jax.tree.leaves((before.params, before.opt_state)),
        strict=True,
    ):
        change = 0 if jnp.issubdtype(a.dtype, jnp.floating) else 1
        np.testing.assert_array_equal(np.asarray(a), b + change)


class PoisonedTrainer(Trainer):
    """Its loss and gradients are NaN on a batch of zeros, which the text does not have."""

    def _gradients(self, params, batch, strength=None):
        bad = jnp.all(batch.tokens == 0)
        poison = lambda x: jnp.where(bad, jnp.nan, x)  # noqa: E731
        return jax.tree.map(poison, super()._gradients(params, batch, strength))


@pytest.fixture
def poison(monkeypatch):
    """Makes the batches of these positions of the data order bad; returns the positions used."""
    batch, used = data.batch, []

    def make(*positions):
        def poisoned(tokens, position, *more):
            used.append(position)
            found = batch(tokens, position, *more)
            return found * 0 if position in positions else found

        monkeypatch.setattr("bitjax.train.loop.Trainer", PoisonedTrainer)
        monkeypatch.setattr(data, "batch", poisoned)
        return used

    return make


def test_skip_goes_on_and_says_so(config, tmp_path, poison):
    poison(4)
    with pytest.warns(UserWarning, match="1 steps skipped before step 5"):
        train(config, tmp_path / "run")
    records = read_metrics(tmp_path / "run")
    assert [r["step"] for r in records if "spikes" in r] == [5]
    assert [r["step"] for r in records] == list(range(1, 10))
    assert np.isfinite(records[-1]["valid_loss"])


def test_skips_in_a_row_stop_the_run(config, tmp_path, poison):
    poison(*range(4, 9))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(Diverged, match=r"3 steps in a row were skipped up to step 7"):
            train(config, tmp_path / "run")
    assert read_run(tmp_path / "run")[1] == 6


def test_rewind_repeats_the_steps_with_data_not_seen(config, tmp_path, poison):
    """A spike at position 4, after the checkpoint of step 3: steps 3.. take positions 5.. ."""
    config = override(config, ["train.on_spike=rewind"])
    used = poison(4)
    with pytest.warns(UserWarning, match="jumped before step 5; back to step 3, with other data"):
        state = train(config, tmp_path / "run")
    assert used == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert int(state.step) == 9
    assert [r["step"] for r in read_metrics(tmp_path / "run")] == list(range(1, 10))
    # Another process resumes with the data moved on as far.
    used.clear()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "9")
    resumed = train(config, tmp_path / "run")
    assert used == [8, 9, 10]
    for a, b in zip(jax.tree.leaves(resumed), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_rewinds_without_progress_stop_the_run(config, tmp_path, poison):
    poison(1, 2, 3, 4, 5)
    with pytest.warns(UserWarning, match="back to step 0"), pytest.raises(
        Diverged, match=r"went back 3 times without reaching the next checkpoint"
    ):  # fmt: skip
        train(override(config, ["train.on_spike=rewind"]), tmp_path / "run")


def test_stop_with_a_factor_keeps_the_spike_out_of_the_checkpoints(config, tmp_path):
    wild = override(config, TIGHT)
    with pytest.raises(Diverged, match=r"jumped above 1.0001 times its median at about step \d"):
        train(wild, tmp_path / "run")


def test_settings_are_checked():
    for settings, message in (
        ({"spike_factor": 1.0}, r"train.spike_factor=1.0 must be above 1, or None"),
        ({"spike_window": 0}, "train.spike_window=0 must be above 0"),
        ({"spike_limit": 0}, "train.spike_limit=0 must be above 0"),
        ({"on_spike": "pray"}, "train.on_spike='pray' is not one of stop, skip, rewind"),
        ({"peak_gflops": 0.0}, r"train.peak_gflops=0.0 must be above 0, or None"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainConfig(**settings)
