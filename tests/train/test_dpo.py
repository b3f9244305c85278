"""Direct preference optimisation against its equation in NumPy, finite differences, and a run."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from bitjax.chat.examples import build_chat_corpus
from bitjax.config import (
    CorpusConfig,
    DataConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    override,
)
from bitjax.corpus.tokenizer_training import END, train_tokenizer
from bitjax.train import Batch, Trainer, read_metrics, train
from bitjax.train.source import open_source

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] + m.content + '" + END + "' }}{% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)
MODEL = tiny_config(num_layers=1, vocab_size=257, weights="float", activations="float")
BETA = 0.3
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 257, (8, 9)).astype(np.int32)
COUNTED = RNG.random((8, 9)) < 0.5


def config(text="", **settings):
    train_settings = {"steps": 24, "batch_size": 8, "seq_len": 16, "objective": "dpo",
                      "dpo_beta": BETA, "start_from": "base", "log_every": 1,
                      "checkpoint_every": 8, "eval_every": 8} | settings  # fmt: skip
    return RunConfig(
        model=MODEL, data=DataConfig(text=text),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
        train=TrainConfig(**train_settings),
    )  # fmt: skip


def oracle(logits, tokens, counted, reference):
    """Mean loss, margin and accuracy, float64."""
    logits = logits.astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    taken = np.take_along_axis(log_p, tokens[:, 1:, None], -1)[..., 0]
    answers = (taken * counted[:, 1:]).sum(axis=1)
    losses, margins = [], []
    for c, r in zip(range(0, len(tokens), 2), range(1, len(tokens), 2), strict=True):
        margin = BETA * ((answers[c] - reference[c]) - (answers[r] - reference[r]))
        losses.append(np.log1p(np.exp(-margin)))
        margins.append(margin)
    return np.mean(losses), np.mean(margins), np.mean(np.array(margins) > 0)


@pytest.fixture(scope="module")
def trainer():
    return Trainer(config())


@pytest.fixture(scope="module")
def params(trainer):
    return trainer.init().params


@pytest.fixture(scope="module")
def batch(trainer, params):
    """Pairs whose reference is the model's own likelihood, changed."""
    plain = Batch(TOKENS, None, COUNTED)
    noise = np.array([1, -2, 3, 0.5, -1, 1, -2, 2])  # two margins below 0, two above
    reference = np.asarray(trainer.likelihoods(params, plain)) + noise
    return plain._replace(reference=reference[:, None].astype(np.float32))


def test_the_equation(trainer, params, batch):
    logits = np.asarray(trainer.model(params)(jnp.asarray(TOKENS[:, :-1])))
    wanted = oracle(logits, TOKENS, COUNTED, batch.reference[:, 0])
    found = trainer.means(params, batch)
    names = ("loss", "reward_margin", "reward_accuracy")
    assert set(found) == set(names)
    assert [float(found[name]) for name in names] == pytest.approx(wanted, rel=2e-5)
    assert wanted[2] == 0.5


def test_gradients_equal_finite_differences(trainer, params, batch):
    gradients = jax.jit(trainer._gradients)(params, batch)[1]
    leaves, tree = jax.tree.flatten(params)
    slopes = jax.tree.leaves(gradients)
    for i in range(len(leaves)):
        norm = float(jnp.linalg.norm(slopes[i]))
        if norm < 1e-3:
            continue

        def loss(step, i=i, norm=norm):
            moved = [*leaves[:i], leaves[i] + step * slopes[i] / norm, *leaves[i + 1 :]]
            return float(trainer.means(jax.tree.unflatten(tree, moved), batch)["loss"])

        # Float32: an error of 1e-7 * loss / step, and one of the third derivative * step^2.
        assert (loss(5e-3) - loss(-5e-3)) / 1e-2 == pytest.approx(norm, rel=0.02), i


def test_accumulated_pairs_stay_together(trainer, params, batch):
    found, gradients = jax.jit(trainer._gradients)(params, batch)
    parts = Trainer(config(accumulate=4))
    found_parts, gradients_parts = jax.jit(parts._gradients)(params, batch)
    for name in found:
        assert float(found[name]) == pytest.approx(float(found_parts[name]), rel=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (gradients, gradients_parts)), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-5)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder with corpora of pairs and of a chat, and the run that a tuning starts from."""
    folder = tmp_path_factory.mktemp("dpo")
    tokenizer = train_tokenizer(["a"], 257)
    pairs = [{"prompt": f"{i}", "chosen": "yes", "rejected": "nope"} for i in range(60)]
    chats = [{"prompt": f"{i}", "completion": "yes"} for i in range(60)]
    for kind, lines in (("pairs", pairs), ("chat", chats)):
        (folder / f"{kind}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        about = CorpusConfig(kind=kind, valid_fraction=0.3)
        build_chat_corpus([folder / f"{kind}.jsonl"], folder / kind, tokenizer, about, TEMPLATE)
    base = config(str(folder / "chat"), objective="next_token", start_from="", steps=2,
                  loss_reduction="sum")  # fmt: skip
    train(base, folder / "base")
    return folder


@pytest.fixture(scope="module")
def run(made):
    settings = config(str(made / "pairs"), start_from=str(made / "base"))
    train(settings, made / "run")
    return settings, made / "run"


def test_a_run_raises_the_margin_of_held_out_pairs(run):
    records = read_metrics(run[1])
    assert records[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)  # the model is the reference
    assert records[0]["reward_margin"] == pytest.approx(0, abs=1e-3)
    measured = [r for r in records if "valid_loss" in r]
    margins = [r["valid_reward_margin"] for r in measured]
    assert [r["step"] for r in measured] == [8, 16, 24]
    assert margins == sorted(margins)
    assert margins[-1] > 0.3
    assert measured[-1]["valid_reward_accuracy"] == 1
    assert measured[-1]["valid_loss"] < 0.6


def reference(path):
    with np.load(path) as file:
        return {name: values for name, values in file.items() if values.ndim}


@pytest.mark.parametrize("damage", ["none", "gone", "cut"])
def test_the_reference_is_kept_or_made_again(made, run, tmp_path, damage):
    settings, directory = run
    path = directory / "reference.npz"
    before = reference(path)
    assert {v.shape[1] for v in before.values()} == {2}
    start = made / "base"
    if damage == "none":
        start.rename(made / "away")  # it is not needed any more
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-30])
    try:
        train(settings, directory)
    finally:
        if damage == "none":
            (made / "away").rename(start)
    after = reference(path)
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values)


def test_what_does_not_fit(made, run):
    settings, _ = run
    with pytest.raises(ValueError, match=r"objective=next_token learns from .* kind text or chat"):
        open_source(override(settings, ["train.objective=next_token"]))
    with pytest.raises(ValueError, match=r"objective=dpo learns from .* kind pairs; .* kind chat"):
        open_source(override(settings, [f"data.text={made / 'chat'}"]))
    with pytest.raises(ValueError, match=r"objective=dpo learns .* Shakespeare .* kind text"):
        open_source(override(settings, ["data.text="]))
    with pytest.raises(ValueError, match=r"objective=dpo needs train\.start_from"):
        config(start_from="")
    with pytest.raises(ValueError, match=r"needs pairs: train\.batch_size=9 / .* is odd"):
        config(batch_size=9)
    short = dataclasses.replace(settings, train=dataclasses.replace(settings.train, seq_len=4))
    with pytest.warns(UserWarning, match=r"120 of 120 conversations .* more than 5 tokens"):
        open_source(short)
