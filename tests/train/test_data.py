import hashlib

import numpy as np
import pytest

from bitjax.config import DataConfig
from bitjax.train import data


def test_split_is_the_end_of_the_text(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(bytes(range(250)))
    text = data.load_text(DataConfig(text=str(path), valid_fraction=0.1))
    assert text.train.tolist() == list(range(225))
    assert text.valid.tolist() == list(range(225, 250))
    assert text.sha256 == hashlib.sha256(bytes(range(250))).hexdigest()


def test_packaged_text_is_tiny_shakespeare():
    tokens, _ = data.read_tokens("")
    assert len(tokens) == 1_115_394
    assert bytes(tokens[:14]) == b"First Citizen:"


def test_batches_depend_on_seed_and_step_alone():
    tokens = np.arange(200, dtype=np.uint8)
    draw = lambda step, seed: data.batch(tokens, step, seed, 4, 10)  # noqa: E731
    np.testing.assert_array_equal(draw(3, 0), draw(3, 0))
    assert not np.array_equal(draw(3, 0), draw(4, 0))
    assert not np.array_equal(draw(3, 0), draw(3, 1))
    assert draw(0, 0).shape == (4, 11)
    assert draw(0, 0).dtype == np.int32


def test_batches_are_windows_that_reach_both_ends():
    tokens = np.arange(20, dtype=np.uint8)
    rows = np.concatenate([data.batch(tokens, step, 0, 8, 10) for step in range(40)])
    assert (np.diff(rows, axis=1) == 1).all()
    assert set(rows[:, 0]) == set(range(10))  # every start whose 11 bytes fit


def test_validation_windows_span_the_text():
    tokens = np.arange(101, dtype=np.uint8)
    found = data.windows(tokens, 10, limit=5)
    assert found[:, 0].tolist() == [0, 22, 45, 67, 90]
    assert found[-1, -1] == 100
    assert len(data.windows(tokens, 10, limit=99)) == 10


def test_errors(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the text .*nowhere: No such file"):
        data.read_tokens(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="Is a directory"):
        data.read_tokens(str(tmp_path))
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="empty is empty"):
        data.read_tokens(str(tmp_path / "empty"))
    (tmp_path / "short").write_bytes(b"x" * 100)
    text = data.load_text(DataConfig(text=str(tmp_path / "short")))
    with pytest.raises(ValueError, match=r"too short.*90 bytes.*10; sequences of 10 need 11"):
        data.require_length(text, 10)
    data.require_length(text, 9)
