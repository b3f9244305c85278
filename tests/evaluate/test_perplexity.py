"""Scoring a text: every token once and with the right context, against plain loops."""

import dataclasses
import math

import numpy as np
import pytest
from flax import nnx
from texts import small_tokenizer
from tiny import tiny_model

from bitjax.evaluate import TextScore, model_scorer, score_text, tokens_of
from bitjax.infer import pack_model
from bitjax.tokenizer import BYTES


class Toy:
    """A scorer whose loss depends on the token and on the first token that it could see.

    With tokens 1, 2, ..., n a token's value is its place, so the loss knows both.
    """

    def __init__(self, batch, seq_len):
        self.shape = (batch, seq_len + 1)
        self.table = np.random.default_rng(0).uniform(0.5, 6, (200, 200))

    def __call__(self, windows):
        assert windows.shape == self.shape
        assert windows.dtype == np.int32
        return self.table[windows[:, :1], windows[:, 1:]]


def oracle(table, n, seq_len, stride):
    """Losses of tokens 2..n, by window: the first window, and then `stride` new ones each."""
    windows, place = [], 2
    while place <= n:
        start = 1 + len(windows) * stride
        losses = []
        while place <= n and place <= start + seq_len:
            losses.append(table[start, place])
            place += 1
        windows.append(losses)
    return windows


@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("seq_len", [1, 2, 5, 8])
def test_every_token_is_scored_once_with_its_context(seq_len, batch):
    toy = Toy(batch, seq_len)
    for stride in range(1, seq_len + 1):
        for n in [*range(2, 24), 97]:
            score = score_text(toy, np.arange(1, n + 1), seq_len, stride, batch)
            windows = oracle(toy.table, n, seq_len, stride)
            assert score.tokens == n - 1
            mean = sum(map(sum, windows)) / (n - 1)
            assert score.nats_per_token == pytest.approx(mean, rel=1e-12)
            # Ratio estimator: sqrt(k / (k - 1) * sum of (window sum - count * mean)^2) / count.
            k = len(windows)
            if k == 1:
                assert math.isnan(score.standard_error)
                continue
            squares = sum((sum(w) - len(w) * mean) ** 2 for w in windows)
            wanted = math.sqrt(squares * k / (k - 1)) / (n - 1)
            assert score.standard_error == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_the_default_stride_is_half_a_window():
    toy, tokens = Toy(16, 8), np.arange(1, 60)
    assert score_text(toy, tokens, 8) == score_text(toy, tokens, 8, 4)
    assert score_text(toy, tokens, 8) != score_text(toy, tokens, 8, 5)
    assert score_text(Toy(16, 1), tokens, 1) == score_text(Toy(16, 1), tokens, 1, 1)


def test_the_standard_error_of_equal_windows_is_that_of_their_mean():
    toy = Toy(4, 6)
    windows = oracle(toy.table, 1 + 6 * 9, 6, 6)
    means = [np.mean(w) for w in windows]
    assert len(means) == 9
    score = score_text(toy, np.arange(1, 2 + 6 * 9), 6, 6, 4)
    assert score.standard_error == pytest.approx(np.std(means, ddof=1) / math.sqrt(9))


def test_the_standard_error_covers_the_truth_as_often_as_it_should():
    # Independent losses of mean 2: |estimate - 2| < 1.96 standard errors in about 95 % of texts.
    # 200 texts of 64 windows: 190 expected, standard deviation 3.1, so 5 of them are 16.
    rng, covered = np.random.default_rng(5), 0
    for _ in range(200):
        score = score_text(
            lambda windows: rng.exponential(2, (len(windows), 4)), np.zeros(257, int), 4, 4, 64
        )
        covered += abs(score.nats_per_token - 2) < 1.96 * score.standard_error
    assert abs(covered - 190) <= 16


@pytest.mark.parametrize("n", [2, 17, 100])
def test_a_uniform_model_needs_eight_bits_a_byte(n):
    score = score_text(lambda windows: np.full((16, 8), math.log(256)), np.zeros(n, np.int32), 8, 3)
    assert score.bits_per_byte == pytest.approx(8, rel=1e-14)
    assert score.perplexity == pytest.approx(256, rel=1e-13)
    assert score.tokens == n - 1


def test_units():
    score = TextScore(math.log(8), standard_error=0.5 * math.log(2), tokens=5, bytes=5)
    assert score.bits_per_byte == pytest.approx(3)
    assert score.bits_per_byte_error == pytest.approx(0.5)
    longer = dataclasses.replace(score, bytes=20)  # four bytes a token
    assert longer.bits_per_byte == pytest.approx(0.75)
    assert longer.bits_per_byte_error == pytest.approx(0.125)
    assert longer.perplexity == score.perplexity
    assert score.perplexity == pytest.approx(8)


def test_a_hopeless_score_is_infinite_not_an_error():
    assert TextScore(800.0, 0.0, 5, 5).perplexity == math.inf


def test_nan_losses_surface():
    score = score_text(lambda windows: np.full((16, 4), np.nan), np.zeros(9, np.int32), 4)
    assert math.isnan(score.nats_per_token)


@pytest.mark.parametrize(
    ("n", "seq_len", "stride", "batch", "message"),
    [
        (0, 4, 2, 1, "a text of 0 tokens cannot be scored; it needs 2 or more"),
        (1, 4, 2, 1, "a text of 1 tokens cannot be scored; it needs 2 or more"),
        (9, 4, 0, 1, "stride=0 is not in 1..4, the window length"),
        (9, 4, -1, 1, "stride=-1 is not in 1..4, the window length"),
        (9, 4, 5, 1, "stride=5 is not in 1..4, the window length"),
        (9, 0, None, 1, "stride=1 is not in 1..0, the window length"),
        (9, 4, 2, 0, "batch=0 must be above 0"),
        (9, 4, 2, -1, "batch=-1 must be above 0"),
    ],
)
def test_errors(n, seq_len, stride, batch, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        score_text(Toy(batch, seq_len), np.zeros(n, np.int32), seq_len, stride, batch)


@pytest.mark.parametrize("form", ["float", "packed", "packed tables"])
def test_model_scorer_is_the_log_softmax_of_the_model(form):
    model = tiny_model(num_layers=1)
    if form != "float":
        model = pack_model(model, tables="int8" if form == "packed tables" else "float32")
    windows = np.random.default_rng(1).integers(0, 256, (3, 9), dtype=np.int32)
    logits = np.asarray(nnx.jit(lambda model: model(windows[:, :-1]))(model), np.float64)
    wanted = np.zeros((3, 8))
    for b in range(3):
        for t in range(8):
            shifted = logits[b, t] - logits[b, t].max()
            wanted[b, t] = np.log(np.exp(shifted).sum()) - shifted[windows[b, t + 1]]
    assert wanted.std() > 0.1
    # float32 logits and sums of 256 terms: below 1e-5 in losses of about 6.
    np.testing.assert_allclose(model_scorer(model)(windows), wanted, atol=1e-5)


def test_a_model_scores_a_text_longer_than_its_windows():
    model = tiny_model(num_layers=1)
    tokens = np.random.default_rng(2).integers(0, 256, 30)
    scorer = model_scorer(model)
    score = score_text(scorer, tokens, 8, 4, batch=2)
    losses = []
    for start in range(0, 22 + 3, 4):
        window = tokens[start : start + 9].astype(np.int32)
        row = scorer(np.pad(window, (0, 9 - len(window)))[None].repeat(2, axis=0))[0]
        losses += list(row[0 if start == 0 else 4 : len(window) - 1])
    assert len(losses) == score.tokens == 29
    assert score.nats_per_token == pytest.approx(np.mean(losses), rel=1e-6)


def test_tokens_of_a_text():
    raw = "hello world é".encode()
    tokens, scored = tokens_of(BYTES, raw, "t")
    assert (tokens.tolist(), scored) == (list(raw), len(raw) - 1)
    # hello| wor|ld| |é: all but the first five bytes are predicted.
    tokens, scored = tokens_of(small_tokenizer(), raw, "t")
    assert (len(tokens), scored) == (5, len(raw) - 5)
    # With a token before them, all are.
    tokens, scored = tokens_of(small_tokenizer(add_bos=True), raw, "t")
    assert (len(tokens), scored) == (6, len(raw))
    with pytest.raises(ValueError, match="t is not UTF-8 at byte 2"):
        tokens_of(small_tokenizer(), b"ab\xff", "t")


def test_bits_of_a_text_in_tokens():
    """The same text costs the same bits a byte, whatever its tokens: here log2 of 16 a token."""
    tokens, scored = tokens_of(small_tokenizer(), b"hello world hello world", "t")
    score = score_text(lambda w: np.full((16, 4), math.log(16)), tokens, 4, scored_bytes=scored)
    assert score.tokens == len(tokens) - 1
    assert score.bits_per_byte == pytest.approx(4 * (len(tokens) - 1) / 18)
    assert score.perplexity == pytest.approx(16)
