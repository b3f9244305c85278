"""Hub names and downloads, with the hub's package replaced: there is no network here."""

import sys
from types import SimpleNamespace

import pytest
from tiny import tiny_model

from bitjax.cli import main
from bitjax.interop.formats import local_path, open_checkpoint
from bitjax.interop.hub import download, is_hub_name
from bitjax.interop.huggingface import write_huggingface
from bitjax.interop.model_file import checkpoint_of


@pytest.mark.parametrize(
    ("text", "is_name"),
    [
        ("microsoft/bitnet-b1.58-2B-4T", True),
        ("tiiuae/Falcon-E-1B-Base@prequantized", True),
        ("microsoft/bitnet-b1.58-2B-4T-gguf:ggml-model-i2_s.gguf", True),
        ("a/b@refs/pr/1:sub/c.gguf", True),
        ("model.safetensors", False),
        ("a/b/c", False),
        ("../b", False),
        ("./b", False),
        ("/a/b", False),
        ("a/b:c.bin", False),
        ("a/b ", False),
        ("https://x/y", False),
        ("", False),
    ],
)
def test_names(text, is_name):
    assert is_hub_name(text) == is_name


@pytest.fixture
def hub(monkeypatch):
    """The package's two functions, which note how they are called."""
    calls = []
    fake = SimpleNamespace(calls=calls, answer="/somewhere")

    def answer(*arguments, **named):
        calls.append((arguments, named))
        if isinstance(fake.answer, Exception):
            raise fake.answer
        return fake.answer

    fake.snapshot_download = fake.hf_hub_download = answer
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    return fake


def test_a_folder_is_downloaded_without_pickles_and_code(hub):
    assert str(download("owner/name@main")) == "/somewhere"
    ((arguments, named),) = hub.calls
    assert arguments == ("owner/name",)
    assert named["revision"] == "main"
    assert set(named["allow_patterns"]) == {
        "*.safetensors", "*.json", "tokenizer.model", "merges.txt", "*.jinja",
    }  # fmt: skip
    assert named["ignore_patterns"] == ["*/*"]


def test_a_gguf_file_is_downloaded_alone(hub):
    download("owner/name:model.gguf")
    assert hub.calls == [(("owner/name", "model.gguf"), {"revision": None})]


@pytest.mark.parametrize("error", [OSError("no route\nto host"), ValueError("no route"), OSError()])
def test_errors_are_one_sentence(hub, error, capsys):
    hub.answer = error
    assert main(["inspect", "owner/name"]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert message.startswith("bitjax: owner/name does not exist here, and cannot be downloaded")
    assert ("no route" in message) == bool(str(error))


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"^owner/name does not exist here, and to download it ta"):
        local_path("owner/name")


def test_the_real_package_offline(monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants", reason="no huggingface_hub")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"cannot be downloaded from the Hugging Face Hub: \w"):
        local_path("owner/name")


def test_a_path_goes_before_a_name(hub, tmp_path, monkeypatch):
    model = tiny_model(num_layers=1, sub_norm=False, activation="silu")
    write_huggingface(tmp_path / "owner" / "name", checkpoint_of(model), "float32")
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("owner/name").config.hidden_size == 32
    assert hub.calls == []
    hub.answer = str(tmp_path / "owner" / "name")
    found = open_checkpoint("other/name")
    assert (found.origin, found.config.hidden_size) == ("other/name", 32)
