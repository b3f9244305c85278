"""Generation against the model run without a cache, and text rules on scripted tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import changed, tiny_config, tiny_model

from bitjax.infer import Generator, SamplingParams, pack_model
from bitjax.infer.generator import PREFILL_TOKENS, _prefills, padded_length
from bitjax.infer.programs import Program
from bitjax.infer.writer import TextWriter
from bitjax.tokenizer import BYTES, ByteTokenizer

GREEDY = SamplingParams(temperature=0, max_new_tokens=14)
LIMIT = 32
# One byte, either side of the smallest prefill bucket of 16, several bytes a character, and a
# prompt that reaches the context limit before 14 tokens are drawn.
PROMPTS = ["a", "the 15 bytes of", "16 bytes, no mor", "17 bytes, no less", "äöü", "x" * 24]


@functools.cache
def tiny(form):
    """A model with varied text: only printable ASCII has a head, so text tells the tokens."""
    model = tiny_model(seed=1, tie_embeddings=False, max_seq_len=LIMIT)
    printable = (jnp.arange(256) >= 32) & (jnp.arange(256) < 127)
    model.head.set_value(model.head[...] * printable[:, None])
    forms = {
        "packed": lambda: pack_model(model),
        "packed tables": lambda: pack_model(model, "ternary1.6", "int4"),
        "bfloat16": lambda: pack_model(model, "ternary1.6", "bfloat16"),
        "screened": lambda: pack_model(model, "ternary1.6", "screened"),
    }
    return model if form == "float" else changed(forms[form](), impl="ffi")


@functools.cache
def generator(form):
    return Generator(tiny(form))


@functools.cache
def full_logits(form):
    """The model on whole sequences of the context's length: causal, so what follows is unread."""
    graph, params = nnx.split(tiny(form))
    run = jax.jit(lambda params, tokens: nnx.merge(graph, params)(tokens))
    return lambda tokens: np.asarray(
        run(params, jnp.asarray([tokens + [0] * (LIMIT - len(tokens))], jnp.int32))
    )[0, len(tokens) - 1]


def oracle_greedy(form, prompt, count):
    """(bytes, smallest gap between the best and the second token)"""
    tokens, gaps = list(prompt.encode()), []
    start = len(tokens)
    while len(tokens) < min(start + count, LIMIT):
        logits = full_logits(form)(tokens)
        tokens.append(int(logits.argmax()))
        second, first = np.sort(logits)[-2:]
        gaps.append(first - second)
    return bytes(tokens[start:]), min(gaps)


def what(completion):
    """All of a completion but its timings."""
    return completion.prompt, completion.text, completion.tokens, completion.finish_reason


@pytest.mark.parametrize("form", ["float", "packed", "packed tables"])
def test_greedy_text_is_the_models_without_a_cache(form):
    completions = generator(form).generate(PROMPTS, GREEDY)
    varied = set()
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        wanted, gap = oracle_greedy(form, prompt, 14)
        assert gap > 1e-4  # no coin toss: rounding differs by about 1e-6
        varied.add(wanted)
        assert what(completion) == (
            prompt, wanted.decode("ascii"), len(wanted), "length"
        )  # fmt: skip
        assert len(wanted) == min(14, LIMIT - len(prompt.encode()))
    assert len(varied) == len(PROMPTS)
    assert max(len(set(text)) for text in varied) >= 8


def test_a_batch_gives_what_each_prompt_gives_alone():
    gen = generator("packed")
    params = [
        SamplingParams(max_new_tokens=31, temperature=1.0, seed=7),
        GREEDY,
        SamplingParams(max_new_tokens=5, temperature=1.0, top_k=9, seed=7),
        SamplingParams(max_new_tokens=14, temperature=0.7, top_p=0.9, seed=8),
        SamplingParams(max_new_tokens=1, temperature=1.0, min_p=0.05, seed=3),
        SamplingParams(max_new_tokens=24, repetition_penalty=1.4, seed=2**32 - 1),
    ]
    together = gen.generate(PROMPTS, params)
    alone = [gen.generate([prompt], p)[0] for prompt, p in zip(PROMPTS, params, strict=True)]
    assert [what(c) for c in together] == [what(c) for c in alone]
    assert [c.tokens for c in together] == [31, 14, 5, 14, 1, LIMIT - 24]
    again = gen.generate(PROMPTS[::-1], params[::-1])[::-1]
    assert [what(c) for c in again] == [what(c) for c in alone]


def test_a_seed_repeats_its_text_and_another_does_not():
    texts = [
        generator("packed").generate(["a"], SamplingParams(max_new_tokens=24, seed=seed))[0].text
        for seed in (3, 3, 4)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_one_compiled_step_serves_every_token_and_every_setting():
    gen = Generator(tiny("packed"))
    for params in (
        GREEDY,
        SamplingParams(max_new_tokens=9, temperature=1.3, seed=5),
        SamplingParams(max_new_tokens=3, top_k=4, top_p=0.5, min_p=0.1, repetition_penalty=2.0),
        SamplingParams(max_new_tokens=3, stop=("x",)),
    ):
        gen.generate(["hello"], params)
        list(gen.stream("a prompt of the same bucket"[:16], params))
    gen.compile("hello")
    assert len(gen.decode) == len(gen._fill) == len(gen.first) == 1
    gen.generate(PROMPTS, GREEDY)  # another batch size, another program
    assert len(gen.decode) == 2


def counting_prefills(monkeypatch):
    """Shapes of the prompts that are run from now on."""
    shapes, run = [], Program.__call__

    def counted(program, *arguments):
        if len(arguments) == 5 and getattr(arguments[2], "ndim", 0) == 2:
            shapes.append(arguments[2].shape)
        return run(program, *arguments)

    monkeypatch.setattr(Program, "__call__", counted)
    return shapes


def test_equal_prompts_are_run_once(monkeypatch):
    gen = generator("packed")
    prompts = ["hello", "a longer prompt, 31", "hello", "x", "a longer prompt, 31", "hello"]
    params = [SamplingParams(max_new_tokens=9, temperature=1.0, seed=s) for s in range(6)]
    alone = [gen.generate([prompt], p)[0] for prompt, p in zip(prompts, params, strict=True)]
    shapes = counting_prefills(monkeypatch)
    assert [what(c) for c in gen.generate(prompts, params)] == [what(c) for c in alone]
    assert shapes == [(2, 16), (1, 32)]  # "hello" and "x", then the longer one
    assert len({c.text for c in alone}) == 6
    shapes.clear()
    texts = {c.text for c in gen.generate(["hello"] * 6, params)}
    assert shapes == [(1, 16)]
    assert len(texts) == 6


def test_many_prompts_are_run_in_parts_of_one_size(monkeypatch):
    monkeypatch.setattr("bitjax.infer.generator.PREFILL_TOKENS", 48)
    gen = generator("packed")
    prompts = [chr(97 + i) * (1 + i % 3) for i in range(7)]
    alone = [gen.generate([prompt], GREEDY)[0] for prompt in prompts]
    shapes = counting_prefills(monkeypatch)
    assert [what(c) for c in gen.generate(prompts, GREEDY)] == [what(c) for c in alone]
    assert shapes == [(3, 16)] * 3


@pytest.mark.parametrize("form", ["float", "packed"])
def test_long_prompts_are_run_in_pieces(form, monkeypatch):
    gen = Generator(tiny(form))
    whole = gen.generate(PROMPTS, GREEDY)
    monkeypatch.setattr("bitjax.infer.generator.PREFILL_TOKENS", 16)
    shapes = counting_prefills(monkeypatch)
    assert [what(c) for c in gen.generate(PROMPTS, GREEDY)] == [what(c) for c in whole]
    assert shapes == [(1, 16)] * (4 + 2 + 2)  # of 17 and 24 bytes in two pieces each
    shapes.clear()
    assert what(gen.generate(["x" * 24], GREEDY)[0]) == what(whole[-1])
    assert shapes == [(1, 16)] * 2


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40))
def test_every_prompt_is_run_and_little_besides(lengths):
    prompts = sorted(
        ((i, *range(n - 1)) for i, n in enumerate(lengths)), key=lambda p: padded_length(len(p))
    )
    held = {}
    cost = 0
    for row, tokens_NxT, lengths_N in _prefills(prompts, 300):
        assert tokens_NxT.size <= max(PREFILL_TOKENS, tokens_NxT.shape[1])
        cost += tokens_NxT.size
        for i, (tokens, length) in enumerate(zip(tokens_NxT, lengths_N, strict=True)):
            held[row + i] = tuple(tokens[:length].tolist())
            assert not tokens[length:].any()
            assert length <= tokens_NxT.shape[1] < max(17, 1.25 * length + 16)
    assert [held[row] for row in range(len(prompts))] == prompts
    buckets = len({padded_length(n) for n in lengths})
    # Padding to a bucket, and in each bucket one part that is not full.
    assert cost <= sum(map(padded_length, lengths)) + buckets * PREFILL_TOKENS


@pytest.mark.parametrize("n", [1, 15, 16, 17, 64, 65, 128, 129, 160, 161, 256, 257, 4095, 4096])
def testpadded_lengths(n):
    rounded = padded_length(n)
    assert n <= rounded < n + max(16, n / 4)
    assert rounded % 16 == 0
    assert padded_length(rounded) == rounded


@pytest.mark.parametrize("form", ["packed", "packed tables"])
def test_implementations_give_the_same_text(form):
    (ffi,) = generator(form).generate(["hello"], GREEDY)
    for changes in ({"impl": "reference"}, {"impl": "ffi", "fuse": False}):
        other = Generator(changed(tiny(form), **changes))
        assert what(other.generate(["hello"], GREEDY)[0]) == what(ffi)
    assert len(set(ffi.text)) >= 6


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "int8"])
def test_a_cache_of_another_dtype(cache_dtype):
    """It is what is asked for; together as alone, and by the custom call as by the reference."""
    gen = Generator(tiny("packed"), cache_dtype)
    cache = gen.empty(1, 65)[0][0]
    assert cache.keys.dtype == cache.values.dtype == cache_dtype
    assert cache.values.size == 128 * gen.config.num_kv_heads * gen.config.head_dim
    texts = [completion.text for completion in gen.generate(PROMPTS, GREEDY)]
    assert texts == [gen.generate([prompt], GREEDY)[0].text for prompt in PROMPTS]
    reference = Generator(changed(tiny("packed"), impl="reference"), cache_dtype)
    first = [completion.text[0] for completion in reference.generate(PROMPTS, GREEDY)]
    assert [text[0] for text in texts] == first
    exact = [completion.text for completion in generator("packed").generate(PROMPTS, GREEDY)]
    assert sum(a[0] == b[0] for a, b in zip(texts, exact, strict=True)) >= len(PROMPTS) - 1


def test_bfloat16_follows_float32():
    model = changed(tiny("packed"))
    model.dtype = jnp.dtype("bfloat16")
    gen = Generator(model)
    assert gen.empty(1, 4)[0][0].keys.dtype == jnp.bfloat16
    drawn = []
    for tokens in gen.tokens([list(b"hello")], [GREEDY]):
        drawn.append(int(tokens[0]))
        if len(drawn) == 12:
            break
    # bfloat16 keeps 8 bits and int8 activations 7: a token drawn is, in float32, among the best
    # by a few hundredths of the logits' spread.
    sequence = list(b"hello")
    for token in drawn:
        logits = full_logits("packed")(sequence)
        assert logits.max() - logits[token] < 0.3 * logits.std()
        sequence.append(token)


SCRIPT_LIMIT = 40


class Script(nnx.Module):
    """Stands in for a model: at position p it predicts byte p of a script, whatever it reads."""

    def __init__(self, text):
        raw = text.encode() if isinstance(text, str) else text
        self.config = tiny_config(max_seq_len=SCRIPT_LIMIT, hidden_size=256)
        self.dtype, self.tokenizer = jnp.dtype("float32"), BYTES
        self.script = nnx.Param(jnp.asarray(list(raw.ljust(SCRIPT_LIMIT, b".")), jnp.int32))

    def empty_cache(self, batch, length, dtype=None):
        return ()

    def extend(self, tokens_BxT, positions_BxT, cache):
        return jax.nn.one_hot(self.script[...][positions_BxT], 256), cache

    def logits(self, hidden):
        return hidden

    def next_logits(self, hidden, ranks):
        return self.logits(hidden)


class Constant(Script):
    """Predicts token t with logit 3 - t / 8 at every position."""

    def logits(self, hidden):
        return hidden * 0 + (3 - jnp.arange(256.0) / 8)[None]


def scripted(text):
    """A generator that continues any prompt of one byte with `text`, then dots."""
    return Generator(Script(text))


def greedy(**params):
    return SamplingParams(temperature=0, **params)


STORY = "The cat sat on the mat. END of it"


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ((), STORY),
        (("END",), "The cat sat on the mat. "),
        (("T",), ""),
        (("sat in", "mat"), "The cat sat on the "),
        (("on the mat", "the"), "The cat sat on "),
        (("cat sat", "at s"), "The c"),  # "at s" is complete before "cat sat"
        (("at", "The cat sat"), "The c"),
        (("sat", " sat", "at"), "The c"),
        (("sat", " sat"), "The cat"),  # both are complete at once; the earlier beginning counts
        (("nowhere",), STORY),
    ],
)
def test_stop_strings(stop, text):
    params = greedy(max_new_tokens=len(STORY), stop=stop)
    stream = scripted(STORY).stream("?", params)
    assert "".join(stream) == text
    reason = "length" if text == STORY else "stop"
    stopped = min((STORY.find(s) + len(s) for s in stop if s in STORY), default=len(STORY))
    assert what(stream.completion) == ("?", text, stopped, reason)


def test_a_possible_stop_is_held_back_until_it_is_none():
    pieces = list(scripted("a sat in b sat on c").stream("?", greedy(stop=("sat on",))))
    assert pieces == ["a", " ", "sat i", "n", " ", "b", " "]


def test_streamed_characters_are_whole():
    text = "aé€😀" * 3
    pieces = list(scripted(text).stream("?", greedy(max_new_tokens=len(text.encode()))))
    assert pieces == list(text)


def test_a_character_cut_by_the_limit_becomes_a_replacement():
    stream = scripted("ab😀").stream("?", greedy(max_new_tokens=4))
    assert list(stream) == ["a", "b", "\ufffd"]
    assert what(stream.completion) == ("?", "ab\ufffd", 4, "length")


@settings(deadline=None)
@given(
    st.text("abé😀", max_size=12).map(str.encode),
    st.integers(0, 30),
    st.lists(st.text("abé😀\ufffd", min_size=1, max_size=4), max_size=3).map(tuple),
)
def test_text_rules(raw, cut, stop):
    """Every rule at once, by looking at each prefix of the bytes as a whole."""
    raw = raw[:cut] or b"a"
    writer = TextWriter(ByteTokenizer(), SamplingParams(stop=stop), len(raw))
    released = ""
    for count in range(1, len(raw) + 1):
        last = count == len(raw)
        whole = raw[:count].decode("utf-8", "replace" if last else "ignore")
        found = [whole.find(s) for s in stop if s in whole]
        released += writer.feed(raw[count - 1])
        assert writer.text == released
        assert writer.tokens == count
        if found:
            assert (released, writer.finish_reason) == (whole[: min(found)], "stop")
            break
        assert writer.finish_reason == ("length" if last else "")
        # All is released but the longest end that some stop string begins with.
        free = next(
            n for n in range(len(whole) + 1) if last or n == len(whole)
            or any(s.startswith(whole[n:]) for s in stop)
        )  # fmt: skip
        assert released == (whole if last else whole[:free])
    assert writer.feed(65) == ""
    assert writer.text == released


def test_stream_and_generate_agree():
    for params in (GREEDY, SamplingParams(max_new_tokens=30, temperature=1.2, seed=11)):
        stream = generator("packed").stream("hello", params)
        pieces = list(stream)
        (completion,) = generator("packed").generate(["hello"], params)
        assert "".join(pieces) == completion.text
        assert what(stream.completion) == what(completion)


def test_a_stream_may_be_left_early():
    stream = scripted(STORY).stream("?", greedy())
    assert [piece for piece, _ in zip(stream, range(3), strict=False)] == ["T", "h", "e"]
    assert stream.completion.text.startswith("The")


@pytest.mark.parametrize("prompt", ["\x01\x02", "\0", "\x05"])
def test_the_repetition_penalty_counts_prompt_and_text_but_no_padding(prompt):
    seen, wanted = set(prompt.encode()), ""
    for _ in range(12):
        logits = [3 - t / 8 for t in range(128)]
        for t in seen:
            logits[t] = logits[t] / 1.5 if logits[t] > 0 else logits[t] * 1.5
        wanted += chr(int(np.argmax(logits)))
        seen.add(ord(wanted[-1]))
    params = greedy(max_new_tokens=12, repetition_penalty=1.5)
    assert Generator(Constant("")).generate([prompt], params)[0].text == wanted
    assert len(set(wanted)) >= 6


def test_max_new_tokens_and_the_context_limit():
    gen = scripted(STORY)
    for length, wanted, got in ((1, 7, 7), (1, 100, 39), (12, 28, 28), (12, 29, 28), (39, 9, 1)):
        (completion,) = gen.generate(["x" * length], greedy(max_new_tokens=wanted))
        assert what(completion)[1:] == (
            STORY.ljust(40, ".")[length - 1 : length - 1 + got], got, "length"
        )  # fmt: skip


def test_rates():
    completion = scripted(STORY).generate(["?"], greedy(max_new_tokens=11))[0]
    assert completion.prefill_seconds > 0
    assert completion.tokens_per_second == pytest.approx(10 / completion.decode_seconds)
    assert scripted(STORY).generate(["?"], greedy(max_new_tokens=1))[0].tokens_per_second == 0


def test_no_prompts_no_completions():
    assert generator("packed").generate([]) == []


@pytest.mark.parametrize("ask", [lambda g, p: g.stream(p), lambda g, p: g.generate(["ok", p])])
@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty; give at least one character"),
        ("x" * LIMIT, f"the prompt has {LIMIT} tokens; the model's context of {LIMIT} leaves no"),
        ("€" * 17, f"the prompt has 51 tokens; the model's context of {LIMIT} leaves no"),
        ("\ud800", "the text is not valid Unicode: surrogates not allowed"),
    ],
)
def test_prompts_that_cannot_be_continued(ask, prompt, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        ask(generator("packed"), prompt)


def test_numbers_of_prompts_and_params_must_agree():
    with pytest.raises(ValueError, match=r"^2 prompts, but 1 sampling parameters$"):
        generator("packed").generate(["a", "b"], [GREEDY])


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused():
    with pytest.raises(ValueError, match="the model has 255 tokens; the tokenizer has 256"):
        Generator(tiny_model(vocab_size=255, num_layers=1))


def test_a_screened_head_writes_what_the_whole_head_writes():
    # All but the last look at no more tokens than are exact.
    settings = [
        {"temperature": 0}, {"top_k": 5}, {"top_k": 1}, {"top_k": 20, "min_p": 0.01},
        {"temperature": 0, "repetition_penalty": 1.5},
        {"temperature": 0, "repetition_penalty": 0.8}, {"temperature": 2, "top_k": 300},
    ]  # fmt: skip
    params = [SamplingParams(max_new_tokens=20, seed=7, **s) for s in settings]
    prompts = [f"{i}: the" for i in range(len(params))]
    texts = [
        [done.text for done in generator(form).generate(prompts, params)]
        for form in ("bfloat16", "screened")
    ]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == len(params)


def test_next_logits_are_the_whole_products_without_a_screen():
    hidden, ranks = jax.random.normal(jax.random.key(0), (2, 32)), jnp.array([1, 9], jnp.int32)
    plain, screened = tiny("bfloat16"), tiny("screened")
    whole = np.asarray(plain.logits(hidden))
    np.testing.assert_array_equal(plain.next_logits(hidden, ranks), whole)
    np.testing.assert_array_equal(screened.logits(hidden), whole)
    next_logits = np.asarray(screened.next_logits(hidden, ranks))
    for got, wanted, k in zip(next_logits, whole, (1, 9), strict=True):
        np.testing.assert_allclose(np.sort(got)[-k:], np.sort(wanted)[-k:], rtol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tables", ["float32", "int8", "screened"])
def test_activations_that_are_not_finite_give_tokens_of_the_vocabulary(tables, value):
    model = pack_model(tiny_model(), tables=tables)
    scale = model.blocks[0].ffn_norm.scale
    scale.set_value(scale[...].at[3].set(value))
    params = [SamplingParams(max_new_tokens=4, temperature=t, top_k=k, top_p=p)
              for t, k, p in ((0, 0, 1), (1, 0, 1), (1, 5, 1), (1, 0, 0.5))]  # fmt: skip
    for cache in ("float32", "int8"):
        steps = list(Generator(model, cache).tokens([[5, 9, 200]] * 4, params))
        assert len(steps) == 4
        assert all(((tokens >= 0) & (tokens < 256)).all() for tokens in steps)
