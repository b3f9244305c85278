import json

import numpy as np
import pytest

from bitjax import cli
from bitjax.plots import known, plot_losses, plot_quantity, series, smoothed


def test_plot_of_losses_is_a_png_even_of_a_short_run(tmp_path):
    records = [{"step": 1, "loss": 3.0, "valid_loss": 3.1}]
    plot_losses(tmp_path / "loss.png", dict.fromkeys("abcdef", records))
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("weight", [0.0, 0.5, 0.97])
def test_smoothing_is_the_weighted_mean_of_the_past(weight):
    x = np.random.default_rng(0).standard_normal(20) + 5
    for t, found in enumerate(smoothed(list(x), weight)):
        weights = weight ** np.arange(t, -1, -1.0)
        assert found == pytest.approx((weights * x[: t + 1]).sum() / weights.sum(), rel=1e-12)


def test_smoothing_goes_around_nan():
    found = smoothed([1.0, float("nan"), 3.0], 0.5)
    assert found[0] == 1
    assert np.isnan(found[1])
    assert found[2] == pytest.approx((0.5 * 1 + 3) / 1.5)


RECORDS = [
    {"step": 1, "loss": 3.0, "layers": {"blocks.0.ffn.down": {"flips": 0.25}}},
    {"step": 2, "loss": 2.0, "valid_loss": 2.5, "layers": {"blocks.0.ffn.down": {"flips": 0.5}}},
]


def test_series_of_a_run_and_of_a_layer():
    assert series(RECORDS, "loss") == ([1, 2], [3.0, 2.0])
    assert series(RECORDS, "valid_loss") == ([2], [2.5])
    assert series(RECORDS, "flips/blocks.0.ffn.down") == ([1, 2], [0.25, 0.5])
    assert series(RECORDS, "flips/blocks.1.ffn.down") == ([], [])
    assert known(RECORDS) == ["loss", "valid_loss", "flips/LAYER"]


@pytest.fixture
def runs(tmp_path):
    for name, factor in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        lines = [json.dumps(r | {"loss": factor * r["loss"]}) for r in RECORDS]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines))
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def test_command_draws_every_run(runs, tmp_path, monkeypatch):
    drawn = []
    from matplotlib.axes import Axes

    plot = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda self, *a, **k: drawn.append((a, k)) or plot(self, *a, **k)
    )
    out = tmp_path / "x.png"
    assert cli.main(["plot", *runs, "-o", str(out), "--smooth", "0.5"]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    curves = {k["label"]: a for a, k in drawn if "label" in k}
    assert list(curves) == runs
    assert curves[runs[1]][:2] == ([1, 2], [6.0, pytest.approx((0.5 * 6 + 4) / 1.5)])
    assert [a[1] for a, k in drawn if "label" not in k] == [[3.0, 2.0], [6.0, 4.0]]


def test_errors(runs, tmp_path, capsys):
    out = str(tmp_path / "x.png")
    for arguments, message in (
        (["plot", str(tmp_path), "-o", out], "is no run with reports"),
        (["plot", *runs, "-o", out, "--of", "lots"],
         "has no 'lots'; it has loss, valid_loss, flips/LAYER"),
        (["plot", *runs, "-o", out, "--smooth", "1"], "must be 0 or more and below 1"),
        (["plot", *runs, "-o", str(tmp_path / "no" / "x.png")], "cannot write"),
    ):  # fmt: skip
        assert cli.main(arguments) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    with pytest.raises(ValueError, match=r"not supported|no format|Format"):
        plot_quantity(tmp_path / "x.unknown", {"a": RECORDS})
