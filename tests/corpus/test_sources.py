"""Every kind of file gives the same corpus; what cannot be a corpus is refused."""

import json
import lzma

import numpy as np
import pytest

from bitjax.config import CorpusConfig
from bitjax.corpus import Corpus, Loader, build_corpus
from bitjax.corpus.build import encode_batch
from bitjax.corpus.sources import Document, find_files, read_documents
from bitjax.corpus.store import INDEX, dtype_name
from bitjax.corpus.tokenizer_training import train_tokenizer
from bitjax.text import TextTokenizer
from bitjax.tokenizer import BYTES

TEXTS = [f"document {i}: " + "naïve 漢字 " * (i % 7) for i in range(60)]
CONFIG = CorpusConfig(valid_fraction=0.2, shard_tokens=500)


def json_lines():
    return "\n".join(json.dumps({"text": t}) for t in TEXTS).encode()


def write(path, kind):
    if kind == "parquet":
        arrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        table = arrow.table({"id": list(range(len(TEXTS))), "text": TEXTS})
        parquet.write_table(table, path, row_group_size=7)
    elif kind == "arrow":
        arrow = pytest.importorskip("pyarrow")
        table = arrow.table({"text": TEXTS})
        with arrow.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table, max_chunksize=11)
    elif kind == "jsonl.zst":
        raw, zstandard = json_lines(), pytest.importorskip("zstandard")
        half = len(raw) // 2  # two frames, as tools that write in parallel make them
        path.write_bytes(zstandard.compress(raw[:half]) + zstandard.compress(raw[half:]))
    elif kind == "jsonl.xz":
        path.write_bytes(lzma.compress(json_lines()))
    else:
        path.write_text("\n==\n".join(TEXTS))


@pytest.mark.parametrize("kind", ["parquet", "arrow", "jsonl.zst", "jsonl.xz", "txt"])
def test_all_kinds_of_files_give_the_same_documents_and_all_their_bytes(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    write(path, kind)
    config, counts = CorpusConfig(separator="\n==\n"), []
    found = list(read_documents(path, config, counts.append))
    assert [d.text for d in found] == TEXTS
    assert all(str(path) in d.where for d in found)
    assert sum(counts) == path.stat().st_size


def test_a_folder_gives_its_files_in_the_order_of_their_names(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("c.txt", "b/a.jsonl", "README.md", "a.txt"):
        (tmp_path / name).write_text("x")
    found = [str(p.relative_to(tmp_path)) for p in find_files([tmp_path])]
    assert found == ["a.txt", "b/a.jsonl", "c.txt"]
    with pytest.raises(ValueError, match="there is no such file"):
        find_files([tmp_path / "none.txt"])
    with pytest.raises(ValueError, match="is of no known kind"):
        find_files([tmp_path / "README.md"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no file of the kinds"):
        find_files([tmp_path / "empty"])


def test_a_table_without_the_column(tmp_path):
    write(tmp_path / "a.parquet", "parquet")
    with pytest.raises(ValueError, match="has no column 'body'; its columns are 'id', 'text'"):
        list(read_documents(tmp_path / "a.parquet", CorpusConfig(text_field="body")))
    with pytest.raises(ValueError, match="row 1 has no text in 'id': 0"):
        list(read_documents(tmp_path / "a.parquet", CorpusConfig(text_field="id")))
    with pytest.raises(ValueError, match="no file of JSON lines; a corpus of chat needs them"):
        list(read_documents(tmp_path / "a.parquet", CorpusConfig(kind="chat")))


class Wide:
    """A tokenizer of 70,000 tokens: the letters, and others far beyond 16 bits."""

    name, vocab_size, stop, chat_template = "bytes", 70_000, (69_999,), None

    def __init__(self, most=69_000):
        self.most = most

    def encode(self, text):
        return np.array([ord(text[0]), self.most], np.int32)


def test_a_corpus_of_32_bits(tmp_path):
    """Written, mapped and batched: a vocabulary of 65,600, of which the last is "ab"."""
    trained = train_tokenizer(["ab"], 257)
    document = json.loads(trained.json)
    document["model"]["vocab"] |= {f"<{i}>": i for i in range(257, 65_599)} | {"ab": 65_599}
    document["model"]["merges"] = [["a", "b"]]
    tokenizer = TextTokenizer(json.dumps(document), trained.special, "here")
    (tmp_path / "a.txt").write_text("\n".join(["ab" * (i + 1) + "c" for i in range(12)]))
    config = CorpusConfig(separator="\n", valid_fraction=0, shard_tokens=7)
    build_corpus([tmp_path / "a.txt"], tmp_path / "c", tokenizer, config)
    corpus = Corpus(tmp_path / "c", check=True)
    c, end = int(tokenizer.encode("c")[0]), tokenizer.stop[0]
    wanted = np.concatenate([[65_599] * (i + 1) + [c, end] for i in range(12)])
    raw = b"".join(path.read_bytes() for path in sorted((tmp_path / "c").glob("train-*.tokens")))
    np.testing.assert_array_equal(np.frombuffer(raw, "<u4"), wanted)
    found = corpus.train.windows(np.array([0, 5]), 40)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, [wanted[:40], wanted[5:45]])
    batch = Loader([corpus.train], 8, 2, seed=0, apart=True).batch(0)
    assert batch.tokens.max() == 65_599
    for tokens, segments in zip(batch.tokens, batch.segments, strict=True):
        ends = np.cumsum(np.concatenate([[0], tokens[:-1] == end]))  # of documents before each
        np.testing.assert_array_equal(segments, ends + 1)
    assert corpus.train.documents == 12


def test_ids_of_32_bits_and_ids_beyond_the_vocabulary():
    found = encode_batch([Document("ab", "here")], Wide(), CorpusConfig())
    assert found.ids.dtype == np.uint32
    assert found.ids.tolist() == [97, 69_000, 69_999]
    assert [dtype_name(n) for n in (256, 257, 65_536, 65_537)] == [
        "uint8", "uint16", "uint16", "uint32",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"here: the tokenizer gave token 70000; its .* has 70000"):
        encode_batch([Document("ab", "here")], Wide(70_000), CorpusConfig())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with a file of text and its corpus, of a trained tokenizer."""
    folder = tmp_path_factory.mktemp("built")
    write(folder / "a.jsonl.xz", "jsonl.xz")
    tokenizer = train_tokenizer(TEXTS, 300)
    build_corpus([folder / "a.jsonl.xz"], folder / "c", tokenizer, CONFIG)
    return folder, tokenizer


def test_processes_make_the_same_bytes_as_one(built, monkeypatch):
    folder, tokenizer = built
    monkeypatch.setattr("bitjax.corpus.build._BATCH_DOCUMENTS", 7)  # several for each process
    build_corpus([folder / "a.jsonl.xz"], folder / "parallel", tokenizer, CONFIG, workers=2)
    names = sorted(p.name for p in (folder / "c").iterdir())
    assert names == sorted(p.name for p in (folder / "parallel").iterdir())
    assert len(names) > 6
    for name in names:
        assert (folder / "c" / name).read_bytes() == (folder / "parallel" / name).read_bytes()


def test_overwriting(built, tmp_path):
    folder, tokenizer = built
    files = [folder / "a.jsonl.xz"]
    build_corpus(files, tmp_path / "c", BYTES, CONFIG)
    before = Corpus(tmp_path / "c").identity
    with pytest.raises(ValueError, match="exists; choose another name or give --overwrite"):
        build_corpus(files, tmp_path / "c", tokenizer, CONFIG)
    assert Corpus(tmp_path / "c").identity == before
    (tmp_path / "bad.txt").write_bytes(b"a\0b")
    with pytest.raises(ValueError, match="is binary"):
        build_corpus([tmp_path / "bad.txt"], tmp_path / "c", BYTES, CONFIG, overwrite=True)
    assert Corpus(tmp_path / "c", check=True).identity == before  # a failed build loses nothing
    build_corpus(files, tmp_path / "c", tokenizer, CONFIG, overwrite=True)
    assert Corpus(tmp_path / "c", check=True).identity == Corpus(folder / "c").identity
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_text("years")
    with pytest.raises(ValueError, match="is no corpus; only a corpus is replaced"):
        build_corpus(files, tmp_path / "mine", BYTES, CONFIG, overwrite=True)
    assert (tmp_path / "mine" / "thesis").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 3}, "has format 3; this version reads 1 and 2"),
        ({"kind": "chat"}, "malformed: kind 'chat' in format 1"),
        ({"dtype": "int8"}, "malformed: dtype or shard_tokens"),
        ({"parts": {"train": {}}}, "its parts are not train and valid"),
        ({"parts": {"train": 3, "valid": 3}}, "train has no list of shards, each an object"),
        ({"shards": None}, "train has no list of shards, each an object"),
        ({"shards": [3]}, "train has no list of shards, each an object"),
        ({"shards": [{"tokens": "3"}]}, "a count is not a number"),
        ({"shards": [{"tokens": 10**9}]}, r"tokens has .* bytes; its index says"),
        ({"shards": []}, "the shards of train do not add up"),
        ({"documents": -1}, "a count is not a number"),
        ({"vocab_size": 299}, "has 300 tokens; index.json says 299"),
    ],
)
def test_a_malformed_index_is_a_sentence(built, tmp_path, change, message):
    folder, _ = built
    for path in (folder / "c").iterdir():
        (tmp_path / path.name).symlink_to(path)
    index = json.loads((folder / "c" / INDEX).read_text())
    inner = set(change) & {"shards", "documents"}
    (index["parts"]["train"] if inner else index).update(change)
    (tmp_path / INDEX).unlink()
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        Corpus(tmp_path)


def test_an_index_of_before_kinds_is_read(built, tmp_path):
    folder, _ = built
    for path in (folder / "c").iterdir():
        (tmp_path / path.name).symlink_to(path)
    index = json.loads((folder / "c" / INDEX).read_text())
    del index["kind"], index["config"]["kind"]
    (tmp_path / INDEX).unlink()
    (tmp_path / INDEX).write_text(json.dumps(index))
    found = Corpus(tmp_path, check=True)
    assert found.train.kind == "text"
    assert found.identity == Corpus(folder / "c").identity


def test_an_error_of_the_texts_comes_through_the_training_of_a_tokenizer():
    def texts():
        yield "some text"
        raise ValueError("line 2 is not JSON")

    with pytest.raises(ValueError, match="line 2 is not JSON"):
        train_tokenizer(texts(), 300)
    with pytest.raises(ValueError, match=r"a vocabulary of 256 is not in 257\.\."):
        train_tokenizer(["a"], 256)
    with pytest.raises(ValueError, match="there is no text to train a tokenizer on"):
        train_tokenizer(["", ""], 300)
