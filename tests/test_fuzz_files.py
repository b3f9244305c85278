"""A few hundred damaged files; `python tests/fuzz_files.py --cases N` runs as many as wanted."""

import random

import fuzz_mutations as damage
import pytest
from fuzz_files import FORMATS, damaged_copy, outcome, run_case, seed_files

CASES = 120  # of each format


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return seed_files(tmp_path_factory.mktemp("fuzz") / "seeds")


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_damaged_is_valid(sources, kind):
    for path in sources[kind]:
        assert outcome(path) == "read", path


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_files_are_read_or_refused(sources, kind, tmp_path):
    found = {}
    for seed in range(FORMATS.index(kind), CASES * len(FORMATS), len(FORMATS)):
        found[seed] = run_case(sources, seed, tmp_path)
    failures = {seed: what for seed, what in found.items() if what.startswith("FAILURE")}
    assert not failures, next(iter(failures.items()))
    read = sum(what == "read" for what in found.values())
    assert 0 < read < CASES / 2
    assert len({what[-30:] for what in found.values()}) > CASES / 6  # reasons of many kinds


def test_a_seed_is_the_same_case_again(sources, tmp_path):
    def content(folder, seed):
        path = damaged_copy(sources, seed, folder)
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        return [file.read_bytes() for file in files]

    for seed in range(30):
        again = [content(tmp_path, seed) for _ in range(2)]
        assert again[0] == again[1], seed


def test_damage_is_damage():
    raw = bytes(range(256)) * 20
    text = b'{"a": {"b": [1, 2, "x"]}, "c": 3}'
    for mutate, valid in ((damage.damaged_bytes, raw), (damage.damaged_json, text)):
        changed = [mutate(random.Random(seed), valid) != valid for seed in range(200)]
        assert sum(changed) > 150


def test_a_failure_is_reported(sources, tmp_path, monkeypatch):
    import fuzz_files

    def broken(path):
        raise MemoryError

    monkeypatch.setattr(fuzz_files, "outcome", broken)
    assert run_case(sources, 0, tmp_path).startswith("FAILURE\nTraceback")
