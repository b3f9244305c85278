"""The tokenizer in a Hugging Face folder, to and from the one JSON form.

tokenizer.json              the form itself; else
tokenizer.model             sentencepiece or tiktoken; else
vocab.json, merges.txt      GPT-2's older form
tokenizer_config.json       bos, eos, whether bos is added, chat template, more added tokens
special_tokens_map.json     bos and eos where the former is silent
chat_template.jinja         goes before the former's
generation_config.json, config.json    ids that end a text
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitjax.interop.tokenizers.documents import (
    GPT2_WORDS,
    byte_level,
    end_tokens,
    tokenizer_of,
    with_bytes_as_text,
)
from bitjax.interop.tokenizers.sentencepiece import tokenizer_from_sentencepiece
from bitjax.interop.tokenizers.tiktoken import looks_like_tiktoken, tokenizer_from_tiktoken
from bitjax.text import Specials, TextTokenizer
from bitjax.text import document as documents
from bitjax.text.document import MAX_BYTES, MAX_STEPS
from bitjax.tokenizer import Tokenizer

MAX_SETTINGS = 8 << 20  # bytes of each file but the vocabulary; tokenizer_config.json takes 50 kB


def read_huggingface_tokenizer(folder: Path) -> TextTokenizer | None:
    """The tokenizer of a folder; None if it holds none.

    Raises:
        ValueError: one that cannot be read or is not supported, naming the file.
    """
    base = _vocabulary(folder)
    if base is None:
        return None
    settings = _object(folder / "tokenizer_config.json")
    names = _object(folder / "special_tokens_map.json")
    document = base.document
    _add_tokens(folder / "tokenizer_config.json", document, settings.get("added_tokens_decoder"))
    where = base.where
    ids = dict(documents.pieces(where, document)) | {
        entry["content"]: entry["id"] for entry in documents.added_tokens(where, document)
    }

    def named(key: str) -> int | None:
        name = settings.get(key) or names.get(key)
        if isinstance(name, Mapping):
            name = name.get("content")
        if name is None:
            return None
        if not isinstance(name, str) or name not in ids:
            raise ValueError(f"{folder}: {key} {name!r:.40} is not in the vocabulary")
        return ids[name]

    control = {e["content"]: e["id"] for e in documents.added_tokens(where, document)
               if e.get("special")}  # fmt: skip
    bos, eos = named("bos_token"), named("eos_token")
    bos = base.special.bos if bos is None else bos
    ends = [eos, *_end_ids(folder, len(ids)), *base.special.stop]
    special = Specials(
        bos=bos,
        stop=end_tokens([end for end in ends if end is not None], control),
        add_bos=_adds_bos(folder, base.special, settings) and bos is not None,
        chat_template=_chat_template(folder, settings),
        pre=base.special.pre,
    )
    return tokenizer_of(where, document, special)


def _vocabulary(folder: Path) -> TextTokenizer | None:
    whole, model = folder / "tokenizer.json", folder / "tokenizer.model"
    if whole.exists():
        document = documents.parse(str(whole), _read(whole, MAX_BYTES))
        first = _first_token(str(whole), document.get("post_processor"))
        document |= {"truncation": None, "padding": None, "post_processor": None}
        special = Specials(bos=first, add_bos=first is not None)
        return tokenizer_of(str(whole), document, special)
    if model.exists():
        raw = _read(model, MAX_BYTES)
        read = tokenizer_from_tiktoken if looks_like_tiktoken(raw) else tokenizer_from_sentencepiece
        return read(raw, str(model))
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        vocabulary = _object(folder / "vocab.json", MAX_BYTES)
        merges = _merges(folder / "merges.txt")
        return tokenizer_of(
            str(folder / "vocab.json"),
            byte_level(vocabulary, merges, [], [GPT2_WORDS], whole_words=False),
            Specials(pre="gpt-2"),
        )
    return None


def _read(path: Path, most: int) -> bytes:
    try:
        size = path.stat().st_size
        if size > most:
            raise ValueError(f"{path} has {size:,} bytes; up to {most:,} are read")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None


def _object(path: Path, most: int = MAX_SETTINGS) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    if not path.exists():
        return {}
    try:
        found = json.loads(_read(path, most))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a JSON object")
    return found


def _merges(path: Path) -> list[list[str]]:
    try:
        lines = _read(path, MAX_BYTES).decode().split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8") from None
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    for pair in pairs:
        if len(pair) != 2:
            raise ValueError(f"{path}: {' '.join(pair)!r:.40} is not two pieces")
    return pairs


def _add_tokens(path: Path, document: dict[str, Any], listed: Any) -> None:
    """Add the tokens that the settings list beyond the vocabulary's own."""
    if listed is None:
        return
    if not isinstance(listed, Mapping):
        raise ValueError(f"{path}: added_tokens_decoder is not an object")
    held = {entry["id"] for entry in documents.added_tokens(str(path), document)}
    fresh = []
    for token, entry in listed.items():
        if not (isinstance(entry, Mapping) and isinstance(entry.get("content"), str)
                and token.isdecimal() and len(token) < 10):  # fmt: skip
            raise ValueError(f"{path}: added_tokens_decoder {token!r:.40} is malformed")
        if int(token) not in held:
            flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
            fresh.append({"id": int(token), "content": entry["content"]}
                         | {flag: entry.get(flag) is True for flag in flags})  # fmt: skip
    document["added_tokens"] = sorted(
        [*documents.added_tokens(str(path), document), *fresh], key=lambda entry: entry["id"]
    )


def _end_ids(folder: Path, count: int) -> list[int]:
    for name in ("generation_config.json", "config.json"):
        found = _object(folder / name).get("eos_token_id")
        ids = found if isinstance(found, list) else [] if found is None else [found]
        if not all(type(token) is int and 0 <= token < count for token in ids) or len(ids) > 64:
            raise ValueError(f"{folder / name}: eos_token_id {found!r:.40} is no list of tokens")
        if ids:
            return ids
    return []


def _adds_bos(folder: Path, base: Specials, settings: Mapping[str, Any]) -> bool:
    """Whether texts begin with bos: as tokenizer.json does it, else as the settings say.

    The settings' word is for the slow tokenizers, of which tokenizer.json was made.
    """
    whole = (folder / "tokenizer.json").exists()
    return base.add_bos if whole else settings.get("add_bos_token", base.add_bos) is True


def _first_token(where: str, processor: Any) -> int | None:
    """The token that a post-processor puts first, if it does.

    Read, never run: a hostile one may repeat a long list of tokens many times.
    """
    if processor is None:
        return None
    if not isinstance(processor, Mapping):
        raise ValueError(f"{where}: the post_processor is malformed")
    try:
        if processor.get("type") == "Sequence":
            firsts = [_first_token(where, part) for part in processor["processors"][:MAX_STEPS]]
            return next((first for first in firsts if first is not None), None)
        if processor.get("type") == "TemplateProcessing":
            name = processor["single"][0].get("SpecialToken", {}).get("id")
            return None if name is None else int(processor["special_tokens"][name]["ids"][0])
        if processor.get("type") in ("BertProcessing", "RobertaProcessing"):
            return int(processor["cls"][1])
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RecursionError):
        raise ValueError(f"{where}: the post_processor is malformed") from None
    return None


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return _read(path, MAX_SETTINGS).decode()
        except UnicodeDecodeError:
            raise ValueError(f"{path} is not UTF-8") from None
    found = settings.get("chat_template")
    if isinstance(found, list):  # several by name
        named = {e.get("name"): e.get("template") for e in found if isinstance(e, Mapping)}
        found = named.get("default")
    if found is not None and not isinstance(found, str):
        raise ValueError(f"{folder / 'tokenizer_config.json'}: chat_template is no text")
    return found


def write_huggingface_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Write the files that `transformers.AutoTokenizer` reads.

    Raises:
        ValueError: a tokenizer of an unknown kind, or a folder that cannot be written.
    """
    text = with_bytes_as_text(tokenizer)
    special = text.special
    names = {token: piece for piece, token in documents.pieces(text.where, text.document)} | {
        e["id"]: e["content"] for e in documents.added_tokens(text.where, text.document)
    }
    document = dict(text.document) | {"truncation": None, "padding": None}
    document["post_processor"] = _post_processor(names, special)
    tokens = {}
    if special.bos is not None:
        tokens["bos_token"] = names[special.bos]
    if special.stop:
        tokens["eos_token"] = tokens["pad_token"] = names[special.stop[0]]
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": special.add_bos,
        "clean_up_tokenization_spaces": False,
        **tokens,
    }
    files = {
        "tokenizer.json": json.dumps(document, ensure_ascii=False),
        "special_tokens_map.json": json.dumps(tokens, ensure_ascii=False, indent=2),
    }
    if special.chat_template:
        settings["chat_template"] = special.chat_template
        files["chat_template.jinja"] = special.chat_template
    files["tokenizer_config.json"] = json.dumps(settings, ensure_ascii=False, indent=2)
    try:
        for name, content in files.items():
            (folder / name).write_text(content, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot write {folder}: {error.strerror}") from None


def _post_processor(names: Mapping[int, str], special: Specials) -> dict[str, Any] | None:
    """Puts bos first."""
    if not special.add_bos or special.bos is None:
        return None
    name = names[special.bos]

    def template(*sequences: str) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = [{"SpecialToken": {"id": name, "type_id": 0}}]
        return parts + [{"Sequence": {"id": s, "type_id": i}} for i, s in enumerate(sequences)]

    return {
        "type": "TemplateProcessing",
        "single": template("A"),
        "pair": template("A", "B"),
        "special_tokens": {name: {"id": name, "ids": [special.bos], "tokens": [name]}},
    }
