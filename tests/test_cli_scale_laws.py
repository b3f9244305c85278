"""The commands that make laws of runs: what they print, write, and say of what cannot be."""

import csv

import numpy as np
import pytest
import synthetic_runs as synthetic

from bitjax.cli import main
from bitjax.scaling.fit_file import read_fit

COLUMNS = ("N", "D", "loss", "arm", "seed", "ended", "tokenizer", "validation")


def write(path, runs, **changes):
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for i in range(len(runs)):
            row = {name: getattr(runs, name)[i] for name in COLUMNS} | changes.get(str(i), {})
            table.writerow(row.values())
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A table, and the fit that the command made of it."""
    made = tmp_path_factory.mktemp("scale")
    runs = synthetic.runs(0.003, sizes=1e5 * 2.0 ** np.arange(5), ratios=(20, 80, 320))
    write(made / "runs.csv", runs)
    command = ["scale", "fit", str(made / "runs.csv"), "-o", str(made / "fit.json")]
    assert main([*command, "--resamples", "40", "--law", "eta", "separate"]) == 0
    return made


def test_fit(folder, capsys):
    arguments = ["--law", "eta", "--resamples", "20", "--profile", "--isoflop"]
    assert main(["scale", "fit", str(folder / "runs.csv"), *arguments]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert "30 runs, 15 cells of N and D, 5 sizes" in said.out
    (line,) = [x for x in said.out.splitlines() if "eta[ternary]" in x]
    assert abs(float(line.split("│")[2]) - synthetic.ETA) < 0.03
    low, high = (float(x) for x in line.split("│")[5].split(".. "))
    assert low < synthetic.ETA < high
    assert "parabolas at equal compute" in said.out


def test_fit_file(folder):
    fit = read_fit(folder / "fit.json")
    assert len(fit.runs) == 30
    assert {m.law.form for m in fit.ensemble.members} == {"eta", "separate"}
    assert fit.ensemble.members[0].law.form == "eta"
    assert fit.ensemble.members[0].draws.shape == (40, 6)


def test_predict(folder, capsys):
    arguments = ["--sizes", "1e9", "1e11", "--price", "2", "--throughput", "1e15", "--published"]
    assert main(["scale", "predict", str(folder / "fit.json"), *arguments]) == 0
    out = capsys.readouterr().out
    rows = [line.split("│")[1:-1] for line in out.splitlines() if line.startswith("│ 1e+11")]
    gaps, memory, cost = rows
    assert float(gaps[2].split()[0]) == pytest.approx(synthetic.plain(1e11, 2e12), rel=0.1)
    assert 1 < float(gaps[7].split("x")[0]) < 4
    assert 0.1 < float(memory[1].split("x")[0]) < 0.4
    assert float(cost[2]) == 2 * 6 * 1e11 * 2e12
    assert cost[3].strip() == f"{2 * 6 * 1e11 * 2e12 / 3.6e18:,.0f}"
    assert "BitNet b1.58, arXiv 2402.17764" in out
    assert "interval left" in out


def test_plot(folder, tmp_path, capsys):
    assert main(["scale", "plot", str(folder / "fit.json"), "-o", str(tmp_path / "a")]) == 0
    names = ("loss-parameters", "loss-tokens", "loss-compute", "gap", "equal-memory",
             "equal-energy")  # fmt: skip
    files = {f"{name}.{ending}" for name in names for ending in ("png", "svg")}
    assert {p.name for p in (tmp_path / "a").iterdir()} == files
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "a" / f"{name}.{ending}") for name in names for ending in ("png", "svg")
    ]
    for name in names:
        assert (tmp_path / "a" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        svg = (tmp_path / "a" / f"{name}.svg").read_text()
        assert "<svg" in svg
        assert "<dc:date>" not in svg
        # Black and white: whatever is painted has red = green = blue.
        colours = {c for c in svg.split("#")[1:] if c[6:7] in (";", '"')}
        assert all(c[:2] == c[2:4] == c[4:6] for c in colours)


def test_a_table_is_fitted_by_the_way(folder, tmp_path, capsys, monkeypatch):
    from bitjax.scaling import study

    monkeypatch.setattr(study, "RESAMPLES", 5)
    monkeypatch.setattr(study.fit_runs, "__defaults__", (None, None, 1e-3, 5, None, 0, 1))
    assert main(["scale", "predict", str(folder / "runs.csv"), "--sizes", "1e9"]) == 0
    assert "eta-e" in capsys.readouterr().out  # the default laws


def test_one_arm(folder, capsys):
    arguments = ["--arms", "float", "--resamples", "5"]
    assert main(["scale", "fit", str(folder / "runs.csv"), *arguments]) == 0
    out = capsys.readouterr().out
    assert "shared" in out
    assert "15 runs" in out


def test_errors(folder, tmp_path, capsys):
    runs = synthetic.runs()
    good, fit = str(write(tmp_path / "t.csv", runs)), str(folder / "fit.json")
    nan = str(write(tmp_path / "nan.csv", runs, **{"3": {"loss": "nan"}}))
    mixed = str(write(tmp_path / "mixed.csv", runs, **{"3": {"tokenizer": "bpe"}}))
    for arguments, message in (
        (["fit", nan], "run 4 of the table has loss nan; leave out runs that diverged"),
        (["fit", mixed], "the runs have 2 tokenizers ('', 'bpe')"),
        (["fit", mixed, "--where", "tokenizer=bpe"], "1 runs are too few for a law of 5 param"),
        (["fit", good, "--law", "lots"], "no law 'lots'; there are shared, eta"),
        (["fit", good, "--law", "precision", "--arms", "float", "x"], "no run has arm 'x'"),
        (["fit", good, "--delta", "0"], "--delta 0.0 must be above 0"),
        (["fit", good, "--resamples", "1"], "--resamples 1 must be 2 or more"),
        (["fit", good, "--drop-highest", "30"], "30 of 24 runs cannot be left out"),
        (["fit", str(tmp_path / "no.csv")], "no.csv: No such file"),
        (["fit", good, "--law", "eta", "--resamples", "2", "-o", str(tmp_path / "no" / "f")],
         "No such file"),
        (["predict", fit, "--arm", "binary"], "the fit has no arm 'binary'; it has float, tern"),
        (["predict", fit, "--arm", "float"], "arm 'float' is the reference"),
        (["predict", fit, "--sizes", "-1"], "sizes and tokens must be numbers above 0"),
        (["predict", fit, "--price", "0"], "dollars_per_hour=0.0 is not a number above 0"),
        (["predict", fit, "--budget", "1"], "a budget of 1 FLOPs pays for none"),
        (["plot", fit, "-o", str(tmp_path / "x"), "--ratio", "nan"], "--ratio nan is not"),
        (["plot", fit, "-o", good], "cannot write figures to"),
    ):  # fmt: skip
        assert main(["scale", *arguments]) == 1, arguments
        error = capsys.readouterr().err
        lines = [x for x in error.splitlines() if "warning" not in x]
        assert len(lines) == 1
        assert message in lines[0], arguments


@pytest.mark.filterwarnings("default")
def test_warnings_are_sentences(tmp_path, capsys):
    runs = synthetic.runs(sizes=[1e5, 1e6, 3e6], ended=False)
    path = write(tmp_path / "t.csv", runs)
    assert main(["scale", "fit", str(path), "--law", "eta", "--resamples", "5"]) == 0
    said = capsys.readouterr().err
    assert "bitjax: warning: 3 sizes: the exponent of N is hardly known" in said
    assert "18 of 18 runs are not at the end of their schedule" in said
    assert "resamples of these cells have one size" in said or "weights" not in said
