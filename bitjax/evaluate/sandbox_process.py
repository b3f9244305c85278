"""Run one program that a model wrote, under limits: run as a script, by `sandbox.py`.

Standard input is JSON `{"program": text, "token": text, "seconds": n, "memory": bytes}`; standard
output JSON `{"token": text}` if the program ran to its end, or `{"error": what it did}`.

Before the program runs this process gives up nearly every system call (seccomp): what is left
computes, takes memory, tells the time, and reads and writes what is open, which is nothing but
standard input (read to its end), output (a file of limited size) and error (/dev/null). So there
are no files, no network, no other processes and no threads; what is denied fails as "not
permitted". Modules of the standard library that programs use are imported before.

Imports nothing of bitjax, to start fast.
"""

import contextlib
import ctypes
import importlib
import io
import json
import os
import platform
import resource
import sys

UNABLE = "system calls cannot be filtered"
OUTPUT = 1 << 16  # bytes that may be written
MODULES = (
    "abc array bisect calendar cmath collections.abc copy dataclasses datetime decimal difflib "
    "enum fractions functools hashlib heapq inspect itertools json keyword math numbers operator "
    "os random re statistics string struct sys textwrap time types typing unicodedata"
)
# read write close fstat lseek mmap mprotect munmap brk rt_sigaction rt_sigprocmask rt_sigreturn
# sched_yield mremap madvise nanosleep getpid exit getcwd getuid gettimeofday getrusage times
# sigaltstack gettid futex clock_gettime clock_getres clock_nanosleep exit_group getrandom
# restart_syscall: by the numbers of Linux's tables, beside the architecture's name for the filter
ALLOWED = {
    "x86_64": (0xC000003E, (
        0, 1, 3, 5, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 28, 35, 39, 60, 79, 102, 96, 98, 100, 131,
        186, 202, 228, 229, 230, 231, 318, 219,
    )),
    "aarch64": (0xC00000B7, (
        63, 64, 57, 80, 62, 222, 226, 215, 214, 134, 135, 139, 124, 216, 233, 101, 172, 93, 17, 174,
        169, 165, 153, 132, 178, 98, 113, 114, 115, 94, 278, 128,
    )),
}  # fmt: skip
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06  # instructions of BPF
_ALLOW, _NOT_PERMITTED, _KILL = 0x7FFF0000, 0x00050001, 0x80000000
_NO_NEW_PRIVILEGES, _SECCOMP, _FILTER = 38, 22, 2  # of prctl


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("yes", ctypes.c_uint8), ("no", ctypes.c_uint8),
                ("k", ctypes.c_uint32))  # fmt: skip


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("first", ctypes.POINTER(_Instruction)))


def main() -> None:
    """Read, limit, run, say."""
    task = json.loads(sys.stdin.buffer.read())
    for name in MODULES.split():
        importlib.import_module(name)
    sys.stdout = sys.stderr = io.StringIO()
    sys.stdin = io.StringIO()
    sys.argv = ["program"]
    say = os.write
    limit(task["seconds"], task["memory"])
    if not give_up_system_calls():
        say(1, json.dumps({"error": UNABLE}).encode())
        os._exit(0)
    try:
        exec(compile(task["program"], "program", "exec"), {"__name__": "__main__"})
        result = {"token": task["token"]}
    except BaseException as error:  # SystemExit too: a program that stops itself has not passed
        try:
            result = {"error": f"{type(error).__name__}: {error}"[:300]}
        except BaseException:
            result = {"error": type(error).__name__}
    say(1, json.dumps(result).encode())
    os._exit(0)


def limit(seconds: int, memory: int) -> None:
    """Bound time, memory and output."""
    for name, most in (
        ("RLIMIT_CPU", seconds),
        ("RLIMIT_AS", memory),
        ("RLIMIT_FSIZE", OUTPUT),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_NPROC", 0),
    ):
        with contextlib.suppress(ValueError):  # a lower one is there already
            resource.setrlimit(getattr(resource, name), (most, most))


def give_up_system_calls() -> bool:
    """Deny all but `ALLOWED`, for good; False where that cannot be done."""
    if platform.system() != "Linux" or platform.machine() not in ALLOWED:
        return False
    architecture, numbers = ALLOWED[platform.machine()]
    steps = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL),
             (_LOAD, 0, 0, 0)]  # fmt: skip
    for number in numbers:
        steps += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    steps.append((_RETURN, 0, 0, _NOT_PERMITTED))
    array = (_Instruction * len(steps))(*(_Instruction(*step) for step in steps))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    program = _Program(len(steps), ctypes.cast(array, ctypes.POINTER(_Instruction)))
    longs = [ctypes.c_ulong(0)] * 3
    if prctl(_NO_NEW_PRIVILEGES, ctypes.c_ulong(1), *longs):
        return False
    return not prctl(_SECCOMP, ctypes.c_ulong(_FILTER), ctypes.byref(program), *longs[:2])


if __name__ == "__main__":
    main()
