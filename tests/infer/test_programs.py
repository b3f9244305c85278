"""Programs kept on disk: read when everything is the same, and never when anything is not."""

import functools
import hashlib
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from bitjax.infer import programs
from bitjax.infer.programs import Program

X = np.arange(6, dtype=np.float32)


def doubled(x):
    return 2 * x + 1


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where entries go; jax's own cache, which the other tests use, is off meanwhile."""
    monkeypatch.setenv("BITJAX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    was = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield tmp_path / "cache"
    jax.config.update("jax_compilation_cache_dir", was)
    compilation_cache.reset_cache()


def test_jaxs_own_cache_serves_instead_where_it_is_on(tmp_path, monkeypatch):
    monkeypatch.setenv("BITJAX_CACHE_DIR", str(tmp_path / "cache"))
    np.testing.assert_array_equal(Program(doubled)(X), 2 * X + 1)
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def no_compiler(monkeypatch):
    """From when it is called, compiling is an error."""

    def start():
        def refuse(*_):
            raise AssertionError("compiled")

        monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)

    return start


def entries(folder):
    return sorted(folder.iterdir())


def test_another_process_would_not_compile(folder, no_compiler):
    np.testing.assert_array_equal(Program(doubled)(X), 2 * X + 1)
    assert len(entries(folder)) == 1
    no_compiler()
    again = Program(doubled)
    np.testing.assert_array_equal(again(X), 2 * X + 1)
    np.testing.assert_array_equal(again(X + 3), 2 * X + 7)
    assert len(again) == 1


def test_a_program_of_other_arguments_is_another(folder):
    program = Program(doubled)
    for x in (X, X[:5], X.astype(np.int32), X):
        np.testing.assert_array_equal(program(x), 2 * x + 1)
    assert len(program) == len(entries(folder)) == 3


def test_arguments_that_are_not_used_are_part_of_the_program(folder):
    for unused in (jnp.ones(3), jnp.ones((4, 5)), jnp.ones(3, jnp.int32)):
        assert Program(lambda unused, x: x + 1)(unused, jnp.float32(2)) == 3
    assert len(list(folder.iterdir())) == 3


def test_static_arguments_are_part_of_the_program(folder, no_compiler):
    def make():
        return Program(lambda n, x: x * n, static=1)

    assert [float(make()(n, X)[1]) for n in (2, 3)] == [2, 3]
    no_compiler()
    assert [float(make()(n, X)[1]) for n in (3, 2)] == [3, 2]


def test_constants_are_part_of_the_program(folder):
    """Programs that differ only far inside a large constant."""
    for value in (1.0, 2.0):
        table = np.zeros(10_000, np.float32)
        table[5000] = value
        got = Program(lambda x, table=table: x[0] + jnp.asarray(table))(X)
        assert float(got[5000]) == value
    assert len(entries(folder)) == 2


def test_donated_memory_is_reused_by_a_program_that_was_read(folder, no_compiler):
    for read in (False, True):
        if read:
            no_compiler()
        x = jax.device_put(jnp.zeros(4096) + 1.0)
        address = x.unsafe_buffer_pointer()
        y = Program(lambda x: x + 1, donate=0)(x)
        assert x.is_deleted()
        assert y.unsafe_buffer_pointer() == address


def test_shapes_compile_and_run_nothing(folder, no_compiler):
    program = Program(doubled)
    shape = program.shapes(jax.ShapeDtypeStruct((6,), jnp.float32))
    assert (shape.shape, shape.dtype) == ((6,), jnp.float32)
    no_compiler()
    np.testing.assert_array_equal(program(X), 2 * X + 1)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "more", "text", "renamed", "valid"])
def test_a_damaged_or_foreign_entry_is_compiled_anew(folder, damage, monkeypatch):
    Program(doubled)(X)
    (entry,) = entries(folder)
    good = entry.read_bytes()
    Program(lambda x: 3 * x)(X)
    (other,) = set(entries(folder)) - {entry}
    foreign = b"no pickle at all"
    bad = {
        "flip": [good[:i] + bytes([good[i] ^ 16]) + good[i + 1 :] for i in range(0, len(good), 97)],
        "cut": [good[:n] for n in (1, 31, 32, 33, len(good) // 2, len(good) - 1)],
        "empty": [b""],
        "more": [good + b"\0"],
        "text": [b"hello" * 100],
        "renamed": [other.read_bytes()],
        "valid": [hashlib.sha256(entry.name.encode() + foreign).digest() + foreign],
    }[damage]
    compiled = []
    compile_ = jax.stages.Lowered.compile
    monkeypatch.setattr(
        jax.stages.Lowered, "compile", lambda self: compiled.append(1) or compile_(self)
    )
    for content in bad:
        entry.write_bytes(content)
        np.testing.assert_array_equal(Program(doubled)(X), 2 * X + 1)
        np.testing.assert_array_equal(Program(doubled)(X), 2 * X + 1)  # it has been replaced
    assert len(compiled) == len(bad)


@pytest.mark.parametrize(
    ("name", "value"), [("__version__", "0.9.9"), ("devices", lambda: ["another"])]
)
def test_another_jax_or_device_reads_nothing(folder, monkeypatch, name, value):
    Program(doubled)(X)
    before = programs._surroundings()
    monkeypatch.setattr(jax, name, value)
    assert programs._surroundings() != before
    Program(doubled)(X)
    assert len(entries(folder)) == 2


def test_another_processor_flags_or_settings_read_nothing(folder, monkeypatch):
    Program(doubled)(X)
    monkeypatch.setattr(programs, "_processor", lambda: "flags: avx2")
    Program(doubled)(X)
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    Program(doubled)(X)
    assert len(entries(folder)) == 3
    was = jax.config.jax_numpy_dtype_promotion
    try:
        jax.config.update("jax_numpy_dtype_promotion", "strict")  # the lowered program is the same
        Program(doubled)(X)
    finally:
        jax.config.update("jax_numpy_dtype_promotion", was)
    assert len(entries(folder)) == 4


def test_the_processors_features_are_in_the_key():
    if not os.path.exists("/proc/cpuinfo"):
        pytest.skip("Linux tells them")
    assert len(programs._processor().split()) > 20


def test_a_directory_that_others_may_write_is_not_used(folder, no_compiler):
    Program(doubled)(X)
    folder.chmod(0o770)
    Program(lambda x: 3 * x)(X)
    assert len(entries(folder)) == 1
    no_compiler()
    with pytest.raises(AssertionError, match="compiled"):
        Program(doubled)(X)
    folder.chmod(0o700)
    Program(doubled)(X)


def test_a_directory_of_another_user_is_not_used(folder, monkeypatch):
    Program(doubled)(X)
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    Program(lambda x: 3 * x)(X)
    assert len(entries(folder)) == 1


def test_no_place_is_no_error(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below", "/dev/null/x", "/proc/x"):
        monkeypatch.setenv("BITJAX_CACHE_DIR", str(place))
        np.testing.assert_array_equal(Program(doubled)(X), 2 * X + 1)


def test_a_full_disk_is_no_error_and_leaves_nothing(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    np.testing.assert_array_equal(Program(doubled)(X), 2 * X + 1)
    assert entries(folder) == []


def test_switched_off(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("BITJAX_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert programs.directory() is None
    Program(doubled)(X)
    assert entries(tmp_path) == []


def test_places(folder, tmp_path, monkeypatch):
    monkeypatch.delenv("BITJAX_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert programs.directory() == tmp_path / "bitjax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert programs.directory() == tmp_path / ".cache" / "bitjax"
    Program(doubled)(X)
    made = tmp_path / ".cache" / "bitjax"
    assert made.stat().st_mode & 0o777 == 0o700


def test_the_oldest_are_deleted(folder, monkeypatch, no_compiler):
    monkeypatch.setattr(programs, "MAX_FILES", 2)

    def times(n):
        return Program(lambda x: x * n)(X)

    for age, n in enumerate((2, 3)):
        times(n)
        newest = max(entries(folder), key=lambda e: e.stat().st_mtime_ns)
        os.utime(newest, (1000 + age, 1000 + age))
    times(2)  # used again: now the younger
    times(5)
    assert len(entries(folder)) == 2
    no_compiler()
    times(2)
    times(5)
    with pytest.raises(AssertionError, match="compiled"):
        times(3)


def test_arguments_of_another_device_are_compiled_for_it(folder):
    second = jax.devices()[1]
    x = jax.device_put(X, second)
    for _ in range(2):
        assert Program(doubled)(x).devices() == {second}
    assert not folder.exists()


def test_generation_in_a_second_process_compiles_nothing(folder, tmp_path):
    code = functools.partial(
        """
import sys, jax
sys.path.insert(0, {tests!r})
from tiny import tiny_model
from bitjax.infer import Generator, SamplingParams, pack_model
generator = Generator(pack_model(tiny_model()))
if {second}:
    def refuse(*_):
        raise AssertionError("compiled")
    jax.stages.Lowered.compile = refuse
prompts = ["ab", "ab", "a longer prompt"]
print([c.text for c in generator.generate(prompts, SamplingParams(max_new_tokens=5))])
""".format,
        tests=os.path.dirname(os.path.dirname(__file__)),
    )
    texts = [
        subprocess.run(
            [sys.executable, "-c", code(second=second)], check=True, capture_output=True
        ).stdout
        for second in (False, True)
    ]
    assert texts[0] == texts[1]
    assert len(texts[0]) > 20
