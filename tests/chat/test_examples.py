"""Conversations and pairs as tokens and masks, against templates written out by hand."""

import json

import numpy as np
import pytest

from bitjax.chat.examples import build_chat_corpus, chat_tokenizer, encode_examples
from bitjax.config import CorpusConfig
from bitjax.corpus import Corpus, build_corpus
from bitjax.corpus.rows import rows_of
from bitjax.corpus.sources import Document
from bitjax.corpus.tokenizer_training import END, train_tokenizer
from bitjax.text import TextTokenizer
from bitjax.tokenizer import BYTES

TEMPLATE = (
    "{% for m in messages %}{{ m.role + '> ' + m.content | trim + '" + END + "\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant> {% endif %}"
)
CHAT, PAIRS = CorpusConfig(kind="chat"), CorpusConfig(kind="pairs")


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer(train_tokenizer(["assistant> user> hello there system"], 280), TEMPLATE)


def turn(role, content):
    return {"role": role, "content": content}


def documents(*lines):
    return [Document(json.dumps(line), f"line {i}") for i, line in enumerate(lines, 1)]


def sequences(encoded):
    ends = np.cumsum(encoded.lengths)
    return [
        (encoded.ids[end - n : end].tolist(), encoded.counted[end - n : end].tolist())
        for end, n in zip(ends, encoded.lengths, strict=True)
    ]


def wanted(tokenizer, *pieces):
    """Ids and mask of (text, counted) pieces, each cut into tokens by itself."""
    ids, mask = [], []
    for text, counted in pieces:
        found = tokenizer.encode(text, control=True).tolist()
        ids, mask = ids + found, mask + [counted] * len(found)
    return ids, mask


def test_answers_and_their_ends_alone_are_counted(tokenizer):
    turns = [
        turn("system", "be kind"), turn("user", " hi "), turn("assistant", "hello "),
        turn("user", "more"), turn("assistant", "there"), turn("user", "unanswered"),
    ]  # fmt: skip
    pair = {"prompt": "hi", "completion": "hello"}
    found = encode_examples(documents({"messages": turns}, pair), tokenizer, CHAT)
    first = wanted(
        tokenizer, (f"system> be kind{END}\nuser> hi{END}\nassistant> ", 0), (f"hello{END}", 1),
        (f"\nuser> more{END}\nassistant> ", 0), (f"there{END}", 1),
    )  # fmt: skip
    second = wanted(tokenizer, (f"user> hi{END}\nassistant> ", 0), (f"hello{END}", 1))
    assert sequences(found) == [first, second]
    assert first[0][-1] == tokenizer.control[END] == tokenizer.stop[0]


def test_the_name_of_a_control_token_in_a_message_is_text(tokenizer):
    turns = [turn("user", f"a{END}b"), turn("assistant", f"x{END}y")]
    [(ids, mask)] = sequences(encode_examples(documents({"messages": turns}), tokenizer, CHAT))
    end = tokenizer.control[END]
    assert ids.count(end) == 2
    learned = [i for i, counted in zip(ids, mask, strict=True) if counted]
    assert learned[-1] == end
    assert tokenizer.decode(learned) == f"x{END}y"


def test_of_pairs_what_follows_the_shared_messages_is_counted(tokenizer):
    shared = [turn("user", "hi"), turn("assistant", "hello"), turn("user", "more")]
    lines = [
        {"prompt": shared, "chosen": "good", "rejected": "bad"},
        {"chosen": [*shared, turn("assistant", "good")],
         "rejected": [*shared, turn("assistant", "bad")], "prompt": "hi"},
        {"prompt": shared, "chosen": [turn("assistant", "good")],
         "rejected": [turn("assistant", "bad")]},
    ]  # fmt: skip
    encoded = encode_examples(documents(*lines), tokenizer, PAIRS)
    before = f"user> hi{END}\nassistant> hello{END}\nuser> more{END}\nassistant> "
    both = [wanted(tokenizer, (before, 0), (f"{text}{END}", 1)) for text in ("good", "bad")]
    assert sequences(encoded) == both * 3
    assert len(set(encoded.valid)) == 1


def test_bos_and_an_end_that_the_tokenizer_did_not_stop_at():
    plain = train_tokenizer(["assistant user hello"], 270)
    about = json.loads(plain.json)
    entry = about["added_tokens"][0]
    about["added_tokens"] += [entry | {"id": 270 + i, "content": name}
                              for i, name in enumerate(("<bos>", "<end>"))]  # fmt: skip
    special = type(plain.special)(bos=270, add_bos=True, stop=plain.stop)
    template = "{% for m in messages %}{{ m.role + ' ' + m.content + '<end>;' }}{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"  # noqa: E501
    made = chat_tokenizer(TextTokenizer(json.dumps(about), special), template)
    assert made.stop == (*plain.stop, 271)
    assert made.chat_template == template
    line = {"prompt": "u", "completion": "hello"}
    [(ids, mask)] = sequences(encode_examples(documents(line), made, CHAT))
    assert ids[0] == 270
    assert ids[-1] == 271
    assert mask[0] == 0
    assert made.decode([i for i, m in zip(ids, mask, strict=True) if m], control=True) == (
        "hello<end>"
    )


@pytest.mark.parametrize(
    ("line", "kind", "message"),
    [
        ({"text": "a"}, CHAT, "line 1 has neither 'messages' nor .* its fields are 'text'"),
        ({"messages": "a"}, CHAT, "'messages' is not a list of messages: 'a'"),
        ({"messages": [{"role": "user"}]}, CHAT, "not a message with role and content"),
        ({"messages": [turn("user", "a")]}, CHAT, "no message of the role 'assistant'"),
        ({"prompt": "a", "completion": 3}, CHAT, "'completion' is not a text or a list"),
        ({"prompt": "\ud800", "completion": "a"}, CHAT, "line 1: the text is not valid Unicode"),
        ({"prompt": "a", "chosen": "b"}, PAIRS, "has not both 'chosen' and 'rejected'"),
        ({"chosen": "a", "rejected": "b"}, PAIRS, "has no 'prompt' and none in 'chosen'"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, PAIRS, "chosen and rejected are equal"),
    ],
)
def test_lines_that_are_no_examples(tokenizer, line, kind, message):
    with pytest.raises(ValueError, match=message):
        encode_examples(documents(line), tokenizer, kind)


def test_templates_that_do_not_serve(tokenizer):
    for template, message in (
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "ends an answer with no control"),
        ("{{ messages | length }}" + TEMPLATE, "writes earlier messages anew"),
        ("{{ raise_exception('no') }}", "the chat template refuses: no"),
    ):
        with pytest.raises(ValueError, match=message):
            chat_tokenizer(tokenizer, template)
    with pytest.raises(ValueError, match="no chat template; give one with --template"):
        chat_tokenizer(train_tokenizer(["a"], 257))
    with pytest.raises(ValueError, match="this model's are bytes"):
        chat_tokenizer(BYTES, TEMPLATE)


@pytest.fixture(scope="module")
def built(tokenizer, tmp_path_factory):
    """A corpus of 40 conversations in shards of 64 tokens; the lengths of their questions grow."""
    folder = tmp_path_factory.mktemp("chat")
    lines = [{"prompt": "u" * (i + 1), "completion": f"hello {i}"} for i in range(40)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = CorpusConfig(kind="chat", valid_fraction=0.2, shard_tokens=64)
    build_chat_corpus([folder / "a.jsonl"], folder / "c", tokenizer, config)
    return folder, config


def test_masks_are_stored_beside_the_tokens(tokenizer, built):
    folder, config = built
    corpus = Corpus(folder / "c", check=True)
    assert corpus.index["format"] == 2
    assert corpus.tokenizer.chat_template == TEMPLATE
    lines = [json.loads(line) for line in (folder / "a.jsonl").read_text().splitlines()]
    encoded = encode_examples(documents(*lines), tokenizer, config)
    for part, held in ((corpus.train, False), (corpus.valid, True)):
        kept = [s for s, valid in zip(sequences(encoded), encoded.valid, strict=True)
                if valid == held]  # fmt: skip
        zero = np.array([0])
        found = part.windows(zero, part.tokens)[0].tolist()
        assert found == [i for ids, _ in kept for i in ids]
        counted = part.counted(zero, part.tokens)[0].astype(int).tolist()
        assert counted == [m for _, mask in kept for m in mask]
    shard = folder / "c" / "train-00001.counted"
    raw = shard.read_bytes()
    shard.write_bytes(raw[:5] + bytes([1 - raw[5]]) + raw[6:])
    with pytest.raises(ValueError, match=r"00001\.counted is damaged: its sha256"):
        Corpus(folder / "c", check=True)
    shard.write_bytes(raw)
    with pytest.raises(ValueError, match=r"is built by bitjax\.chat\.examples"):
        build_corpus([folder / "a.jsonl"], folder / "d", tokenizer, config)


def test_rows_hold_whole_conversations_once(built):
    part = Corpus(built[0] / "c").train
    lengths = np.diff(part.starts)
    for seq_len in (int(lengths.max()) + 20, int(np.median(lengths))):
        rows = rows_of(part, seq_len, apart=False)
        batch = rows.read(np.arange(rows.count))
        found = sorted(
            tuple(tokens[segments == s])
            for tokens, segments in zip(batch.tokens, batch.segments, strict=True)
            for s in range(1, segments.max() + 1)
        )
        room = seq_len + 1
        whole = [part.windows(part.starts[i : i + 1], n)[0] for i, n in enumerate(lengths)]
        cut = [i for i, n in enumerate(lengths) if n > room]
        empty = [i for i in cut if not part.counted(part.starts[i : i + 1], room).any()]
        kept = [tuple(w[:room]) for i, w in enumerate(whole) if i not in empty]
        assert found == sorted(kept)
        assert (rows.cut, rows.left_out) == (len(cut), len(empty))
        assert not batch.tokens[batch.segments == 0].any()
        assert not batch.counted[batch.segments == 0].any()
        assert cut or (batch.segments > 0).mean() > 0.8
    with pytest.raises(ValueError, match="none has a token of an answer among its first 3"):
        rows_of(part, 2, apart=False)
