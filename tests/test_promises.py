"""The table of promises names tests that are there."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent


def test_every_promise_has_tests_that_exist():
    text = (TESTS / "README.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 30
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", row)
        assert named, row
        for path, name in named:
            tree = ast.parse((TESTS / path).read_text(encoding="utf-8"))
            assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (
                row
            )
