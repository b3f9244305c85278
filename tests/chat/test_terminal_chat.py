"""The terminal chat: commands, interrupts, pipes; and a real terminal."""

import io
import itertools
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
from texts import small_tokenizer
from tiny import tiny_model

from bitjax.chat import ChatFormat, Conversation, terminal
from bitjax.chat.terminal import Chat
from bitjax.cli import main
from bitjax.infer import Generator, SamplingParams, pack_model
from bitjax.model.files import save_model

GREEDY = SamplingParams(temperature=0, max_new_tokens=8)


@pytest.fixture(scope="module")
def model():
    model = tiny_model(vocab_size=272, num_layers=1, max_seq_len=160)
    model.tokenizer = small_tokenizer()
    return pack_model(model)


@pytest.fixture(scope="module")
def generator(model):
    return Generator(model)


@pytest.fixture
def talk(generator, monkeypatch, capsys):
    """Run a chat over lines (an exception is raised as a key would); what was said."""
    conversation = Conversation(ChatFormat(small_tokenizer(), generator.config), 160)

    def run(*lines):
        source = iter(lines)

        def read(prompt=""):
            line = next(source, EOFError)
            if isinstance(line, type):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)
        Chat(generator, conversation, GREEDY, interactive=True).run()
        return capsys.readouterr().out

    run.conversation = conversation
    return run


def test_answers_are_remembered(talk):
    said = talk("hello", "", "  ", "hello again")
    turns = talk.conversation.turns
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2
    assert turns[2]["content"] == "hello again"
    assert said.count("tokens/s; prompt of") == 2
    assert "of them kept" in said


def test_commands(talk):
    said = talk(
        "/help", "/system", "/system Be brief.", "/system", "one", "/clear", "/nothing", "//x"
    )
    assert "there is no system prompt" in said
    assert "the system prompt is set" in said
    assert "\nBe brief.\n" in said
    assert "there is no command /nothing; /help lists them" in said
    assert talk.conversation.system == "Be brief."
    assert [turn["content"] for turn in talk.conversation.turns][:1] == ["/x"]  # "one" is forgotten


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt, "/quit"])
def test_ways_to_leave(talk, end):
    talk(end, "never read")
    assert talk.conversation.turns == []


def test_lines_that_go_on(talk):
    talk("one\\", "two\\", "three")
    assert talk.conversation.turns[0]["content"] == "one\ntwo\nthree"


def test_an_interrupted_answer_stays(talk, monkeypatch):
    feed, calls = terminal.Chat._print, itertools.count()

    def interrupted(self, text):
        feed(self, text)
        if next(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Chat, "_print", interrupted)
    said = talk("hello", "and on")
    turns = talk.conversation.turns
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2
    assert 0 < len(turns[1]["content"]) < len(turns[3]["content"])
    assert "(stopped)" in said
    assert "tokens, stopped, " in said


def test_interrupted_before_the_first_token(talk, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("bitjax.infer.Session.compile", interrupted)
    assert "(stopped)" in talk("hello")
    assert talk.conversation.turns == []


def test_a_full_context(talk):
    said = talk(*["this question is rather long"] * 4)
    assert "the context is full: the 2 oldest messages are forgotten" in said
    said = talk("x" * 500)
    assert "the message takes" in said
    assert talk.conversation.turns[-1]["role"] == "assistant"


def test_controls_of_the_terminal_are_left_out(generator, capsys):
    Chat(generator, None, GREEDY, interactive=True)._print("a\x1b[31mb\x07c\td\n\x9b1m")
    assert capsys.readouterr().out == "a[31mbc\td\n1m"
    Chat(generator, None, GREEDY, interactive=False)._print("a\x1bb")
    assert capsys.readouterr().out == "a\x1bb"


@pytest.fixture
def path(model, tmp_path):
    save_model(tmp_path / "model.safetensors", model)
    return tmp_path / "model.safetensors"


def test_piped(path, generator, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\n/system Be brief.\nand\\\non"))
    assert main(["chat", str(path), "--temperature", "0", "--max-new-tokens", "8"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    talk = Conversation(ChatFormat(small_tokenizer(), generator.config), 160)
    wanted = ""
    for system, text in (("", "hello"), ("Be brief.", "and\non")):
        talk.system = system
        tokens, _ = talk.ask(text, 8)
        drawn = [int(t[0]) for t in generator.tokens([tokens], [GREEDY])]
        drawn = drawn[: drawn.index(269)] if 269 in drawn else drawn
        decoder = small_tokenizer().stream_decoder()
        answer = "".join(map(decoder.feed, drawn)) + decoder.finish()
        talk.answered(answer.strip())
        wanted += answer.lstrip() + "\n"
    assert captured.out == wanted


def test_options(path, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    template = tmp_path / "t.jinja"
    template.write_text("{{ raise_exception('no: ' + messages[0]['content']) }}")
    given = ["--template", str(template), "--system", "Be."]
    assert main(["chat", str(path), *given]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "bitjax: the chat template refuses: no: Be.\n")
    assert main(["chat", str(path), "--template", str(tmp_path / "none")]) == 1
    assert "No such file" in capsys.readouterr().err


def test_bytes_have_no_chat(tmp_path, capsys):
    save_model(tmp_path / "model.safetensors", tiny_model(num_layers=1))
    assert main(["chat", str(tmp_path / "model.safetensors")]) == 1
    assert "a chat needs tokens that begin and end turns" in capsys.readouterr().err


def test_at_a_real_terminal(path):
    """Prompt, answer, Ctrl-C at the prompt leaves with success."""
    ours, theirs = pty.openpty()
    code = (  # what a test runner or a shell's job ignores or blocks is inherited
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])\n"
        "from bitjax.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "chat", str(path), "--max-new-tokens", "8"]
    seen = b""

    def until(happened):
        nonlocal seen
        end = time.monotonic() + 120
        while not happened():
            assert time.monotonic() < end, seen
            if select.select([ours], [], [], 0.1)[0]:  # unread, it would hold the process up
                seen += os.read(ours, 65536)

    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
    try:
        until(lambda: b"/help lists commands" in seen and b"> " in seen)
        os.write(ours, b"hello\r")
        until(lambda: b"tokens/s; prompt of" in seen and seen.rstrip().endswith(b">"))
        # One that comes just before readline waits is seen after the next key: then a second one.
        sent = 0.0

        def left():
            nonlocal sent
            if process.poll() is None and time.monotonic() > sent + 5:
                sent = time.monotonic()
                process.send_signal(signal.SIGINT)
            return process.poll() is not None

        until(left)
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()
        os.close(theirs)
        os.close(ours)
