"""Files to tokens to batches, against the tokenizer and NumPy directly."""

import gzip
import hashlib
import json
import lzma

import numpy as np
import pytest

from bitjax.config import CorpusConfig
from bitjax.corpus import Corpus, Loader, build_corpus
from bitjax.corpus.tokenizer_training import train_tokenizer
from bitjax.tokenizer import BYTES

TEXTS = [f"document {i}: " + "naïve 漢字 " * (i % 7) for i in range(200)]
CONFIG = CorpusConfig(valid_fraction=0.2, salt="s", shard_tokens=500)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "a.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(json.dumps({"text": t}) for t in TEXTS).encode()))
    return path


@pytest.mark.parametrize("trained", [False, True])
def test_tokens_split_and_shards(source, tmp_path, trained):
    tokenizer = train_tokenizer(TEXTS, 300) if trained else BYTES
    build_corpus([source], tmp_path / "c", tokenizer, CONFIG)
    corpus = Corpus(tmp_path / "c", check=True)

    def held(text):
        digest = hashlib.blake2b(text.encode(), digest_size=8, key=b"s").digest()
        return np.frombuffer(digest, "<u8")[0] / 2.0**64 < 0.2

    for part, side in ((corpus.train, False), (corpus.valid, True)):
        wanted = [[*tokenizer.encode(t), *tokenizer.stop] for t in TEXTS if held(t) == side]
        found = part.windows(np.array([0]), part.tokens)[0]
        np.testing.assert_array_equal(found, np.concatenate(wanted))
        np.testing.assert_array_equal(np.diff(part.starts), [len(w) for w in wanted])


def test_loader_epoch_and_processes(source, tmp_path):
    build_corpus([source], tmp_path / "c", BYTES, CONFIG)
    part = Corpus(tmp_path / "c").train
    whole = Loader([part], 16, 4, seed=3, apart=True)
    halves = [
        Loader([part], 16, 4, 3, apart=True, process_index=p, process_count=2) for p in (0, 1)
    ]
    for step in (0, 5, 1000):
        joined = np.concatenate([half.batch(step).tokens for half in halves])
        np.testing.assert_array_equal(joined, whole.batch(step).tokens)
    one = Loader([part], 16, 1, seed=3)
    rows = sorted(one.batch(i).tokens[0].tobytes() for i in range(one.windows[0]))
    starts = np.arange(one.windows[0]) * 16
    assert rows == sorted(row.tobytes() for row in part.windows(starts, 17))


def test_damage_is_named(source, tmp_path):
    build_corpus([source], tmp_path / "c", BYTES, CONFIG)
    shard = tmp_path / "c" / "train-00001.tokens"
    raw = shard.read_bytes()
    shard.write_bytes(bytes([raw[0] ^ 1]) + raw[1:])
    with pytest.raises(ValueError, match="damaged: its sha256"):
        Corpus(tmp_path / "c", check=True)
    shard.write_bytes(raw[:-1])
    with pytest.raises(ValueError, match="cut short"):
        Corpus(tmp_path / "c")
    with pytest.raises(ValueError, match="exists; choose another"):
        build_corpus([source], tmp_path / "c", BYTES, CONFIG)


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.txt", b"", "no text in the input"),
        ("a.txt", b"a\0b", "is binary"),
        ("a.txt", b"ab\xff", "not UTF-8: byte 2"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', "line 2 is not an object"),
        ("a.jsonl", b'{"body": "a"}\n', "line 1 has no text in 'text'; its fields are 'body'"),
        ("a.txt.gz", gzip.compress(b"abc" * 99, mtime=0)[:-9], "damaged or cut short"),
        ("a.txt.xz", lzma.compress(b"abc" * 99)[:-9], "damaged or cut short"),
        ("a.parquet", b"PAR1 nothing", "damaged or cut short"),
    ],
)
def test_bad_input(tmp_path, name, raw, message):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        build_corpus([tmp_path / name], tmp_path / "c", BYTES)
    assert not (tmp_path / "c").exists()


def test_cut_zstandard(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"abc" * 99)[:-3])
    with pytest.raises(ValueError, match="damaged or cut short"):
        build_corpus([tmp_path / "a.txt.zst"], tmp_path / "c", BYTES)
