"""Scripts of experiments, whose runs take hours: what they call is there, and results come out."""

import ast
import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path

import pytest

from bitjax.scaling.table import Row

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


def script_of(folder, name):
    """A script as a module; its name is the folder's and its own."""
    spec = importlib.util.spec_from_file_location(
        f"{folder}_{name}", FOLDER / folder / f"{name}.py"
    )
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # dataclasses look their module up
    spec.loader.exec_module(script)
    return script


def test_the_table_of_speeds_is_that_of_its_results():
    folder = FOLDER / "inference_limit"
    script = script_of("inference_limit", "run")
    made = script.table(json.loads((folder / "results.json").read_text()))
    assert f"{script.START}\n{made}\n{script.END}" in (folder / "README.md").read_text()


def test_wikipedias_tables_after_the_first_arm(tmp_path, monkeypatch):
    script = script_of("wikipedia", "run")
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


def run_row(arm, N, D, loss, seed=0):
    return Row(
        f"{N}-{D}-{arm}-{seed}", arm, 64, 2, N, 1, D, 1.0, seed, 0.1, loss, 0.0, 1.0, "bytes", "",
        "", True, "finished", 1.0, "", "{}", "",
    )  # fmt: skip


def test_parity_of_ternary_models_that_need_twice_the_parameters():
    parity = script_of("scaling", "parity")
    loss = {"float": lambda N, D: 1 + 2 * N**-0.1 + 3 * D**-0.2}
    loss["ternary"] = lambda N, D: loss["float"](N / 2, D)
    sizes, tokens = (100_000, 200_000, 400_000, 800_000), (10**6, 2 * 10**6, 4 * 10**6)
    rows = [run_row(arm, N, D, loss[arm](N, D)) for arm in loss for N in sizes for D in tokens]
    # 3 % off their twins' tokens, and between tokens that were run.
    rows.append(run_row("float", 100_000, 1_030_000, loss["float"](100_000, 10**6)))
    rows.append(run_row("float", 100_000, 3 * 10**6, loss["float"](100_000, 3 * 10**6)))
    off = 0.01  # nats by which ternary documents differ, one up and one down

    def documents(row):
        aside = off if row.arm == "ternary" else 0
        return [5, 5], [5 * (row.loss + aside), 5 * (row.loss - aside)]

    found = {(p.N, p.D): p for p in parity.parities(rows, documents)}
    sizes_found = {N for N, _ in found}
    assert {100_000, 200_000} <= sizes_found  # 400,000's equal is the last one run, or just beyond
    assert 800_000 not in sizes_found
    for (N, D), equal in found.items():
        assert equal.factor == pytest.approx(2, rel=0.05 if D == 3 * 10**6 else 1e-9)
        # By the slope below the equal size, or above it.
        errors = [
            off * math.log(2) / (loss["ternary"](n, D) - loss["ternary"](2 * n, D))
            for n in (N, 2 * N)
        ]
        assert errors[0] * 0.98 < equal.error < errors[1] * 1.02
        assert errors[1] < 1.2 * errors[0]
    one = found[100_000, 10**6]
    assert one.bytes_of == {"bf16": pytest.approx(0.2), "int4": pytest.approx(2 * 1.6 / 4.5)}
    # Of products of many inputs: two int8 additions for a float16 addition and product.
    assert 2 * 0.007 / 0.5 < one.joules < 0.06


def test_parity_says_nothing_outside_the_runs():
    parity = script_of("scaling", "parity")
    rows = [run_row("ternary", N, 10**6, 2 - N / 10**6) for N in (100_000, 200_000)]
    for loss, D, found in (
        (1.85, 10**6, 1),
        (1.95, 10**6, 0),
        (1.7, 10**6, 0),
        (1.85, 2 * 10**6, 0),
    ):
        float_run = run_row("float", 100_000, D, loss)
        made = parity.parities([*rows, float_run], lambda row: ([1, 1], [row.loss, row.loss]))
        assert len(made) == found
