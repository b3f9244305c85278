"""Tokenizers in Hugging Face folders, against transformers."""

import json

import pytest
from texts import EDGES, outside, random_texts, small_tokenizer, smollm2_file

from bitjax.interop.gguf.container import open_container
from bitjax.interop.tokenizers import (
    read_huggingface_tokenizer,
    tokenizer_from_gguf,
    write_huggingface_tokenizer,
)
from bitjax.interop.tokenizers.sentencepiece import tokenizer_from_sentencepiece
from bitjax.text.tokenizer import CHARACTER_OF
from bitjax.tokenizer import BYTES

TEXTS = [*EDGES, *random_texts(30, seed=7)]


def put(folder, name, content):
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    (folder / name).write_text(text, encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    """As the small tokenizer is written."""
    write_huggingface_tokenizer(tmp_path, small_tokenizer(add_bos=True, stop=(269, 270)))
    return tmp_path


def settings(folder, **changes):
    path = folder / "tokenizer_config.json"
    found = json.loads(path.read_text()) | changes
    put(folder, path.name, {key: value for key, value in found.items() if value is not None})


def document(folder, **changes):
    path = folder / "tokenizer.json"
    put(folder, path.name, json.loads(path.read_text()) | changes)


def theirs(folder):
    pytest.importorskip("transformers", reason="transformers is not installed; see 'parity'")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def smollm2():
    return tokenizer_from_gguf(open_container(smollm2_file()).metadata)


def llama2():
    return tokenizer_from_sentencepiece(outside("tokenizers/llama2_tokenizer.model").read_bytes())


@pytest.mark.parametrize(
    "make",
    [small_tokenizer, lambda: BYTES, smollm2, llama2],
    ids=["small", "bytes", "SmolLM2", "Llama 2"],
)
def test_transformers_reads_what_is_written(make, tmp_path):
    ours = make()
    write_huggingface_tokenizer(tmp_path, ours)
    other, again = theirs(tmp_path), read_huggingface_tokenizer(tmp_path)
    assert len(other) == again.vocab_size == ours.vocab_size
    for text in TEXTS:
        tokens = again.encode(text, control=True).tolist()
        assert tokens == other(text)["input_ids"], repr(text)
        assert again.encode(text).tolist() == ours.encode(text).tolist()
        plain = ours.encode(text).tolist()
        assert ours.decode(plain) == again.decode(plain)
        if "\ufffd" not in ours.decode(plain):
            assert other.decode(plain, skip_special_tokens=True) == ours.decode(plain)
    if ours is not BYTES:
        assert again.stop == ours.stop
        assert other.eos_token_id == ours.stop[0]
        assert other.bos_token_id == ours.special.bos
        assert other.chat_template == ours.chat_template == again.chat_template
        assert again.special.add_bos == ours.special.add_bos


def test_round_trip(folder):
    again = read_huggingface_tokenizer(folder)
    assert (again.special.bos, again.stop, again.special.add_bos) == (267, (269,), True)
    assert again.vocab_size == 272
    put(folder, "generation_config.json", {"eos_token_id": [269, 270]})
    assert read_huggingface_tokenizer(folder).stop == (269, 270)


def test_nothing_there(tmp_path):
    assert read_huggingface_tokenizer(tmp_path) is None


def test_where_ends_are_named(folder):
    put(folder, "config.json", {"eos_token_id": 268})
    assert read_huggingface_tokenizer(folder).stop == (269, 268)
    settings(folder, eos_token={"content": "<|begin|>"})
    assert read_huggingface_tokenizer(folder).stop == (267, 268, 269)
    settings(folder, eos_token=None)
    put(folder, "special_tokens_map.json", {"eos_token": "<|unused|>"})
    assert read_huggingface_tokenizer(folder).stop == (270, 268, 269)


@pytest.mark.parametrize(
    ("processor", "adds"),
    [
        (None, False),
        ({"type": "ByteLevel"}, False),
        ({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "b"}}],
          "special_tokens": {"b": {"ids": [267]}}}, True),
        ({"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A"}}],
          "special_tokens": {}}, False),
        ({"type": "Sequence", "processors": [
            {"type": "ByteLevel"},
            {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "b"}}],
             "special_tokens": {"b": {"ids": [267, 267]}}}]}, True),
        ({"type": "RobertaProcessing", "cls": ["b", 267], "sep": ["e", 1]}, True),
    ],
)  # fmt: skip
def test_bos_as_the_post_processor_has_it(folder, processor, adds):
    document(folder, post_processor=processor)
    settings(folder, add_bos_token=not adds)  # a word for the slow tokenizer
    tokenizer = read_huggingface_tokenizer(folder)
    assert tokenizer.special.add_bos == adds
    assert tokenizer.document["post_processor"] is None  # it is never run


def test_chat_templates(folder):
    assert "im_start" in read_huggingface_tokenizer(folder).chat_template
    (folder / "chat_template.jinja").unlink()
    settings(folder, chat_template="one")
    assert read_huggingface_tokenizer(folder).chat_template == "one"
    several = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    settings(folder, chat_template=several)
    assert read_huggingface_tokenizer(folder).chat_template == "d"
    settings(folder, chat_template=None)
    assert read_huggingface_tokenizer(folder).chat_template is None
    put(folder, "chat_template.jinja", "two")
    assert read_huggingface_tokenizer(folder).chat_template == "two"


def test_tokens_added_by_the_settings(folder):
    more = {"272": {"content": "<more>", "special": True}, "269": {"content": "<|im_end|>"}}
    settings(folder, added_tokens_decoder=more)
    tokenizer = read_huggingface_tokenizer(folder)
    assert tokenizer.vocab_size == 273
    assert tokenizer.encode("<more>", control=True).tolist() == [267, 272]


def test_gpt2s_older_form(tmp_path):
    vocabulary = {CHARACTER_OF[byte]: byte for byte in range(256)} | {"Ġa": 256}
    put(tmp_path, "vocab.json", vocabulary)
    put(tmp_path, "merges.txt", "#version: 0.2\nĠ a\n")
    tokenizer = read_huggingface_tokenizer(tmp_path)
    assert tokenizer.encode("a a").tolist() == [97, 256]
    put(tmp_path, "merges.txt", "Ġ a b\n")
    with pytest.raises(ValueError, match=r"merges.txt: 'Ġ a b' is not two pieces"):
        read_huggingface_tokenizer(tmp_path)


def test_model_files(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"YQ== 0\n")
    with pytest.raises(ValueError, match=r"tokenizer.model has 1 pieces; known are Llama 3's"):
        read_huggingface_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x80\x02}q\x00.")  # a pickle
    with pytest.raises(ValueError, match=r"tokenizer.model is cut short or no sentencepiece"):
        read_huggingface_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", r"tokenizer.json is not a tokenizer's JSON"),
        ("tokenizer_config.json", "{", r"tokenizer_config.json is not JSON"),
        ("tokenizer_config.json", "[]", r"tokenizer_config.json is not a JSON object"),
        ("tokenizer_config.json", "[" * 99_999, r"tokenizer_config.json is not JSON"),
        ("tokenizer_config.json", " " * 9_000_000, "has 9,000,000 bytes; up to 8,388,608"),
        ("tokenizer_config.json", {"bos_token": "zz"}, "bos_token 'zz' is not in the vocabulary"),
        ("tokenizer_config.json", {"bos_token": 5}, "bos_token 5 is not in the vocabulary"),
        ("tokenizer_config.json", {"added_tokens_decoder": []}, "added_tokens_decoder is not an o"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"-1": {"content": "x"}}},
         "added_tokens_decoder '-1' is malformed"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9999": {"content": "x"}}},
         "there is no token 272"),
        ("chat_template.jinja", "x" * 200_000, "is no text of up to 131,072 characters"),
        ("special_tokens_map.json", "3", "special_tokens_map.json is not a JSON object"),
        ("generation_config.json", {"eos_token_id": 272}, "eos_token_id 272 is no list of tokens"),
        ("generation_config.json", {"eos_token_id": [True]}, "eos_token_id"),
        ("generation_config.json", {"eos_token_id": [1] * 65}, "eos_token_id"),
        ("config.json", {"eos_token_id": "2"}, "eos_token_id '2' is no list of tokens"),
    ],
    ids=range(16),
)  # fmt: skip
def test_malformed(folder, name, content, message):
    put(folder, name, content)
    with pytest.raises(ValueError, match=message):
        read_huggingface_tokenizer(folder)


@pytest.mark.parametrize(
    "processor",
    [3, {"type": "TemplateProcessing"}, {"type": "TemplateProcessing", "single": []},
     {"type": "Sequence"}, {"type": "RobertaProcessing", "cls": 3},
     {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "b"}}],
      "special_tokens": {}}],
)  # fmt: skip
def test_malformed_post_processors(folder, processor):
    document(folder, post_processor=processor)
    with pytest.raises(ValueError, match=r"tokenizer.json: the post_processor is malformed"):
        read_huggingface_tokenizer(folder)


def test_a_bos_beyond_the_vocabulary(folder):
    document(folder, post_processor={"type": "RobertaProcessing", "cls": ["x", 5000]})
    with pytest.raises(ValueError, match="special token 5000 is not"):
        read_huggingface_tokenizer(folder)


def test_unwritable(tmp_path):
    with pytest.raises(ValueError, match=r"cannot write .*missing: No such file or directory"):
        write_huggingface_tokenizer(tmp_path / "missing", small_tokenizer())
