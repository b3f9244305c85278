import inspect
import json
import re

import pytest
import studies
from studies import BASE, Pretended, text_file

from bitjax.cli import main
from bitjax.config import StudyConfig
from bitjax.recipe import read_study
from bitjax.scaling import planning
from bitjax.scaling import run as running
from bitjax.scaling.arms import configuration
from bitjax.scaling.calibrate import Calibration, measure
from bitjax.scaling.plan import read_plan
from bitjax.scaling.table import read_table

RECIPE = (
    inspect.getsource(studies).split("def text_file")[0]
    + """

def get_config():
    return BASE
"""
)
STUDY = """

def get_study():
    return StudyConfig((Group(("16x1",), (1, 2)), Group(("32x2",), (1,), ("binary",))))
"""


@pytest.fixture
def pretended(monkeypatch):
    made = Pretended()
    monkeypatch.setattr(planning, "start", made)
    monkeypatch.setattr(running, "start", made)
    monkeypatch.setattr(running, "POLL", 0.0)
    return made


@pytest.fixture
def plan(tmp_path, pretended, capsys):
    """Runs `bitjax scale plan` and returns the exit code, the plan, and what was printed."""
    recipe, path, data = tmp_path / "recipe.py", tmp_path / "plan.json", text_file(tmp_path)
    recipe.write_text(RECIPE)

    def planned(*words):
        command = ["scale", "plan", str(recipe), "-o", str(path), "--data", data, *words]
        code = main(command)
        return code, read_plan(path) if code == 0 else None, capsys.readouterr()

    planned.recipe, planned.path, planned.data = recipe, path, data
    return planned


def test_a_plan_is_shown_before_anything_runs(plan, pretended):
    sizes = ["--sizes", "16x1", "32x1", "--ratios", "1", "4", "--arms", "ternary", "ptq_int4"]
    code, made, said = plan(*sizes, "--seeds", "2")
    assert code == 0
    assert len(made.runs) == 2 * 2 * 2 * 3
    row = next(line for line in said.out.splitlines() if line.count("4,096") == 2)
    assert re.sub(r"[│ ]+", " ", row).startswith(
        " 16x1 4,096 4,096 1 6 2 ternary, 2 float, 2 ptq_int4 "
    )
    assert "learning rates: 4 sweeps of 4 runs" in said.out
    assert "2 sizes: a law of N and D needs 4 or more" in said.err
    assert [t["kind"] for job in pretended.jobs for t in job] == 4 * ["calibrate"]
    # Startup of 1.5 s with imports, 1,000 tokens/s trained and 10,000 scored: as measured.
    of_small = next(r for r in made.runs if r.run == "16x1-4096-s0-ternary")
    assert of_small.seconds == pytest.approx(1.5 + 4.096 + 0.0222, abs=0.01)


def test_measured_rates_are_kept(plan, pretended):
    plan("--sizes", "16x1", "--ratios", "1")
    code, _, said = plan("--sizes", "16x1", "--ratios", "1")
    assert code == 1
    assert "plan.json exists; choose another name or give --overwrite" in said.err
    measured = len(pretended.jobs)
    code, made, _ = plan("--sizes", "16x1", "--ratios", "2", "--overwrite")
    assert (code, len(pretended.jobs)) == (0, measured)
    assert {run.tokens for run in made.runs} == {8192}


def test_budgets(plan):
    sizes = ["--sizes", "16x1", "32x1", "--ratios", "1", "2", "4", "--overwrite"]
    _, everything, _ = plan(*sizes)
    _, part, _ = plan(*sizes, "--hours", "0.15")
    assert 0 < len(part.runs) < len(everything.runs)
    assert part.seconds <= 540
    _, bought, _ = plan(*sizes, "--dollars", "0.3", "--price", "2")
    assert bought.runs == part.runs
    _, few, _ = plan(*sizes, "--flops", str(part.flops * 1.001))
    assert few.flops <= part.flops * 1.001
    code, level, _ = plan(*sizes, "--hours", "0.2", "--design", "isoflop")
    assert code == 0
    assert 0.5 * 720 < level.seconds <= 720
    _, crossed, _ = plan(*sizes, "--design", "factorial")
    counts = [{r.tokens for r in crossed.runs if r.size == size} for size in ("16x1", "32x1")]
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--hours", "0.001"),
            "the budget of 0.001 h fits no run: the cheapest cell, 16x1 with 4,0",
        ),
        (("--hours", "-1"), "--hours -1.0 is not above 0"),
        (("--hours", "nan"), "--hours nan is not above 0"),
        (("--dollars", "1"), "--dollars and --price go together"),
        (("--design", "isoflop"), "the isoflop design spends a budget; give --hours, --flops or"),
        (("--sizes", "16"), "size '16' is not HIDDENxLAYERS, e.g. 128x4"),
        (("--sizes", "20x1"), "size 20x1: a hidden size of 20 is not a multiple of the recipe's"),
        (("--arms", "int2"), "no arm 'int2'; there are ternary, float"),
        (("--jobs", "999"), "--jobs 999: there are"),
    ],
)
def test_errors_are_one_sentence(plan, words, message):
    code, _, said = plan("--sizes", "16x1", "--ratios", "1", *words)
    assert code == 1
    assert said.err.startswith(f"bitjax: {message}")
    assert said.err.count("\n") == 1
    assert not plan.path.exists()


def test_a_recipe_may_have_a_study(plan, tmp_path):
    plan.recipe.write_text(RECIPE + STUDY)
    _, made, _ = plan()
    assert [(r.size, r.arm) for r in made.runs] == [
        ("16x1", "ternary"), ("16x1", "float"), ("16x1", "ternary"), ("16x1", "float"),
        ("32x2", "binary"),
    ]  # fmt: skip
    plan.recipe.write_text("def get_study():\n    return 1\n")
    with pytest.raises(ValueError, match="get_study\\(\\) that returns no"):
        read_study(plan.recipe)


def test_sizes_far_beyond_a_budget_are_not_measured(plan, pretended):
    plan.recipe.write_text(RECIPE + STUDY.replace("32x2", "256x8"))
    code, made, _ = plan("--hours", "0.5")
    assert code == 0
    assert {run.size for run in made.runs} == {"16x1"}
    measured = {t["config"]["model"]["hidden_size"] for job in pretended.jobs for t in job}
    assert measured == {16}


def test_run_does_the_plan_and_says_where_the_table_is(plan, tmp_path, capsys):
    plan("--sizes", "16x1", "--ratios", "1", "--rates", "2e-3", "4e-3", "8e-3")
    out = tmp_path / "out"
    command = ["scale", "run", str(plan.path), "--data", plan.data, "-o", str(out)]
    assert main(command) == 0
    said = capsys.readouterr()
    assert "[2 of 2] 16x1-4096-s0-float: loss 2.0000 ± 0.0100, learning rate 0.004, 2 s" in said.out
    assert said.out.endswith(f"table: {out / 'table.csv'}\n")
    assert len(read_table(out / "table.csv")) == 2
    held = json.loads(plan.path.read_text())
    held["recipe"]["train"]["batch_size"] = 4
    plan.path.write_text(json.dumps(held))
    assert main(command) == 1
    assert "other settings than the plan has (train.batch_size)" in capsys.readouterr().err


def test_measured_numbers_are_positive_and_checked():
    # The configuration of test_run_plan's run that is killed: compiled once for both.
    made = measure(configuration(BASE, StudyConfig(), "float", "16x1", 20, 0, 4e-3))
    assert made["startup"] > 0
    found = Calibration("16x1", "ternary", 1, **made)
    assert found.seconds(1000, 100) > found.seconds(500, 100) > found.startup
    with pytest.raises(ValueError, match=r"16x1, ternary has tokens_per_second=nan"):
        Calibration("16x1", "ternary", 1, **made | {"tokens_per_second": float("nan")})
