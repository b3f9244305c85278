import math

import pytest

from bitjax.scaling.sweep import Trial, best_rate, next_rates, read_sweeps, write_sweeps

GRID = (1e-3, 2e-3, 4e-3)


def found(law, extensions, grid=GRID):
    """The rates that were tried, until none is left to try."""
    tried = {}
    while rates := next_rates(tried, grid, extensions):
        tried |= {rate: law(rate) for rate in rates}
    return tried


def bowl(best):
    return lambda rate: math.log(rate / best) ** 2


def test_a_best_rate_inside_the_grid_needs_no_more():
    tried = found(bowl(2e-3), 3)
    assert sorted(tried) == list(GRID)
    assert best_rate(tried) == 2e-3


@pytest.mark.parametrize(("best", "wanted"), [(16e-3, 16e-3), (0.25e-3, 0.25e-3)])
def test_the_grid_grows_until_both_neighbours_are_worse(best, wanted):
    tried = found(bowl(best), 3)
    assert best_rate(tried) == pytest.approx(wanted)
    assert len(tried) == 6
    assert min(tried) < wanted < max(tried)


def test_extensions_are_limited():
    assert len(found(bowl(1.0), 2)) == 5
    assert best_rate(found(bowl(1.0), 2)) == pytest.approx(16e-3)
    assert len(found(bowl(1.0), 0)) == 3


def test_divergence_is_an_infinite_loss():
    tried = found(lambda rate: math.inf if rate > 1.5e-3 else bowl(4e-3)(rate), 3)
    assert best_rate(tried) == pytest.approx(1e-3)
    assert sorted(tried) == [5e-4, 1e-3, 2e-3, 4e-3]


def test_when_all_diverge_lower_ones_are_tried_and_then_it_is_an_error():
    tried = found(lambda rate: math.inf if rate > 6e-4 else 1.0 - rate, 3)
    assert best_rate(tried) == 5e-4
    assert sorted(tried) == [2.5e-4, 5e-4, *GRID]
    assert best_rate({2e-3: 1.0, 1e-3: 1.0, 4e-3: 1.0}) == 1e-3  # of equal ones the lowest
    with pytest.raises(ValueError, match=r"every learning rate from 0.00025 to 0.004 diverged"):
        found(lambda rate: math.inf, 2)


def trials():
    return [
        Trial("64x2", "float", 1000, 1e-3, 2.5, 0.01, 3.0),
        Trial("64x2", "float", 1000, 2e-3, 2.25, 0.01, 3.0),
        Trial("64x2", "float", 1000, 4e-3, math.inf, 0.0, 0.0),
        Trial("64x2", "ternary", 1000, 1e-3, 2.75, 0.01, 3.0),
    ]


def test_sweeps_come_back_and_the_chosen_are_marked(tmp_path):
    path = tmp_path / "sweeps.csv"
    assert read_sweeps(path) == []
    write_sweeps(path, trials())
    assert read_sweeps(path) == trials()
    marked = [line.split(",")[-2] for line in path.read_text().splitlines()[1:]]
    assert marked == ["false", "true", "false", "true"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("2.25", "nan", "line 3: loss nan"),
        (",finished", "", "line 2: 8 fields instead of 9"),
        ("diverged", "lost", "line 4: status 'lost'"),
        ("size", "shape", "line 1: its columns are not size, arm"),
        ("1000,0.002", "many,0.002", "line 3: invalid literal"),
    ],
)
def test_damaged_sweeps(tmp_path, old, new, message):
    path = tmp_path / "sweeps.csv"
    write_sweeps(path, trials())
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        read_sweeps(path)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "sweeps.csv").write_bytes(b"size\xff\n")
    with pytest.raises(ValueError, match=r"sweeps.csv is not UTF-8 text"):
        read_sweeps(tmp_path / "sweeps.csv")
