"""The server on a tiny model: OpenAI's client, limits, and clients that behave badly."""

import asyncio
import concurrent.futures
import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import openai
import pytest
from http_raw import ask, events, opened, post, serving
from prometheus_client.parser import text_string_to_metric_families
from texts import small_tokenizer
from tiny import tiny_model

from bitjax.config import EngineConfig, ServeConfig
from bitjax.engine import Engine, Request, Sampling
from bitjax.infer import pack_model
from bitjax.model.files import save_model
from bitjax.protocol import BadRequest
from bitjax.serve import make_worker

TALK = [{"role": "user", "content": "hello"}]
CONTEXT = 256
CONFIG = ServeConfig(
    port=0, max_body=20_000, queue=12, connections=60, idle_seconds=1.5, send_seconds=1.0,
    max_tokens=200,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    made = tiny_model(vocab_size=272, num_layers=1, max_seq_len=CONTEXT)
    made.tokenizer = small_tokenizer()
    return pack_model(made)


@pytest.fixture(scope="module")
def server(model):
    with serving(model, EngineConfig(max_sequences=4), CONFIG, keys=("other", "secret")) as made:
        yield made


@pytest.fixture
def address(server):
    found, worker = server
    yield found
    idle(worker)  # every test leaves nothing behind


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0) as made:
        yield made


@pytest.fixture
def held(server, monkeypatch):
    """An engine that makes no step until the event is set."""
    _, worker = server
    go, step = threading.Event(), worker.engine.step

    def wait():
        assert go.wait(60)
        return step()

    monkeypatch.setattr(worker.engine, "step", wait)
    yield go
    go.set()
    idle(worker)


def idle(worker):
    ends = time.monotonic() + 60
    while worker.reserved or worker.live or worker.engine.pending:
        assert time.monotonic() < ends, (worker.reserved, worker.live, worker.engine.pending)
        time.sleep(0.01)


def wait_for(holds):
    ends = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.005)


@pytest.fixture(scope="module")
def alone(model):
    """What the engine gives for a request that has no company: (text, finish_reason)."""
    engine = Engine(model, EngineConfig(max_sequences=4))

    def run(tokens, **sampling):
        [found] = engine.generate([Request("x", tuple(tokens), Sampling(**sampling))])
        return [(choice.text, choice.finish_reason) for choice in found.choices]

    return run


def encoded(text, **more):
    return small_tokenizer().encode(text, **more).tolist()


CHAT = encoded("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n", control=True)


def test_completions(client, alone):
    settings = {"temperature": 1.5, "seed": 7, "max_tokens": 9}
    ours = {"temperature": 1.5, "seed": 7, "max_new_tokens": 9}
    answer = client.completions.create(
        model="tiny", prompt=["hello", encoded("in")], extra_body={"top_k": 50}, **settings
    )
    assert [(c.text, c.finish_reason) for c in answer.choices] == [
        *alone(encoded("hello"), top_k=50, **ours), *alone(encoded("in"), top_k=50, **ours),
    ]  # fmt: skip
    assert [c.index for c in answer.choices] == [0, 1]
    assert answer.usage.prompt_tokens == len(encoded("hello")) + 1
    assert (answer.object, answer.model) == ("text_completion", "tiny")
    echoed = client.completions.create(model="tiny", prompt="hello", echo=True, n=2, **settings)
    texts = [text for text, _ in alone(encoded("hello"), n=2, **ours)]
    assert [c.text for c in echoed.choices] == [f"hello{text}" for text in texts]
    assert texts[0] != texts[1]


def test_chats(client, alone):
    settings = {"temperature": 0.0, "max_tokens": 12}
    answer = client.chat.completions.create(model="tiny", messages=TALK, **settings)
    [(text, reason)] = alone(CHAT, temperature=0.0, max_new_tokens=12)
    [choice] = answer.choices
    assert (choice.message.content, choice.finish_reason) == (text, reason)
    assert choice.message.role == "assistant"
    assert answer.usage.prompt_tokens == len(CHAT)
    assert answer.id.startswith("chatcmpl-")
    # Control tokens in a message are text.
    sly = [{"role": "user", "content": [{"type": "text", "text": "<|im_end|>"}]}]
    again = client.chat.completions.create(model="tiny", messages=sly, **settings)
    assert again.usage.prompt_tokens == len(CHAT) - len(encoded("hello")) + len("<|im_end|>")


@pytest.mark.parametrize("n", [1, 3])
def test_streams(client, alone, n):
    settings = {"temperature": 1.0, "seed": 3, "max_tokens": 15, "n": n}
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=TALK, stream=True, stream_options={"include_usage": True},
            **settings,
        )
    )  # fmt: skip
    wanted = alone(CHAT, temperature=1.0, seed=3, max_new_tokens=15, n=n)
    texts, reasons = [""] * n, [None] * n
    for chunk in chunks[:-1]:
        [choice] = chunk.choices
        assert reasons[choice.index] is None
        if choice.delta.role:
            assert (choice.delta.role, texts[choice.index]) == ("assistant", "")
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason
    assert [*zip(texts, reasons, strict=True)] == wanted
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 15 * n
    assert len({chunk.id for chunk in chunks}) == 1
    assert sum(1 for chunk in chunks[:-1] if chunk.choices[0].delta.role) == n
    pieces = list(
        client.completions.create(model="tiny", prompt="hello", stream=True, echo=True, **settings)
    )
    texts = [""] * n
    for piece in pieces:
        texts[piece.choices[0].index] += piece.choices[0].text
    ours = {"temperature": 1.0, "seed": 3, "max_new_tokens": 15}
    assert texts == [f"hello{text}" for text, _ in alone(encoded("hello"), n=n, **ours)]
    assert len(pieces) > 2 * n


def test_a_seed_is_drawn_where_none_is_given(client):
    texts = {
        client.completions.create(model="tiny", prompt="hello", max_tokens=12).choices[0].text
        for _ in range(3)
    }
    assert len(texts) > 1


def test_log_probabilities(client, model):
    answer = client.chat.completions.create(
        model="tiny", messages=TALK, temperature=0, max_tokens=3, logprobs=True, top_logprobs=2
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 3
    for token in content:
        assert token.logprob == token.top_logprobs[0].logprob <= 0  # greedy
        assert token.token == token.top_logprobs[0].token
        assert len(token.top_logprobs) == 2
    spelled = b"".join(bytes(token.bytes) for token in content)
    assert spelled.decode(errors="replace") == answer.choices[0].message.content
    answer = client.completions.create(
        model="tiny", prompt="hello", temperature=0, max_tokens=3, logprobs=1
    )
    found = answer.choices[0].logprobs
    assert [len(x) for x in (found.tokens, found.token_logprobs, found.top_logprobs)] == [3, 3, 3]
    assert [min(top.values()) for top in found.top_logprobs] == found.token_logprobs


def test_constraints(client, address):
    pytest.importorskip("llguidance", reason="llguidance is not installed; see 'constraints'")
    answer = client.completions.create(
        model="tiny", prompt="hello", max_tokens=9, n=3, extra_body={"guided_regex": "[0-9]{3}"}
    )
    assert all(re.fullmatch("[0-9]{3}", choice.text) for choice in answer.choices)
    schema = {"enum": [10, 23]}  # without the white space that a random model would love
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    pieces = client.chat.completions.create(
        model="tiny", messages=TALK, response_format=form, max_tokens=60, temperature=0, stream=True
    )
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert json.loads(text) in (10, 23)
    bad = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "x"}}}
    for path, body in (
        ("completions", {"prompt": "a", "guided_regex": "("}),
        ("completions", {"prompt": "a", "guided_grammar": "start: x"}),
        ("chat/completions", {"messages": TALK, "response_format": bad}),
    ):
        status, said = ask(address, "POST", f"/v1/{path}", body)
        assert (status, said["error"]["type"]) == (400, "invalid_request_error")
        assert len(said["error"]["message"]) < 1000


def test_models(client):
    [found] = client.models.list().data
    assert (found.id, found.max_model_len) == ("tiny", CONTEXT)
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="the model 'a/b' does not exist; this is tiny"):
        client.models.retrieve("a/b")
    with pytest.raises(openai.NotFoundError, match="'gpt' does not exist"):
        client.completions.create(model="gpt", prompt="a")


def test_tokens(address):
    status, found = ask(address, "POST", "/tokenize", {"prompt": "hello é"})
    assert (status, found["tokens"], found["count"]) == (200, encoded("hello é"), 3)
    assert found["max_model_len"] == CONTEXT
    status, found = ask(address, "POST", "/tokenize", {"messages": TALK})
    assert (status, found["tokens"]) == (200, CHAT)
    assert ask(address, "POST", "/detokenize", {"tokens": encoded("hello é")}) == (
        200, {"prompt": "hello é"},
    )  # fmt: skip
    for path, body, message in (
        ("/tokenize", {}, "give either a prompt or messages"),
        ("/tokenize", {"prompt": "a", "text": "b"}, "unknown field 'text'"),
        ("/detokenize", {"tokens": [272]}, "tokens=[272] is not a list of tokens in 0..271"),
        ("/detokenize", {}, "tokens=None is not a list of tokens"),
    ):
        status, found = ask(address, "POST", path, body)
        assert status == 400
        assert found["error"]["message"].startswith(message)


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("completions", b"{", 400, "the body is not JSON: "),
        ("completions", b"", 400, "the body is not JSON: "),
        ("completions", b'{"prompt": "\xff"}', 400, "the body is not UTF-8: "),
        ("completions", b"[" * 9000, 400, "the body is not JSON: "),
        ("completions", b'{"temperature": Infinity}', 400, "the body is not JSON: Infinity"),
        ("completions", [], 400, "the request is no object: []"),
        ("completions", {"prompt": ""}, 400, "the prompt is empty"),
        ("completions", {"prompt": "a" * 300}, 400, "the prompt has 300 tokens; the context of"),
        ("completions", {"prompt": "a" * 19_000}, 400, "the prompt has at least "),
        ("completions", b'{"prompt": "\\ud800"}', 400, "prompt: the text is not valid Unicode"),
        ("completions", {"prompt": "a", "max_tokens": 201}, 400, "max_tokens=201 is not an integ"),
        ("completions", {"prompt": "a", "n": 17}, 400, "the request has 17 sequences; this server"),
        ("completions", {"prompt": "a", "top_p": 0}, 400, "top_p=0.0 is not in (0, 1]"),
        ("completions", {"prompt": "a", "logit_bias": {"999": 1}}, 400, "token 999 of logit_b"),
        ("completions", {"prompt": "a", "best_of": 3}, 400, "best_of=3 with n=1"),
        ("chat/completions", {"messages": [{"role": "tool", "content": "a"}]}, 400,
         "messages[0].role='tool' is not one of system, developer, user, assistant"),
        ("chat/completions", {"messages": TALK, "tools": [{}]}, 400, "tools are not supported"),
        ("chat/completions", {"messages": TALK, "prompt": "a"}, 400, "unknown field 'prompt'"),
        ("chat/completions", {"messages": TALK, "stream": 1}, 400, "stream=1 is not true or false"),
        ("embeddings", {"input": "a"}, 404, "POST /v1/embeddings is not known here"),
        ("models", {}, 405, "POST /v1/models is not known here"),
    ],
)  # fmt: skip
def test_bad_requests(address, path, body, status, message):
    found, said = ask(address, "POST", f"/v1/{path}", body)
    assert (found, said["error"]["type"]) == (status, "invalid_request_error")
    assert said["error"]["message"].startswith(message)


def test_keys(address):
    for key in ("secret", "other"):
        assert ask(address, "GET", "/v1/models", key=key)[0] == 200
    for key in ("", "wrong", "secret2"):
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions"),
                             ("GET", "/metrics"), ("POST", "/tokenize")):  # fmt: skip
            status, said = ask(address, method, path, b"{}" if method == "POST" else None, key)
            assert (status, said["error"]["code"]) == (401, "invalid_api_key")
        assert ask(address, "GET", "/health", key=key) == (200, {"status": "ok"})


def test_long_bodies(address):
    for body in (b'"' + b"x" * 20_000 + b'"', b"x" * 400_000):
        status, said = ask(address, "POST", "/v1/completions", body)
        assert (status, said["error"]["code"]) == (413, "body_too_long")
    chunked = [("Transfer-Encoding", "chunked")]
    raw = b"%x\r\n" % 30_000 + b"x" * 30_000 + b"\r\n0\r\n\r\n"
    assert ask(address, "POST", "/v1/completions", raw, headers=chunked)[0] == 413


def test_slow_bodies_and_connections_without_requests(address):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\n"
    slow = opened(address, head + b"Content-Length: 100\r\n\r\n{")
    silent, begun = opened(address), opened(address, head)
    began = time.monotonic()
    assert b"408" in slow.recv(100)
    for connection in (silent, begun):
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(100) == b""
    assert 1 < time.monotonic() - began < 15
    for connection in (slow, silent, begun):
        connection.close()
    for garbage in (b"\x16\x03\x01\x02\x00", b"GET / HTTP/9\r\n\r\n", b"x" * 200_000):
        with opened(address, garbage) as sent, contextlib.suppress(ConnectionResetError):
            assert sent.recv(200)[:12] in (b"HTTP/1.1 400", b"")


def test_a_full_queue(address, server, held):
    body = {"prompt": "hello", "max_tokens": 3, "n": 8}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = [pool.submit(ask, address, "POST", "/v1/completions", body) for _ in range(2)]
        wait_for(lambda: server[1].reserved == 16)
        status, said = ask(address, "POST", "/v1/completions", body | {"n": 1})
        assert (status, said["error"]["code"]) == (429, "queue_full")
        held.set()
        assert [answer.result()[0] for answer in first] == [200, 200]
    assert ask(address, "POST", "/v1/completions", body)[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_leave(address, server, held, alone, stream):
    _, worker = server
    body = {"prompt": "hello", "max_tokens": 200, "ignore_eos": True, "stream": stream}
    connections = [opened(address, post("/v1/completions", body)) for _ in range(3)]
    wait_for(lambda: worker.engine.pending == 3)
    before = worker.engine.stats.completion_tokens
    with concurrent.futures.ThreadPoolExecutor() as pool:
        stays = pool.submit(ask, address, "POST", "/v1/completions",
                            {"prompt": "in", "max_tokens": 40, "seed": 1})  # fmt: skip
        wait_for(lambda: worker.engine.pending == 4)
        for connection in connections:
            connection.close()
        wait_for(lambda: worker._cancelled or worker.engine.pending < 4)
        held.set()
        status, said = stays.result()
    assert status == 200
    [wanted] = alone(encoded("in"), max_new_tokens=40, seed=1, temperature=1.0)
    assert (said["choices"][0]["text"], said["choices"][0]["finish_reason"]) == wanted
    idle(worker)
    assert worker.engine.stats.completion_tokens - before < 300


def test_a_client_that_leaves_in_the_middle(address, server):
    _, worker = server
    body = {"prompt": "hello", "max_tokens": 200, "ignore_eos": True, "stream": True}
    before = cancelled(address, "client left")
    with opened(address, post("/v1/completions", body)) as connection:
        assert connection.recv(2000).startswith(b"HTTP/1.1 200")
    idle(worker)
    assert cancelled(address, "client left") == before + 1


def test_a_client_that_does_not_read(address, server):
    """Some 3 MB, which no buffer on the way holds."""
    _, worker = server
    body = {"prompt": "hello", "max_tokens": 200, "ignore_eos": True, "stream": True, "n": 16,
            "logprobs": 20}  # fmt: skip
    before = cancelled(address, "client slow")
    made = worker.engine.stats.completion_tokens
    with opened(address, post("/v1/completions", body), receive_buffer=4096) as connection:
        wait_for(lambda: worker.reserved)
        idle(worker)
        wait_for(lambda: not has_other_end(connection))  # it waits for no reader
        read = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(1 << 20):
                read = read[-100:] + piece
        assert b"[DONE]" not in read  # closed, whatever it had not read
    # It is found out while the answer is made, or after: the machine may be quick.
    made = worker.engine.stats.completion_tokens - made
    assert cancelled(address, "client slow") - before == (made < 16 * 200)
    assert ask(address, "POST", "/v1/completions", {"prompt": "a", "max_tokens": 1})[0] == 200


def has_other_end(connection):
    """Whether a process still has the server's end, which Linux tells by its inode."""
    ports = [name[1] for name in (connection.getpeername(), connection.getsockname())]
    table = Path("/proc/net/tcp")
    for line in table.read_text().splitlines()[1:] if table.exists() else ():
        fields = line.split()
        if [int(field.rpartition(":")[2], 16) for field in fields[1:3]] == ports:
            return fields[9] != "0"
    return False


def cancelled(address, reason):
    """How many requests were, for this reason."""
    found = metrics(address).get("bitjax_cancelled_total", ())
    return sum(value for labels, value in found if labels == {"reason": reason})


def metrics(address):
    status, text = ask(address, "GET", "/metrics")
    assert status == 200
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def test_metrics(address, client):
    def of(name, **labels):
        return sum(v for got, v in metrics(address).get(name, ()) if got.items() >= labels.items())

    names = ("bitjax_generated_tokens_total", "bitjax_time_to_first_token_seconds_count",
             "bitjax_inter_token_seconds_count", "bitjax_request_seconds_count")  # fmt: skip
    before = [of(name) for name in names]
    path = {"path": "/v1/completions", "status": "200"}
    answers = of("bitjax_http_requests_total", **path)
    client.completions.create(
        model="tiny", prompt="hello", max_tokens=5, n=2, extra_body={"ignore_eos": True}
    )
    assert [of(name) - value for name, value in zip(names, before, strict=True)] == [10, 2, 8, 1]
    assert of("bitjax_http_requests_total", **path) == answers + 1
    assert (of("bitjax_sequences_capacity"), of("bitjax_sequences_reserved")) == (16, 0)


def test_more_connections_than_allowed(address):
    """Those beyond the limit are refused, and the others are answered all the while."""
    connections = [opened(address) for _ in range(150)]
    answers = []
    for connection in connections:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        answers.append(connection.recv(4096))
    statuses = [answer[9:12] for answer in answers]
    served = statuses.count(b"200")
    assert 55 <= served <= 60  # other clients may have kept some
    assert statuses == [b"200"] * served + [b"503"] * (150 - served)
    said = json.loads(answers[-1].partition(b"\r\n\r\n")[2])
    assert said["error"]["message"] == "the server has 60 connections, as many as it takes"
    connections.pop(0).close()
    wait_for(lambda: ask(address, "GET", "/health")[0] == 200)
    for connection in connections:
        connection.close()


def test_many_at_once_are_each_as_alone(address, alone):
    def run(i):
        body = {"prompt": f"{i}", "max_tokens": 3 + i % 9, "seed": i, "stream": i % 2 == 1}
        status, said = ask(address, "POST", "/v1/completions", body)
        assert status == 200
        if i % 2:
            return "".join(e["choices"][0]["text"] for e in events(said))
        return said["choices"][0]["text"]

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        texts = list(pool.map(run, range(36)))
    for i, text in enumerate(texts):
        [(wanted, _)] = alone(encoded(f"{i}"), seed=i, max_new_tokens=3 + i % 9, temperature=1.0)
        assert text == wanted


def test_an_engine_that_fails(model, monkeypatch, caplog):
    with serving(model, EngineConfig(max_sequences=2), CONFIG) as (address, worker):

        def step():
            raise RuntimeError("out of memory\nand more")

        monkeypatch.setattr(worker.engine, "step", step)
        body = {"prompt": "a", "max_tokens": 2}
        status, said = ask(address, "POST", "/v1/completions", body)
        wanted = "the engine has failed: RuntimeError: out of memory"
        assert (status, said["error"]["message"]) == (500, wanted)
        assert (said["error"]["type"], worker.reserved) == ("server_error", 0)
        for method, path in (("POST", "/v1/completions"), ("GET", "/health")):
            status, said = ask(address, method, path, body if method == "POST" else None)
            assert (status, said["error"]["message"]) == (503, wanted)
        assert ask(address, "GET", "/v1/models")[0] == 200
    assert "the engine failed" in caplog.text


def test_an_engine_that_fails_while_a_prompt_is_encoded(model):
    """Nothing would ever answer what it was given afterwards."""

    async def run():
        worker = make_worker(model, EngineConfig(max_sequences=2), CONFIG)
        worker.start()
        ticket = worker.reserve(1)
        worker._fail("RuntimeError: out of memory")
        wanted = "the engine has failed: RuntimeError: out of memory"
        with pytest.raises(BadRequest, match=wanted) as found:
            await worker.submit(ticket, [(1,)], Sampling())
        worker.release(ticket, "ended early")
        worker.stop()
        return found.value.status, worker.reserved, worker.live

    assert asyncio.run(run()) == (503, 0, 0)


def test_sigterm_finishes_what_was_begun(model, tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(path, model)
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "bitjax.cli", "serve", str(path), "--port", "0",
         "--name", "tiny", "--max-tokens", "200", "--sequences", "4"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        said = process.stdout.readline()
        assert said.startswith("tiny is served at http://127.0.0.1:")
        address = said.split()[4].rstrip(";")
        body = {"prompt": "hello", "max_tokens": 200, "ignore_eos": True, "stream": True}
        connection = opened(address, post("/v1/completions", body))
        raw = connection.recv(100)
        assert raw.startswith(b"HTTP/1.1 200")
        process.send_signal(signal.SIGTERM)
        while piece := connection.recv(1 << 16):
            raw += piece
        connection.close()
        assert raw.count(b'"finish_reason":"length"') == 1
        assert raw.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        out, error = process.communicate(timeout=60)
        assert (process.returncode, out, error) == (0, "", "")
    finally:
        process.kill()
        process.communicate()
    port = int(address.rpartition(":")[2])
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
        pass


def test_command_line_errors(capsys, tmp_path):
    from bitjax import cli

    model = tiny_model(num_layers=1)
    save_model(tmp_path / "m.safetensors", pack_model(model))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for more, message in (
            (("--port", port), f"cannot listen on 127.0.0.1 port {port}: Address already in use"),
            (("--port", 70_000), "serve.port=70000 is not in 0..65535"),
            (("--max-body", 0), "serve.max_body=0 must be above 0"),
            (("--api-key", ""), "--api-key is empty"),
            (("--host", "nowhere.invalid"), "cannot listen on nowhere.invalid port 8000: "),
            (("--sequences", 0), "max_sequences=0 is below 1"),
            (("--memory", "inf"), "--memory inf is no size"),
        ):
            arguments = ["serve", tmp_path / "m.safetensors", *more]
            assert cli.main([str(a) for a in arguments]) == 1
            said = capsys.readouterr().err
            assert said.startswith(f"bitjax: {message}")
            assert said.count("\n") == 1
