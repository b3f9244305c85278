"""Programs that would do harm, and that cannot."""

import os
import socket
import time

import pytest

from bitjax.evaluate import sandbox
from bitjax.evaluate.sandbox import Outcome, run_program


@pytest.fixture(autouse=True)
def _patience(monkeypatch):
    """A process may wait long for its turn where many tests run."""
    monkeypatch.setattr(sandbox, "_STARTING", 100)


def test_what_programs_may_do():
    program = """
import math, re, hashlib, collections, decimal, statistics, random, datetime, heapq, string
from typing import List
print('é' * 10)
assert hashlib.md5(b'a').hexdigest().startswith('0cc1')
assert re.findall('[a-z]+', 'ab1cd') == ['ab', 'cd']
assert sorted([3, 1, 2]) == [1, 2, 3]
assert decimal.Decimal('0.1') * 3 == decimal.Decimal('0.3')
random.shuffle([1, 2]); datetime.datetime.now(); statistics.stdev([1, 2, 3])
"""
    assert run_program(program) == Outcome(True)


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("def f(:", "SyntaxError"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("import os; os._exit(0)", "ended with 0 and said nothing"),
        ("import os; os.write(1, b'{\"token\": \"guess\"}'); os._exit(0)", "said nothing"),
        ("x = [0] * (1 << 40)", "MemoryError"),
        ("x = []\nwhile True: x.append(bytes(1 << 24))", "MemoryError"),
        ("import os; os.fork()", "PermissionError"),
        ("import subprocess; subprocess.run(['true'])", "Error"),
        ("import threading; threading.Thread(target=print).start()", "Error"),
        ("import _socket; _socket.socket()", "Error"),
        ("import os; os.kill(os.getpid(), 9)", "PermissionError"),
        ("import os; os.kill(1, 0)", "PermissionError"),
        ("import os; os.setsid()", "PermissionError"),
        ("import os; os.chmod('.', 0)", "PermissionError"),
        ("import os; os.listdir('/')", "PermissionError"),
        ("open('here', 'w')", "PermissionError"),
        ("import os\nwhile True: os.write(1, b'x' * 4096)", "said nothing"),
        ("import os\nwhile True: os.write(2, b'x' * 4096)", "computed for more than 1 s"),
        ("f = lambda: f()\nf()", "RecursionError"),
        ("class E(Exception):\n  def __str__(self): raise SystemExit\nraise E", "E"),
        ("'\ud800'", "not Unicode"),
    ],
)  # fmt: skip
def test_hostile_programs(program, said):
    outcome = run_program(program, 1)
    assert not outcome.passed
    assert said in outcome.said


def test_time_is_limited():
    started = time.monotonic()
    assert run_program("while True: pass", 1) == Outcome(False, "computed for more than 1 s")
    ignoring = "import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    assert not run_program(ignoring, 1).passed
    assert time.monotonic() - started < 90


def test_waiting_is_limited(monkeypatch):
    monkeypatch.setattr(sandbox, "_STARTING", 1)
    outcome = run_program("import time; time.sleep(60)", 1)
    assert outcome == Outcome(False, "ran for more than 2 s")


def test_files_outside(tmp_path):
    secret, new = tmp_path / "secret", tmp_path / "new"
    secret.write_text("s")
    for program in (
        f"open({str(secret)!r}).read()",
        f"open({str(secret)!r}, 'w')",
        f"open({str(new)!r}, 'w')",
        f"import os; os.unlink({str(secret)!r})",
        f"import os; os.rename({str(secret)!r}, {str(new)!r})",
        f"import os; os.truncate({str(secret)!r}, 0)",
        f"import os; os.mkdir({str(new)!r})",
        "open('/proc/self/environ').read()",
        f"open('/proc/{os.getpid()}/environ').read()",
    ):
        outcome = run_program(program)
        assert outcome.said.startswith("PermissionError"), program
    assert secret.read_text() == "s"
    assert not new.exists()


def test_the_environment_is_empty(monkeypatch):
    monkeypatch.setenv("BITJAX_SECRET", "x")
    assert run_program("import os; assert set(os.environ) <= {'LC_CTYPE'}, os.environ").passed


def test_no_network():
    """Also by system calls themselves, to a socket that listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        port = server.getsockname()[1]
        program = f"""
import _socket
s = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
s.connect(('127.0.0.1', {port}))
"""
        assert not run_program(program).passed
        with pytest.raises(TimeoutError):
            server.accept()
    denied = """
import ctypes  # which the sandbox has imported: no file is needed
libc = ctypes.CDLL(None, use_errno=True)
assert libc.socket(2, 1, 0) == -1
assert ctypes.get_errno() == 1, ctypes.get_errno()
"""
    assert run_program(denied) == Outcome(True)


def test_its_directory_is_its_own():
    assert run_program("import os; assert '/bitjax-' in os.getcwd(), os.getcwd()") == Outcome(True)


def test_a_system_without_filters(monkeypatch, tmp_path):
    source = sandbox._PROCESS.read_text().replace('"x86_64": (', '"none": (')
    source = source.replace('"aarch64": (', '"neither": (')
    (tmp_path / "p.py").write_text(source)
    monkeypatch.setattr(sandbox, "_PROCESS", tmp_path / "p.py")
    assert run_program("pass") == Outcome(False, "system calls cannot be filtered")
    with pytest.raises(ValueError, match=r"only where .* here: system calls cannot be filtered"):
        sandbox.require_sandbox()
