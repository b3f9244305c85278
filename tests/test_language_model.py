"""`bitjax.load` and what it gives, on a tiny model."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
from texts import small_tokenizer
from tiny import tiny_model

import bitjax
from bitjax import language_model
from bitjax.config import EngineConfig
from bitjax.engine import Completion, Engine, Request, Sampling
from bitjax.generation import Generation, Generations
from bitjax.infer import pack_model
from bitjax.language_model import LanguageModel
from bitjax.model.files import save_model
from bitjax.protocol.calls import derived_seed

TALK = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    made = tiny_model(vocab_size=272, num_layers=1, max_seq_len=48)
    made.tokenizer = small_tokenizer()
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(path, pack_model(made))
    return path


@pytest.fixture(scope="module")
def model(path):
    made = bitjax.load(path, max_sequences=3)
    assert isinstance(made, LanguageModel)
    yield made
    assert made.engine.pending == 0
    made.close()


@pytest.fixture(scope="module")
def alone(path):
    """What the engine makes of token ids by themselves."""
    engine = Engine(bitjax.api.load(path), EngineConfig())

    def run(tokens, **sampling):
        [found] = engine.generate([Request("x", tuple(tokens), Sampling(**sampling))])
        return [choice.text for choice in found.choices]

    return run


def encoded(text, **more):
    return small_tokenizer().encode(text, **more).tolist()


def test_import_is_light():
    code = (
        "import bitjax, sys; bitjax.load; print([m for m in ('jax', 'flax') if m in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "[]\n"


def test_one_prompt(model, alone):
    one = model.generate("hello", max_new_tokens=5, seed=3)
    assert isinstance(one, Generation)
    assert [one.text] == alone(encoded("hello"), max_new_tokens=5, seed=3) == [str(one)]
    assert (one.usage.prompt_tokens, one.usage.completion_tokens, len(one.tokens)) == (1, 5, 5)
    assert 0 <= one.timings.started <= one.timings.first_token <= one.timings.finished
    assert (one.finish_reason, one.error, one.index) == ("length", "", 0)
    for tokens in (encoded("hello"), np.array(encoded("hello")), tuple(encoded("hello"))):
        assert model.generate(tokens, max_new_tokens=5, seed=3).text == one.text
    several = model.generate("hello", Sampling(max_new_tokens=9, seed=3), n=2, max_new_tokens=5)
    assert several.texts == alone(encoded("hello"), max_new_tokens=5, seed=3, n=2)
    assert several.text == one.text


def test_chats(model, alone):
    text = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    wanted = alone(encoded(text, control=True), temperature=0.0, max_new_tokens=6)
    one = model.generate(TALK, temperature=0.0, max_new_tokens=6)
    assert [one.text] == wanted
    both = model.generate([TALK, "hello"], temperature=0.0, max_new_tokens=6)
    assert both.texts == wanted + alone(encoded("hello"), temperature=0.0, max_new_tokens=6)


def test_several_prompts(model, alone):
    prompts = [f"p{i % 7}" for i in range(20)]
    found = model.generate(prompts, max_new_tokens=6, seed=5)
    assert isinstance(found, Generations)
    assert found.texts == [
        alone(encoded(p), max_new_tokens=6, seed=derived_seed(5, i))[0]
        for i, p in enumerate(prompts)
    ]
    assert len({one.text for one in found[::7]}) > 1  # equal prompts, seeds of their own
    assert [one.index for one in found] == list(range(20))
    assert [one.prompt for one in found] == prompts
    assert found.usage.completion_tokens == sum(len(one.tokens) for one in found)
    assert found.tokens_per_second == found.usage.completion_tokens / found.seconds > 0
    assert len(model.generate([])) == 0


def test_an_endless_iterator(model, alone):
    taken = itertools.count()
    prompts = (f"p{next(taken)}" for _ in itertools.count())
    found = list(itertools.islice(model.iterate(prompts, max_new_tokens=4), 10))
    assert next(taken) < 10 + 2 * 3 + 2
    assert len({one.index for one in found}) == 10
    for one in found:
        seed = derived_seed(0, one.index)
        assert [one.text] == alone(encoded(one.prompt), max_new_tokens=4, seed=seed)
    assert model.engine.pending == 0  # what ran on was cancelled


def test_a_stream(model, alone):
    pieces = list(model.stream("hello", max_new_tokens=12, seed=2))
    assert ["".join(pieces)] == alone(encoded("hello"), max_new_tokens=12, seed=2)
    assert len(pieces) > 2
    stream = model.stream("hello", max_new_tokens=40)
    next(stream)
    with pytest.raises(RuntimeError, match="this model is generating already"):
        model.generate("hello")
    stream.close()
    assert model.engine.pending == 0
    model.generate("hello", max_new_tokens=1)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ([], "the prompt is empty"),
        ("x" * 48, "the prompt has 48 tokens; the context of 48 leaves no room"),
        ("\ud800", "not valid Unicode"),
        ([272], r"token 272 of the prompt is not in 0\.\.271"),
        ([{"role": "tool", "content": "a"}], r"messages\[0\]\.role='tool' is not one of"),
        (["a", "b"], r"\['a', 'b'\] is no text, chat or list of tokens"),
        (["1", "2"], r"\['1', '2'\] is no text, chat or list of tokens"),
        ([1.5], r"\[1\.5\] is no text, chat or list of tokens"),
        (7, "7 is no text, chat or list of tokens"),
        (None, "None is no text, chat or list of tokens"),
    ],
)
def test_wrong_prompts(model, prompt, message):
    with pytest.raises(ValueError, match=f"^prompt 1: .*{message}"):
        model.generate(["a", prompt], max_new_tokens=2)
    with pytest.raises(ValueError, match=f"^prompt 1: .*{message}"):
        list(model.iterate(iter(["a", prompt]), max_new_tokens=2))
    found = model.generate(["a", prompt, "b"], max_new_tokens=2, errors="keep")
    assert [bool(one.error) for one in found] == [False, True, False]
    assert (found[1].text, found[1].finish_reason, found.errors) == ("", "error", [found[1]])
    assert "1 errors" in repr(found)
    kept = {one.index: one for one in model.iterate(iter(["a", prompt]), errors="keep",
                                                    max_new_tokens=2)}  # fmt: skip
    assert (kept[0].text, kept[1].error) == (found[0].text, found[1].error)


def test_wrong_settings(model, path):
    with pytest.raises(ValueError, match="unknown setting 'max_tokens'; there are max_new_tokens,"):
        model.generate("a", max_tokens=3)
    with pytest.raises(ValueError, match=r"top_p=0 is not in"):
        model.generate("a", top_p=0)
    with pytest.raises(ValueError, match="n=2 texts cannot be streamed"):
        next(model.stream("a", n=2))
    with pytest.raises(ValueError, match="3 is no prompt, nor a list of prompts"):
        model.generate(3)
    with pytest.raises(ValueError, match="unknown setting 'sequences'; there are cache_dtype"):
        bitjax.load(path, sequences=3)


def test_an_engine_that_refuses(model, monkeypatch):
    submit = Engine.submit

    def refuse(self, request):
        if len(request.prompt) == 2:
            raise ValueError("the grammar is wrong")
        submit(self, request)

    monkeypatch.setattr(Engine, "submit", refuse)
    with pytest.raises(ValueError, match=r"^prompt 1: the grammar is wrong$"):
        model.generate(["a", "ab"], max_new_tokens=2)
    with pytest.raises(ValueError, match=r"^the grammar is wrong$"):
        next(model.stream("ab"))
    found = model.generate(["a", "ab"], max_new_tokens=2, errors="keep")
    assert [one.error for one in found] == ["", "the grammar is wrong"]


def test_shown_in_a_notebook(model, monkeypatch):
    html = model._repr_html_()
    assert "hidden_size" in html
    one = model.generate("<b>", max_new_tokens=2)
    assert "&lt;b&gt;" in one._repr_html_()
    assert "3 + 2" in one._repr_html_()
    found = model.generate([TALK, "<i>"] * 11, max_new_tokens=1)
    shown = found._repr_html_()
    assert ("&lt;i&gt;" in shown, "hello" in shown, "2 more" in shown) == (True, True, True)
    assert "22 generations" in shown
    assert repr(found).startswith("<22 generations: ")
    failed = Generation.of(0, "a" * 999, Completion("x", (), error="<no>"))
    assert "&lt;no&gt;" in failed._repr_html_()
    assert "a" * 301 not in failed._repr_html_()


def test_progress(model, capsys, monkeypatch):
    model.generate(["a", "b"], max_new_tokens=2, progress=True)
    said = capsys.readouterr().out
    assert "generating  2/2  " in said
    assert "tok/s  ETA 0:00" in said
    model.generate(["a", "b"], max_new_tokens=2)
    assert capsys.readouterr().out == ""
    display = pytest.importorskip("IPython.display")
    lines = []

    class Handle:
        def update(self, html):
            lines.append(html.data)

    monkeypatch.setattr(display, "display", lambda *_, **__: Handle())
    monkeypatch.setattr(language_model.console, "is_jupyter", True)
    model.generate(["a", "b"], max_new_tokens=2)
    assert "value=2" in lines[-1]
    assert "2/2" in lines[-1]
