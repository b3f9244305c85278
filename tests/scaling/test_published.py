import math

import numpy as np
import pytest
import synthetic_runs as synthetic
from synthetic_runs import ARMS

from bitjax.scaling.ensemble import Ensemble, Member
from bitjax.scaling.laws import GAMMA_A, GAMMA_W, Law
from bitjax.scaling.published import confront, curve, points, published


def test_pairs_of_the_paper():
    of = [p for p in points() if p.source == "BitNet b1.58"]
    assert [p.name for p in of] == ["700M", "1.3B", "3B"]  # 3.9B has no twin
    for p, (full, ternary) in zip(of, [(12.33, 12.87), (11.25, 11.29), (10.04, 9.91)], strict=True):
        assert p.relative == pytest.approx(math.log(math.log(ternary) / math.log(full)))
        assert p.D == 100e9
    assert len(published()["pairs"][0]["rows"]) == 4
    assert of[0].N == 24 * (4 * 1536**2 + 3 * 1536 * 4096)


def test_curves_say_what_their_authors_say():
    """Spectra: within 7 % of full precision at 15.6B parameters, within 6 % at 330B."""
    (spectra,) = published()["fits"]
    for N, percent in ((15.6e9, 7), (330e9, 6)):
        ratio = curve(spectra["ternary"], N) / curve(spectra["float"], N)
        assert round(100 * (ratio - 1)) == percent
    for p in points():
        if not math.isnan(p.parameters):
            assert curve(spectra["ternary"], p.parameters * p.N) == pytest.approx(
                curve(spectra["float"], p.N)
            )


def test_precision_law_is_quoted_as_it_is_used():
    says = published()["others"][0]["says"]
    assert f"gamma_w {GAMMA_W}, gamma_a {GAMMA_A}" in says


def test_a_law_is_held_against_them():
    """A law that has the paper's gap at 700M: it agrees there, and not with Spectra's curve."""
    first = points()[0]
    theta = synthetic.TRUTH.copy()
    law = Law("eta-e", ARMS)
    base = law.loss([*theta[:5], 0, 0], [first.N], [first.D], "float")[0, 0]
    shift = math.log1p(base * math.expm1(first.relative) / synthetic.E)
    best = [*theta[:5], 0.0, shift]
    draws = [[*theta[:5], 0.0, shift + d] for d in (-1e-3, 0, 1e-3)]
    member = Member(law, np.array(best), np.array(draws), 1.0, 0.0)
    found = confront(Ensemble((member,)))
    assert len(found) == len(points())
    assert found[0].agrees
    assert found[0].relative.best == pytest.approx(first.relative, rel=1e-9)
    assert not any(c.agrees for c in found if c.point.source.startswith("Spectra"))
