import dataclasses
import math

import numpy as np
import pytest
import synthetic_runs as synthetic

from bitjax.scaling.fit import fit_law
from bitjax.scaling.runs import (
    Runs,
    check_runs,
    condition_number,
    design_warnings,
    read_runs,
    without_highest,
)
from bitjax.scaling.table import Row, write_table


def table(path, rows, header="run,arm,N,D,loss,seed,ended,status,tokenizer,validation,loss_se"):
    path.write_text("\n".join([header, *rows]))
    return path


def test_columns(tmp_path):
    runs = read_runs(table(tmp_path / "t.csv", [
        "a,ternary,1e5,2000000,2.5,0,true,finished,bytes,v1,0.01",
        "b,float,100000,2e6,2.25,1,false,finished,bytes,v1,",
        "c,float,100000,2e6,2.0,1,true,running,bytes,v1,",
    ]))  # fmt: skip
    assert len(runs) == 2
    assert runs.N.tolist() == [1e5, 1e5]
    assert runs.loss.tolist() == [2.5, 2.25]
    assert runs.seed.tolist() == [0, 1]
    assert runs.ended.tolist() == [True, False]
    assert runs.arms == ("float", "ternary")
    assert runs.cells.tolist() == [0, 0]
    assert runs.loss_se[0] == 0.01
    assert math.isnan(runs.loss_se[1])
    assert runs.where("arm", "ternary").loss.tolist() == [2.5]
    assert runs.where("ended", "true").seed.tolist() == [0]


def test_tables_of_our_runs(tmp_path):
    """What `bitjax scale run` writes; its reader's errors are ours."""
    row = Row(
        run="64x2-2e6-s0-ternary", arm="ternary", hidden_size=64, num_layers=2, N=100_000,
        embedding_parameters=16_384, D=2_000_000, flops=1.5e12, seed=0, learning_rate=1e-3,
        loss=2.5, loss_se=0.01, bits_per_byte=3.6, tokenizer="bytes", data="d", validation="v",
        ended=True, status="finished", seconds=1.0, commit="c", config="{}", curve="",
    )  # fmt: skip
    rows = [row, dataclasses.replace(row, run="b", arm="float", ended=False, seed=3)]
    write_table(tmp_path / "t.csv", rows)
    runs = read_runs(tmp_path / "t.csv")
    assert (runs.N.dtype, runs.seed.dtype, runs.ended.dtype) == (float, int, bool)
    for name in ("N", "D", "loss", "arm", "seed", "ended", "tokenizer", "validation", "loss_se"):
        assert getattr(runs, name).tolist() == [getattr(r, name) for r in rows], name
    text = (tmp_path / "t.csv").read_text()
    (tmp_path / "t.csv").write_text(text.replace(",true,", ",perhaps,"))
    with pytest.raises(ValueError, match=r"line 2: ended='perhaps' is not true or false"):
        read_runs(tmp_path / "t.csv")


def test_points_of_chinchilla_are_known(tmp_path):
    path = tmp_path / "c.csv"
    path.write_text("x,Model Size,Training FLOP,loss\n1,1e9,1.2e20,3\n1,1e8,6e17,4\n")
    runs = read_runs(path)
    assert runs.D.tolist() == pytest.approx([2e10, 1e9])
    assert without_highest(runs, 1).N.tolist() == [1e9]


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        ("N,D", ["1,2"], "has no column 'loss'; a table of runs has N, D and loss"),
        ("N,D,loss", [], "has no finished runs"),
        ("N,D,loss", ["1,2,x"], "run 1: loss is 'x', not a number"),
        ("N,D,loss,seed", ["1,2,3,z"], "run 1: seed is 'z', not a number"),
        ("N,D,loss", ["1,2"], "run 1: loss is None, not a number"),
    ],
)
def test_tables_that_are_none(tmp_path, header, rows, message):
    with pytest.raises(ValueError, match=message):
        read_runs(table(tmp_path / "t.csv", rows, header))


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"N,D,loss\n\xff\xfe,1,2\n")
    with pytest.raises(ValueError, match=r"t\.csv is no table of runs"):
        read_runs(tmp_path / "t.csv")


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 0.0])
@pytest.mark.parametrize("column", ["N", "D", "loss"])
def test_numbers_that_no_law_has(column, value):
    runs = synthetic.runs()
    getattr(runs, column)[3] = value
    with pytest.raises(ValueError, match=f"run 4 of the table has {column} .*leave out runs that"):
        check_runs(runs, 6)


@pytest.mark.parametrize("column", ["tokenizer", "validation", "data"])
def test_losses_that_do_not_compare(column):
    runs = synthetic.runs(**{column: ["a"] * 23 + ["b"]})
    with pytest.raises(ValueError, match=rf"have 2 .*\('a', 'b'\).*--where {column}=VALUE"):
        fit_law(runs, "eta")
    assert len(runs.where(column, "a")) == 23
    with pytest.raises(ValueError, match=f"no run has {column} 'c'; there are a, b"):
        runs.where(column, "c")
    with pytest.raises(ValueError, match=r"runs are chosen by arm, .*; got 'loss'"):
        runs.where("loss", "1")


def test_too_few():
    runs = synthetic.runs()
    with pytest.raises(ValueError, match="24 runs are too few for a law of 24 parameters"):
        check_runs(runs, 24)
    with pytest.raises(ValueError, match="arm 'float' has 1 sizes and 3 token counts"):
        check_runs(synthetic.runs(sizes=[1e5], seeds=4), 5)
    with pytest.raises(ValueError, match="24 of 24 runs cannot be left out"):
        without_highest(runs, 24)


def warnings_of(runs):
    return design_warnings(runs, fit_law(runs, "eta").jacobian)


def test_a_good_design_is_not_warned_of():
    assert warnings_of(synthetic.runs(sizes=np.geomspace(1e5, 6e6, 6))) == []


def test_collinear_designs():
    """The same tokens per parameter everywhere."""
    said = warnings_of(synthetic.runs(sizes=np.geomspace(1e5, 6e6, 6), ratios=(20,)))
    assert any("collinear (correlation 1.000" in s for s in said)
    assert any("condition number" in s for s in said)


def test_few_sizes_and_early_runs():
    ended = np.ones(18, bool)
    ended[:4] = False
    said = warnings_of(synthetic.runs(sizes=[1e5, 1e6, 1e7], ended=ended))
    assert any(s.startswith("3 sizes: the exponent of N is hardly known") for s in said)
    assert any("4 of 18 runs are not at the end of their schedule" in s for s in said)


def test_exponents_of_the_wrong_sign():
    J = np.random.default_rng(0).standard_normal((24, 3))
    (said,) = design_warnings(synthetic.runs(), J, {"alpha": -0.1, "beta": 0.2})
    assert said == "alpha is -0.1: by this fit more parameters or tokens make no loss better"


def test_condition_number_has_no_units():
    J = np.random.default_rng(0).standard_normal((20, 3))
    assert condition_number(J * [1, 1e6, 1e-6]) == pytest.approx(condition_number(J))
    assert condition_number(J[:, [0, 0]]) > 1e10
    assert condition_number(np.zeros((4, 2))) == math.inf


def test_runs_of_scalars():
    runs = Runs.of([1e5, 2e5], 1e6, [2, 3])
    assert runs.D.tolist() == [1e6, 1e6]
    assert runs.loss.dtype == float
