"""The process that renders often: what `render` gives, each task under its own limits."""

import threading

import pytest
from texts import CHATML, small_tokenizer
from tiny import tiny_config

from bitjax.chat import ChatFormat, Renderer, render

TALK = [{"role": "user", "content": "é 漢"}, {"role": "assistant", "content": "b"}]


@pytest.fixture(scope="module")
def renderer():
    with Renderer() as made:
        yield made


def test_renders_as_render_does(renderer):
    tasks = [(TALK, True), (TALK[:1], False)]
    assert renderer(CHATML, tasks) == [render(CHATML, *task) for task in tasks]
    assert renderer("{{ bos_token }}{{ messages | length }}", tasks, bos_token="<s>") == [
        "<s>2", "<s>1",
    ]  # fmt: skip


def test_threads_share_it(renderer):
    wanted = {n: render("{{ n }}:{{ messages[0].content }}", TALK, n=n) for n in range(2)}
    found = []

    def ask(n):
        for _ in range(10):
            found.append((n, renderer("{{ n }}:{{ messages[0].content }}", [(TALK, True)], n=n)))

    threads = [threading.Thread(target=ask, args=(n,)) for n in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20
    assert all(texts == [wanted[n]] for n, texts in found)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
         "took too much time"),
        ("{{ 'a' * 10 ** 10 }}", "took too much memory"),
        ("{% for %}", "is malformed at line 1"),
        ("x" * 200_000, "has 200,000 characters; it may have 131,072"),
    ],
    ids=["time", "memory", "malformed", "long"],
)  # fmt: skip
def test_a_bad_template_harms_no_later_one(renderer, template, message):
    renderer(CHATML, [(TALK, True)])
    process = renderer._process
    with pytest.raises(ValueError, match=f"^the chat template {message}"):
        raise next(iter(renderer(template, [(TALK, True)])))
    assert renderer(CHATML, [(TALK, True)]) == [render(CHATML, TALK)]
    assert renderer._process is process


def test_a_process_that_died_is_replaced(renderer):
    renderer(CHATML, [(TALK, True)])
    renderer._process.kill()
    renderer._process.wait()
    assert renderer(CHATML, [(TALK, True)]) == [render(CHATML, TALK)]


def test_an_end_during_a_task_is_an_error():
    with Renderer() as renderer:
        renderer(CHATML, [(TALK, True)])
        process = renderer._process
        process.kill()
        process.wait()
        process.poll = lambda: None  # it ended just after it was looked at
        with pytest.raises(ValueError, match="templates' process ended"):
            renderer(CHATML, [(TALK, True)])
        assert renderer(CHATML, [(TALK, True)]) == [render(CHATML, TALK)]


def test_conversations_together(renderer):
    tokenizer, config = small_tokenizer(), tiny_config(vocab_size=272)
    form = ChatFormat(tokenizer, config, renderer=renderer)
    bad = [{"role": "user", "content": "\ud800"}]
    refused = "{{ raise_exception('no') if messages[0].content == 'x' else messages[0].content }}"
    first, broken, second = form.tokens_all([TALK, bad, TALK[:1]])
    plain = ChatFormat(tokenizer, config)
    assert (first, second) == (plain.tokens(TALK), plain.tokens(TALK[:1]))
    assert isinstance(broken, ValueError)
    assert "not valid Unicode" in str(broken)
    form = ChatFormat(tokenizer, config, refused, renderer)
    one, two = form.tokens_all([[{"role": "user", "content": c}] for c in "xy"])
    assert str(one) == "the chat template refuses: no"
    assert two == tokenizer.encode("y").tolist()
    assert form.tokens_all([]) == []
