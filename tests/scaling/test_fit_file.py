import dataclasses
import json
import math

import numpy as np
import pytest
import synthetic_runs as synthetic

from bitjax.scaling.fit_file import read_fit, write_fit
from bitjax.scaling.study import fit_runs


@pytest.fixture(scope="module")
def fit():
    runs = synthetic.runs(0.004, tokenizer="bytes", loss_se=[math.nan, *([0.01] * 23)])
    return fit_runs(runs, ["eta", "precision"], resamples=5)[0]


def test_a_file_holds_the_fit(fit, tmp_path):
    write_fit(tmp_path / "fit.json", fit)
    again = read_fit(tmp_path / "fit.json")
    for field in dataclasses.fields(fit.runs):
        ours, theirs = getattr(fit.runs, field.name), getattr(again.runs, field.name)
        np.testing.assert_array_equal(ours, theirs, err_msg=field.name)
        assert ours.dtype.kind == theirs.dtype.kind
    for ours, theirs in zip(fit.ensemble.members, again.ensemble.members, strict=True):
        assert ours.law == theirs.law
        np.testing.assert_array_equal(ours.theta, theirs.theta)
        np.testing.assert_allclose(ours.draws, theirs.draws, rtol=1e-7)
        assert (ours.weight, ours.noise, ours.aicc) == (theirs.weight, theirs.noise, theirs.aicc)
    assert (again.delta, again.resampling) == (1e-3, fit.resampling)
    assert [p.name for p in tmp_path.iterdir()] == ["fit.json"]


DAMAGES = [
    (lambda d: d.update(format="x"), "'x' of version 1"),
    (lambda d: d.pop("runs"), "lacks 'runs'"),
    (lambda d: d["runs"]["N"].pop(), "columns of runs differ in length"),
    (lambda d: d.update(laws=[]), "no laws"),
    (lambda d: d["laws"][0].update(form="lots"), "no law 'lots'"),
    (lambda d: d["laws"][0]["theta"].pop(), "law wants 6 parameters"),
    (lambda d: d["laws"][0].update(draws=[]), "law wants 6 parameters"),
    (lambda d: d["laws"][0]["draws"][0].__setitem__(0, None), "are no finite numbers"),
    (lambda d: d["laws"][0].update(weight="x"), "could not convert"),
    (lambda d: d["laws"][0].update(weight=None), "the eta law has weight nan, not a share"),
    (lambda d: d["laws"][0].update(weight=-0.5), "the eta law has weight -0.5, not a share"),
    (lambda d: d["laws"][0].update(noise=None), "the eta law has noise nan"),
    (lambda d: d["runs"]["N"].__setitem__(0, "x"), "could not convert"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damaged_files(fit, tmp_path, damage, message):
    path = tmp_path / "fit.json"
    write_fit(path, fit)
    document = json.loads(path.read_text())
    document["laws"] = [law for law in document["laws"] if law["form"] == "eta"]
    damage(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=rf"fit.json is no fit of `bitjax scale fit`: .*{message}"):
        read_fit(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "1", '{"format": []}', "\xff"])
def test_files_that_are_none(tmp_path, text):
    (tmp_path / "fit.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match="is no fit of"):
        read_fit(tmp_path / "fit.json")
