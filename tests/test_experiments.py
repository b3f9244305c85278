"""Scripts of experiments, whose runs take hours: what they call is there, and results come out."""

import ast
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "experiments"
SCRIPTS = sorted(FOLDER.glob("*/*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_scripts_take_from_bitjax_is_there(path):
    tree = ast.parse(path.read_text())
    modules = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != "bitjax":
            continue
        home = importlib.import_module(node.module)
        for name in node.names:
            if not hasattr(home, name.name):
                importlib.import_module(f"{node.module}.{name.name}")
            found = getattr(home, name.name)
            if isinstance(found, type(ast)):
                modules[name.asname or name.name] = found
    used = [
        (node.value.id, node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    ]
    assert [
        (of, name) for of, name in used if of in modules and not hasattr(modules[of], name)
    ] == []


def test_the_table_of_speeds_is_that_of_its_results():
    folder = FOLDER / "inference_limit"
    spec = importlib.util.spec_from_file_location("inference_limit", folder / "run.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # dataclasses look their module up
    spec.loader.exec_module(script)
    made = script.table(json.loads((folder / "results.json").read_text()))
    assert f"{script.START}\n{made}\n{script.END}" in (folder / "README.md").read_text()


def test_wikipedias_tables_after_the_first_arm(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("wikipedia", FOLDER / "wikipedia" / "run.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "HERE", tmp_path)
    shutil.copy(FOLDER / "wikipedia" / "README.md", tmp_path)
    run = tmp_path / "out" / "runs" / "ternary"
    run.mkdir(parents=True)
    lines = [{"step": s, "loss": 3.0 - s, "valid_loss": 3.5 - s} for s in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = {"bits_per_byte": 2.0, "error": 0.1, "bytes": 50, "words": 10}
    sweep = {"sweep": {"0.003": 2.5}, "rate": 0.003}
    scores = {
        "enwik8, last 5 MB": text, "WikiText-2": text,
        "BLiMP": {"accuracy": 0.5, "error": 0.01, "items": 9},
    }  # fmt: skip
    script.publish({"ternary": sweep | {"scores": scores}, "float": sweep}, tmp_path / "out")
    made = (tmp_path / "README.md").read_text()
    assert "| | ternary |\n" in made
    assert "| WikiText-2, perplexity per word | 1,024 ± 355 |\n" in made  # 2^(2 * 50 / 10)
    assert "| BLiMP | 0.500 ± 0.010 |\n" in made
    assert "| float | 0.003 | 2.5000 |\n" in made
    assert (tmp_path / "loss.png").exists()
