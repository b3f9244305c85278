"""The commands of `bitjax corpus`: what they write, show, and say of what cannot be."""

import json

import pytest

from bitjax.cli import main
from bitjax.corpus import Corpus
from bitjax.corpus.tokenizer_training import END

TEMPLATE = "{% for m in messages %}{{ m.role + m.content + '" + END + "' }}{% endfor %}"
CHATS = [{"prompt": f"q{i}", "completion": "a"} for i in range(30)]
PAIRS = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(30)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Inputs, and a tokenizer that the command trained."""
    made = tmp_path_factory.mktemp("cli")
    (made / "a.txt").write_text("\n--\n".join(f"text {i}" for i in range(50)))
    (made / "bad.jsonl").write_text('{"text": "a"}\n{')
    (made / "t.jinja").write_text(TEMPLATE)
    for name, lines in (("chat", CHATS), ("pairs", PAIRS)):
        (made / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = ["corpus", "tokenizer", str(made / "a.txt"), "--vocab-size", "270"]
    assert main([*command, "-o", str(made / "tokenizer.json")]) == 0
    return made


def build(folder, *arguments):
    return main(["corpus", "build", *map(str, arguments), "--workers", "1"])


def test_text_is_built_and_inspected(folder, tmp_path, capsys):
    out = tmp_path / "c"
    arguments = (folder / "a.txt", "--separator", r"\n--\n", "--valid-fraction", 0.3, "-o", out)
    assert build(folder, *arguments, "--tokenizer", folder / "tokenizer.json") == 0
    corpus = Corpus(out, check=True)
    assert corpus.train.documents + corpus.valid.documents == 50
    assert main(["corpus", "inspect", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "kind: text" in shown
    assert "every checksum is right" in shown
    assert build(folder, *arguments) == 1
    assert "exists; choose another name or give --overwrite" in capsys.readouterr().err
    assert build(folder, *arguments, "--overwrite") == 0
    assert Corpus(out).tokenizer.name == "bytes"
    (out / "train-00000.tokens").write_bytes(b"a")
    assert main(["corpus", "inspect", str(out)]) == 1
    assert "it is damaged or cut short" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["chat", "pairs"])
def test_conversations_are_built(folder, tmp_path, capsys, kind):
    arguments = (folder / f"{kind}.jsonl", f"--{kind}", "--template", folder / "t.jinja",
                 "--tokenizer", folder / "tokenizer.json", "--valid-fraction", 0.3)  # fmt: skip
    assert build(folder, *arguments, "-o", tmp_path / "c") == 0
    assert f"kind: {kind}, of which answers alone are learned" in capsys.readouterr().out
    corpus = Corpus(tmp_path / "c", check=True)
    documents = corpus.train.documents + corpus.valid.documents
    assert documents == 30 * (1 + (kind == "pairs"))
    assert corpus.tokenizer.chat_template == TEMPLATE


def test_errors_are_sentences(folder, tmp_path, capsys):
    out = tmp_path / "c"
    tokenizer = ("--tokenizer", folder / "tokenizer.json")
    for arguments, message in (
        ((folder / "bad.jsonl",), "line 2 is not JSON"),
        ((folder / "a.txt", "--template", folder / "t.jinja"), "--template is for --chat and"),
        ((folder / "chat.jsonl", "--chat", *tokenizer), "no chat template; give one with"),
        ((folder / "chat.jsonl", "--chat"), "this model's are bytes"),
        ((folder / "a.txt", "--chat", *tokenizer, "--template", folder / "t.jinja"), "JSON lines"),
        ((folder / "a.txt", "--tokenizer", folder / "none.json"), "cannot read"),
        ((folder / "a.txt", "--valid-fraction", 1), "is not 0 or between 0 and 1"),
        ((folder / "a.txt", "--chat", "--template", folder / "none", *tokenizer), "No such file"),
    ):
        assert build(folder, *arguments, "-o", out) == 1
        said = capsys.readouterr().err
        assert message in said
        assert "Traceback" not in said
        assert not out.exists()
    command = ["corpus", "tokenizer", str(folder / "bad.jsonl"), "-o", str(out)]
    assert main(command) == 1
    assert "line 2 is not JSON" in capsys.readouterr().err
    assert not out.exists()
    assert main(["corpus", "inspect", str(folder)]) == 1
    assert "is no corpus" in capsys.readouterr().err
