"""Some mutated GGUF files; `python tests/gguf_fuzz.py 100000` runs as many as wanted."""

import pytest
from gguf_fuzz import mutated, outcome, seeds


@pytest.mark.parametrize("number", range(len(seeds())))
def test_mutated_files_are_read_or_refused(tmp_path, number):
    path = tmp_path / "mutated.gguf"
    whole = seeds()[number]
    path.write_bytes(whole)
    assert outcome(path) == "read"
    refused = 0
    for seed in range(60):
        path.write_bytes(mutated(whole, seed))
        refused += outcome(path) != "read"
    assert refused > 30
