"""A build that was stopped goes on where it was, to the same bytes; or notices that it cannot."""

import json
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest

from bitjax.chat.examples import build_chat_corpus
from bitjax.config import CorpusConfig
from bitjax.corpus import Corpus, build, build_corpus
from bitjax.corpus.tokenizer_training import END, train_tokenizer
from bitjax.tokenizer import BYTES, ByteTokenizer

CONFIG = CorpusConfig(separator="\n", valid_fraction=0.3, shard_tokens=100)
TEMPLATE = "{% for m in messages %}{{ m.role + m.content + '" + END + "' }}{% endfor %}"


class Stopped(Exception):
    """In the place of a signal, so that the test's own process can go on."""


class Counting(ByteTokenizer):
    """Bytes; counts the texts it is given, and stops at one of them."""

    def __init__(self, stop_at=None):
        self.count, self.stop_at = 0, stop_at

    def encode(self, text):
        if self.count == self.stop_at:
            raise Stopped
        self.count += 1
        return super().encode(text)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(build, "_BATCH_CHARACTERS", 40)
    monkeypatch.setattr(build, "_SAVE_EVERY", 3)


@pytest.fixture
def sources(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(12):
        lines = ["".join(random.choice(list("abc "), random.integers(0, 30))) for _ in range(9)]
        (folder / f"{i:02}.txt").write_text("\n".join(lines))
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stopped(sources, output, at, config=CONFIG):
    with pytest.raises(Stopped):
        build_corpus([sources], output, Counting(at), config)
    assert not output.exists()
    return output.with_name(output.name + ".partial")


@pytest.fixture
def whole(sources, tmp_path):
    build_corpus([sources], tmp_path / "whole", BYTES, CONFIG)
    return contents(tmp_path / "whole")


@pytest.mark.parametrize("at", [3, 40, 77, 104])
def test_what_was_done_is_not_done_again(sources, tmp_path, whole, at):
    partial = stopped(sources, tmp_path / "c", at)
    assert partial.exists() == (at > 3)  # nothing was noted before the third batch
    again = Counting()
    build_corpus([sources], tmp_path / "c", again, CONFIG)
    assert contents(tmp_path / "c") == whole
    index = json.loads(whole["index.json"])
    total = index["empty"] + sum(part["documents"] for part in index["parts"].values())
    # Some 4 documents a batch, and up to 3 batches to be done again.
    assert total - at <= again.count <= total - (0 if at == 3 else at - 24)
    assert not partial.exists()
    Corpus(tmp_path / "c", check=True)


def test_stopped_twice_and_with_workers(sources, tmp_path, whole):
    stopped(sources, tmp_path / "c", 30)
    stopped(sources, tmp_path / "c", 30)
    build_corpus([sources], tmp_path / "c", BYTES, CONFIG, workers=2)
    assert contents(tmp_path / "c") == whole


def test_masks_of_conversations_go_on_too(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_BATCH_CHARACTERS", 400)  # each batch starts a process that renders
    monkeypatch.setattr(build, "_SAVE_EVERY", 1)
    tokenizer = train_tokenizer(["a"], 257)
    lines = [json.dumps({"prompt": f"{i}", "completion": "yes"}) for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    about = CorpusConfig(kind="chat", valid_fraction=0.3, shard_tokens=100)
    rest = ([tmp_path / "a.jsonl"], tokenizer, about, TEMPLATE)
    inputs, *others = rest
    build_chat_corpus(inputs, tmp_path / "whole", *others)
    written = build.PartWriter.write
    calls = iter(range(1000))

    def failing(self, *arguments):
        if next(calls) == 25:
            raise Stopped
        written(self, *arguments)

    monkeypatch.setattr(build.PartWriter, "write", failing)
    with pytest.raises(Stopped):
        build_chat_corpus(inputs, tmp_path / "c", *others)
    monkeypatch.setattr(build.PartWriter, "write", written)
    assert list((tmp_path / "c.partial").glob("*.counted"))
    build_chat_corpus(inputs, tmp_path / "c", *others)
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")


@pytest.mark.parametrize("change", ["text", "shorter", "another file", "setting", "damage"])
def test_what_has_changed_begins_anew_and_says_so(sources, tmp_path, change):
    partial = stopped(sources, tmp_path / "c", 77)
    config, message = CONFIG, "the texts have changed"
    first = sources / "00.txt"
    if change == "text":
        raw = first.read_bytes()
        first.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    elif change == "shorter":
        for path in sorted(sources.iterdir())[3:]:
            path.unlink()
        message = "of a build with other files"
    elif change == "another file":
        (sources / "00a.txt").write_text("more\ntext")
        message = "of a build with other files"
    elif change == "setting":
        config, message = CorpusConfig(separator="\n", valid_fraction=0.4), "files or settings"
    else:
        (partial / "train.lengths").write_bytes(b"")
    again = Counting()
    with pytest.warns(UserWarning, match=message):
        build_corpus([sources], tmp_path / "c", again, config)
    with warnings.catch_warnings():
        build_corpus([sources], tmp_path / "fresh", BYTES, config)
    assert contents(tmp_path / "c") == contents(tmp_path / "fresh")
    assert again.count > 20 if change == "shorter" else again.count > 100


def test_texts_that_changed_behind_it_leave_nothing_of_the_old(sources, tmp_path):
    """The last file, which was not read yet, becomes shorter: so does the corpus."""
    (sources / "99.txt").write_text("\n".join("long line" * 3 for _ in range(60)))
    stopped(sources, tmp_path / "c", 160)
    assert len(list((tmp_path / "c.partial").glob("*.tokens"))) > 10
    (tmp_path / "c.partial" / "train-00099.tokens").write_bytes(b"a shard begun later")
    for path in (tmp_path / "c.partial").glob("*.lengths"):
        path.write_bytes(path.read_bytes() + 400 * b"later than what was noted")
    kept = sources / "99.txt"
    kept.write_text("\n".join(kept.read_text().split("\n")[:58]))
    build_corpus([sources], tmp_path / "c", BYTES, CONFIG)
    build_corpus([sources], tmp_path / "fresh", BYTES, CONFIG)
    assert contents(tmp_path / "c") == contents(tmp_path / "fresh")


def test_a_bad_line_can_be_mended(tmp_path):
    good = [json.dumps({"text": f"text {i}"}) for i in range(60)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([*good, "{"]))
    config = CorpusConfig(valid_fraction=0.3)
    with pytest.raises(ValueError, match="line 61 is not JSON"):
        build_corpus([path], tmp_path / "c", Counting(), config)
    path.write_text("\n".join(good))
    again = Counting()
    build_corpus([path], tmp_path / "c", again, config)
    assert again.count < 30
    build_corpus([path], tmp_path / "fresh", BYTES, config)
    assert contents(tmp_path / "c") == contents(tmp_path / "fresh")


KILLED = """
import sys
from pathlib import Path
from bitjax.config import CorpusConfig
from bitjax.corpus import build
from bitjax.tokenizer import BYTES
build._BATCH_CHARACTERS, build._SAVE_EVERY = 40, 3
build.build_corpus(
    [Path(sys.argv[1])], Path(sys.argv[2]), BYTES,
    CorpusConfig(separator="\\n", valid_fraction=0.3, shard_tokens=100),
    on_progress=lambda done, total: print(done, flush=True),
)
"""


def test_killed_without_warning(sources, tmp_path, whole):
    total = sum(path.stat().st_size for path in sources.iterdir())
    command = [sys.executable, "-c", KILLED, str(sources), str(tmp_path / "c")]
    for kill_at in (0.5, 0.9):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                if int(line) >= kill_at * total:
                    process.kill()
        assert process.returncode == -signal.SIGKILL
        assert (tmp_path / "c.partial" / "progress.json").exists()
    again = Counting()
    build_corpus([sources], tmp_path / "c", again, CONFIG)
    assert contents(tmp_path / "c") == whole
    assert again.count < 60
