"""Soak a server: thousands of mixed requests, many of them faulty, and nothing lost or leaked.

    python tests/soak_server.py --requests 10000

Starts `bitjax serve` on a tiny model and sends, from some dozens of threads, requests of every
kind: whole and streamed, completions and chats, several samples, clients that leave at once or in
the middle, that do not read, that send bodies which are broken, slow or too long, or nothing; then
thousands of connections at once, each with a request.
Wants:
    - an answer to every request that waits for one, each with a status that its kind may have;
    - of every request with a seed the text that it gives alone;
    - afterwards: nothing running, waiting or reserved, no page of the cache held by a sequence, no
      more files and threads than before, memory that levels off;
    - SIGTERM: exit 0, nothing said on stderr.
The last line is JSON with the counts.
"""

import argparse
import asyncio
import collections
import concurrent.futures
import contextlib
import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import urlparse

from http_raw import ask, events, opened, post
from prometheus_client.parser import text_string_to_metric_families
from texts import small_tokenizer
from tiny import tiny_model

from bitjax.infer import pack_model
from bitjax.model.files import save_model

CONTEXT = 256
FAULTS = {  # of 100
    "leave at once": 5, "leave in the middle": 6, "do not read": 1, "bad json": 4,
    "bad field": 4, "too long a prompt": 3, "too long a body": 1, "slow body": 1,
    "no request": 2, "half a head": 1, "wrong path": 2, "garbage": 2,
}  # fmt: skip


def body_of(draw, i):
    """A request that can be answered, and its path."""
    size = draw.choice((1, 2, 5, 9, 20, 40))
    fields = {"max_tokens": size, "seed": draw.randrange(2**32), "stream": draw.random() < 0.5}
    fields["temperature"] = draw.choice((0, 1.3))
    if fields["temperature"] and draw.random() < 0.2:
        fields["n"] = draw.randrange(2, 5)
    if draw.random() < 0.2:
        fields |= {"top_k": 20, "repetition_penalty": 1.1, "presence_penalty": 0.5}
    header = "You are a helpful assistant and answer in few words. " * draw.randrange(3)
    if draw.random() < 0.5:
        return "/v1/completions", {"prompt": f"{header}{i % 50}", **fields}
    turns = [{"role": "system", "content": header}, {"role": "user", "content": f"{i % 50}"}]
    return "/v1/chat/completions", {"messages": turns, **fields}


def texts_of(path, said, streamed):
    """The texts of an answer, by their index."""
    found = collections.defaultdict(str)
    for part in events(said) if streamed else [said]:
        assert "error" not in part, part
        for choice in part["choices"]:
            if "chat" in path:
                piece = choice["delta" if streamed else "message"].get("content") or ""
            else:
                piece = choice["text"]
            found[choice["index"]] += piece
    return [found[i] for i in sorted(found)]


class Soak:
    """One run."""

    def __init__(self, address, requests, seed):
        self.address, self.requests, self.seed = address, requests, seed
        self.counts = collections.Counter()
        self.kept = {}  # request as JSON -> texts
        self.lock = threading.Lock()
        self.slow = threading.Semaphore(8)  # those that hold a connection for seconds

    def run(self, i):
        """Request i; counts what came of it."""
        draw = random.Random(f"{self.seed} {i}")
        kinds, weights = zip(*FAULTS.items(), strict=True)
        kind = draw.choices((*kinds, "good"), (*weights, 100 - sum(weights)))[0]
        path, body = body_of(draw, i)
        try:
            outcome = getattr(self, kind.replace(" ", "_"))(draw, path, body)
        except OSError as error:
            outcome = f"lost: {type(error).__name__}"
        with self.lock:
            self.counts[f"{kind}: {outcome}"] += 1

    def good(self, draw, path, body):
        while True:
            status, said = ask(self.address, "POST", path, body)
            if status not in (429, 503):
                break
            with self.lock:
                self.counts[f"asked again after {status}"] += 1
            time.sleep(0.05 * draw.random())
        assert status == 200, said
        texts = texts_of(path, said, body["stream"])
        assert len(texts) == body.get("n", 1)
        if not body["stream"]:
            assert said["usage"]["completion_tokens"] >= len(texts)
        key = json.dumps([path, {k: v for k, v in body.items() if k != "stream"}])
        with self.lock:
            if self.kept.setdefault(key, texts) != texts:
                return f"another text: {texts} for {self.kept[key]}"
        return 200

    def leave_at_once(self, draw, path, body):
        opened(self.address, post(path, body | {"max_tokens": 100})).close()
        return "left"

    def leave_in_the_middle(self, draw, path, body):
        long = {"max_tokens": 100, "stream": True, "ignore_eos": True}
        with opened(self.address, post(path, body | long)) as connection:
            connection.recv(draw.choice((1, 300, 3000)))
        return "left"

    def do_not_read(self, draw, path, body):
        long = {"max_tokens": 150, "stream": True, "ignore_eos": True, "temperature": 1, "n": 8}
        more = {"logprobs": 20} if "chat" not in path else {"logprobs": True, "top_logprobs": 20}
        with self.slow, opened(self.address, post(path, body | long | more), 4096):
            time.sleep(4)
        return "left"

    def bad_json(self, draw, path, body):
        raw = bytearray(json.dumps(body).encode())
        raw[draw.randrange(len(raw))] = draw.choice(b"\xff\x00{")
        status, _ = ask(self.address, "POST", path, bytes(raw[: draw.randrange(1, len(raw))]))
        return status

    def bad_field(self, draw, path, body):
        bad = draw.choice(({"temperature": -1}, {"n": 0}, {"nonsense": 1}, {"logprobs": "x"},
                           {"max_tokens": 10**9}, {"stop": [""]}, {"top_p": 0},
                           {"logit_bias": {"999": 1}}))  # fmt: skip
        return ask(self.address, "POST", path, body | bad)[0]

    def too_long_a_prompt(self, draw, path, body):
        return ask(self.address, "POST", "/v1/completions", {"prompt": "x" * 50_000})[0]

    def too_long_a_body(self, draw, path, body):
        return ask(self.address, "POST", "/v1/completions", {"prompt": "x" * 10_000_000})[0]

    def slow_body(self, draw, path, body):
        raw = post(path, body)
        with self.slow, opened(self.address, raw[:-5]) as connection:
            return int(connection.recv(100)[9:12] or 0)

    def no_request(self, draw, path, body):
        with self.slow, opened(self.address) as connection:
            time.sleep(draw.random())
            connection.close()
        return "left"

    def half_a_head(self, draw, path, body):
        with self.slow, opened(self.address, post(path, body)[:40]) as connection:
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(100) == b""
            return "closed"

    def wrong_path(self, draw, path, body):
        return ask(self.address, draw.choice(("GET", "POST", "DELETE")), "/v1/none")[0]

    def garbage(self, draw, path, body):
        raw = draw.randbytes(draw.randrange(1, 500)) + b"\r\n\r\n"
        with opened(self.address, raw) as sent, contextlib.suppress(ConnectionResetError):
            return int(sent.recv(100)[9:12] or 0)
        return 400


# What each kind may end with; 429 is a full queue (tokens are looked at with a place in it), 503
# too many connections, and 408 a machine so busy that 10 MB take 2 s.
WANTED = {
    "good": {"200"}, "bad json": {"400", "503"}, "bad field": {"400", "429", "503"},
    "too long a prompt": {"400", "429", "503"}, "too long a body": {"408", "413", "503"},
    "slow body": {"408", "503"}, "wrong path": {"404", "503"}, "garbage": {"400", "0", "503"},
    "leave at once": {"left"}, "leave in the middle": {"left"}, "do not read": {"left"},
    "no request": {"left"}, "half a head": {"closed"},
}  # fmt: skip


def metrics(address):
    """Sums of all samples, by name."""
    status, text = ask(address, "GET", "/metrics")
    assert status == 200
    found = collections.Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] += sample.value
    return found


def held(process):
    """Open files, threads, and resident MB of a process."""
    folder = Path(f"/proc/{process.pid}")
    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    return {"files": len(list((folder / "fd").iterdir())), "threads": int(status["Threads"]),
            "MB": int(status["VmRSS"].split()[0]) / 1000}  # fmt: skip


def settled(address, seconds=60):
    """The metrics once nothing runs."""
    ends = time.monotonic() + seconds
    while True:
        found = metrics(address)
        busy = {name: found[name] for name in (
            "bitjax_sequences_running", "bitjax_sequences_waiting", "bitjax_sequences_reserved",
            "bitjax_requests_live")}  # fmt: skip
        if not any(busy.values()):
            return found
        assert time.monotonic() < ends, f"still busy: {busy}"
        time.sleep(0.2)


async def crowd(address, count):
    """So many connections at once, each with a request; how often which status came back."""
    where = urlparse(address)
    raw = post("/v1/completions", {"prompt": "a", "max_tokens": 4, "temperature": 0})

    async def one():
        reader, writer = await asyncio.open_connection(where.hostname, where.port)
        writer.write(raw)
        said = await reader.read()
        writer.close()
        head, _, body = said.partition(b"\r\n\r\n")
        status = int(head.split()[1])
        json.loads(body)  # whole
        return status

    found = await asyncio.wait_for(asyncio.gather(*(one() for _ in range(count))), 120)
    return collections.Counter(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=32)
    parser.add_argument("--crowd", type=int, default=3000, help="connections at once")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.safetensors"
        model = tiny_model(vocab_size=272, num_layers=1, max_seq_len=CONTEXT)
        model.tokenizer = small_tokenizer()
        save_model(path, pack_model(model))
        process = subprocess.Popen(
            [sys.executable, "-m", "bitjax.cli", "serve", str(path), "--port", "0",
             "--sequences", "16", "--queue", "32", "--max-body", "1000000", "--idle-seconds", "2",
             "--send-seconds", "1", "--connections", "200"],
            stdout=subprocess.PIPE, stderr=(Path(folder) / "stderr").open("w"), text=True,
        )  # fmt: skip
        try:
            run(process, arguments, Path(folder) / "stderr")
        finally:
            process.kill()
            print((Path(folder) / "stderr").read_text()[-5000:])


def run(process, arguments, log):
    """Send everything, and look at what is left."""
    address = process.stdout.readline().split()[4].rstrip(";")
    soak = Soak(address, arguments.requests, arguments.seed)
    warm = min(500, arguments.requests // 4)
    began = time.monotonic()
    states = []
    with concurrent.futures.ThreadPoolExecutor(arguments.threads) as pool:
        for start in (0, warm, arguments.requests // 2):
            ends = {0: warm, warm: arguments.requests // 2}.get(start, arguments.requests)
            for done in pool.map(soak.run, range(start, ends)):
                assert done is None
            found = settled(address)
            states.append(held(process))
            print(f"{ends:,} requests, {time.monotonic() - began:.0f} s: {states[-1]}", flush=True)
    seconds = time.monotonic() - began
    statuses = asyncio.run(crowd(address, arguments.crowd))
    settled(address)
    print(f"{arguments.crowd:,} connections at once: {dict(statuses)}", flush=True)
    # Requests once more, alone, a sample of them.
    again = random.Random(1).sample(sorted(soak.kept), min(200, len(soak.kept)))
    for key in again:
        path, body = json.loads(key)
        status, said = ask(address, "POST", path, body | {"stream": False})
        assert status == 200
        assert texts_of(path, said, False) == soak.kept[key], key
    time.sleep(4)  # connections without requests are closed
    last = held(process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=90)
    error = log.read_text()
    for outcome, count in sorted(soak.counts.items()):
        print(f"{count:7,}  {outcome}")
    bad = {}
    for outcome, count in soak.counts.items():
        kind, _, end = outcome.partition(": ")
        if kind in WANTED and end not in WANTED[kind]:
            bad[outcome] = count
    total = sum(n for outcome, n in soak.counts.items() if ": " in outcome)
    result = {
        "requests": total, "seconds": round(seconds, 1), "wrong": bad, "exit": process.returncode,
        "stderr": error[-2000:], "after warming": states[0], "half": states[1], "end": last,
        "again alone": len(again), "pages used": found["bitjax_cache_pages_used"],
        "tokens": found["bitjax_generated_tokens_total"],
        "cancelled": found["bitjax_cancelled_total"],
    }  # fmt: skip
    print(json.dumps(result))
    assert total == arguments.requests
    assert not bad
    assert set(statuses) <= {200, 429, 503}
    assert statuses[200]
    assert (process.returncode, error) == (0, "")
    assert last["files"] <= states[0]["files"] + 2
    assert last["threads"] <= states[0]["threads"] + 1
    assert last["MB"] < states[1]["MB"] * 1.05 + 5


if __name__ == "__main__":
    socket.setdefaulttimeout(60)
    main()
