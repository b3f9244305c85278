import dataclasses
import json
import math
import statistics

import jax
import numpy as np
import pytest
from studies import BASE, plan_of, rates, text_file

from bitjax.config import Group, StudyConfig
from bitjax.scaling.arms import ARMS, configuration, embedding, non_embedding, shape
from bitjax.scaling.plan import (
    Budget,
    Planner,
    cells_of,
    factorial,
    hours,
    isoflop,
    read_plan,
    to_json,
)
from bitjax.scaling.planning import remarks
from bitjax.scaling.runs import collinearity
from bitjax.train import Trainer
from bitjax.train.flops import flops_per_token

STUDY = StudyConfig(sweep_ratio=1, sweep_tokens=320)
PLANNER = Planner(BASE, STUDY, 200, rates)
SIZES = ("16x1", "16x2", "32x2")


def n_of(size):
    return non_embedding(shape(BASE.model, size))


def test_parameters_are_those_of_the_model():
    """Counted in the arrays: all but embedding and norms."""
    for tied in (True, False):
        model = dataclasses.replace(shape(BASE.model, "24x2"), tie_embeddings=tied)
        state = jax.eval_shape(Trainer(dataclasses.replace(BASE, model=model)).init)
        matrices = [x.size for x in jax.tree.leaves(state.params) if x.ndim == 2]
        assert sum(matrices) == non_embedding(model) + embedding(model)
        assert embedding(model) == 256 * 24 * (1 if tied else 2)
    assert n_of("24x2") == 2 * (4 * 24**2 + 3 * 24 * 64)


def test_shapes_follow_the_recipe():
    made = shape(BASE.model, "40x3")
    assert (made.hidden_size, made.num_layers, made.num_heads, made.head_dim) == (40, 3, 5, 8)
    assert made.intermediate_size == 128  # the first multiple of 64 from 106.7
    assert made.init_std == pytest.approx(0.3 * math.sqrt(16 / 40))
    with pytest.raises(ValueError, match=r"size 20x1: a hidden size of 20 is not a multiple"):
        shape(BASE.model, "20x1")


def test_arms_differ_in_what_they_say():
    def made(arm, start=""):
        return configuration(BASE, STUDY, arm, "16x1", 40, 3, 6e-3, start)

    ternary, twin = made("ternary"), made("float")
    assert (ternary.model.weights, ternary.model.activations) == ("ternary", "int8")
    assert (twin.model.weights, twin.model.activations) == ("float", "float")
    assert ternary.optimizer.stage_two_learning_rate == pytest.approx(4e-3)
    assert ternary.optimizer.stage_two_weight_decay == 0
    assert twin.optimizer.stage_two_learning_rate is twin.optimizer.stage_two_weight_decay is None
    assert ternary.train == twin.train
    assert ternary.optimizer.warmup_steps == 2
    continual = made("continual", "there")
    assert continual.train.start_from == "there"
    assert continual.train.seed != 3
    assert continual.train.quantization_warmup_steps == 8
    fast = dataclasses.replace(BASE, train=dataclasses.replace(BASE.train, products="integer"))
    integer = {
        arm
        for arm in ("ternary", "float", "binary", "ternary_float_activations", "continual")
        if configuration(fast, STUDY, arm, "16x1", 40, 3, 6e-3).train.products == "integer"
    }
    assert integer == {"ternary", "binary"}
    assert made("binary").model.weights == "binary"
    bare = made("ternary_float_activations").model
    assert (bare.weights, bare.activations) == ("ternary", "float")
    assert {name: arm.rate_of for name, arm in ARMS.items() if arm.rate_of != name} == {
        "continual": "ternary", "ptq_ternary": "", "ptq_int8": "", "ptq_int4": "",
    }  # fmt: skip


def test_a_study_is_the_union_of_its_groups():
    groups = (Group(SIZES[:1], (1, 2), seeds=2), Group(SIZES[:2], (2,), ("binary", "float")))
    cells = cells_of(BASE, groups)
    steps = round(2 * n_of("16x1") / 16)
    assert cells["16x1", steps, 0] == ["ternary", "float", "binary"]
    assert cells["16x1", steps, 1] == ["ternary", "float"]
    assert cells["16x2", 2 * steps, 0] == ["binary", "float"]
    assert len(cells) == 5
    with pytest.raises(ValueError, match=r"no arm 'tern'; there are ternary, float, binary"):
        cells_of(BASE, (Group(("16x1",), (1,), ("tern",)),))


def test_what_needs_a_float_run_comes_after_it():
    runs = PLANNER.runs(("16x1", 40, 0), ("ptq_int4", "continual", "ternary"))
    assert [(r.arm, r.steps, r.tokens, r.after) for r in runs] == [
        ("ternary", 40, 640, ""),
        ("float", 20, 320, ""),
        ("continual", 20, 640, "16x1-320-s0-float"),
        ("float", 40, 640, ""),
        ("ptq_int4", 0, 640, "16x1-640-s0-float"),
    ]
    assert [r.seconds for r in runs] == pytest.approx([1.66, 1.34, 1.34, 1.66, 1.02])
    assert runs[0].flops == pytest.approx(640 * flops_per_token(shape(BASE.model, "16x1"), 8))
    swept = PLANNER.sweeps(runs)
    assert [(s.size, s.arm) for s in swept] == [("16x1", "ternary"), ("16x1", "float")]
    assert [s.steps for s in swept] == [20, 20]
    assert swept[0].seconds == pytest.approx(4 * 1.34)


def test_cheap_cells_come_first():
    runs, _ = PLANNER.all(cells_of(BASE, (Group(SIZES, (1, 8, 2)),)))
    seconds = [a.seconds + b.seconds for a, b in zip(runs[::2], runs[1::2], strict=True)]
    assert [run.arm for run in runs] == 9 * ["ternary", "float"]
    assert seconds == sorted(seconds)
    assert len(set(seconds)) > 5


def test_factorial_designs_are_not_collinear():
    group = Group(SIZES, (1, 2, 4, 8))
    ratios, crossed = (
        [*zip(*((n_of(size), steps) for size, steps, _ in cells), strict=True)]
        for cells in (cells_of(BASE, [group]), factorial(BASE, group))
    )
    for N, D in (ratios, crossed):
        wanted = statistics.correlation([*map(math.log, N)], [*map(math.log, D)])
        assert collinearity(N, D) == pytest.approx(wanted, abs=1e-12)
    assert collinearity(*ratios) > 0.5
    assert abs(collinearity(*crossed)) < 1e-9
    assert collinearity([1, 1], [2, 4]) is None
    assert collinearity([3], [5]) is None
    assert max(crossed[1]) == round(8 * n_of("32x2") / 16)


def test_isoflop_levels_cost_the_same_at_every_size():
    levels = (3e9, 1e9)
    cells = isoflop(BASE, Group(SIZES, (0.1, 1e6)), levels)
    assert len(cells) == 6
    for (size, steps, _), level in zip(cells, np.repeat(levels, 3), strict=True):
        of_step = 16 * flops_per_token(shape(BASE.model, size), 8)
        assert steps * of_step == pytest.approx(level, abs=of_step / 2)
    narrow = isoflop(BASE, Group(SIZES, (4, 6)), [5 * n_of("16x2") * flops("16x2")])
    assert [size for size, _, _ in narrow] == ["16x2"]


def flops(size):
    return flops_per_token(shape(BASE.model, size), 8)


@pytest.mark.parametrize("unit", ["seconds", "flops"])
def test_a_budget_keeps_the_cheapest_cells_whole(unit):
    cells = cells_of(BASE, (Group(SIZES, (1, 2, 4)),))
    everything = PLANNER.cost(cells, unit)
    for part in (0.3, 0.6, 1.0):
        kept = PLANNER.within(cells, Budget(part * everything, unit, "so much"))
        assert PLANNER.cost(kept, unit) <= part * everything * (1 + 1e-12)
        assert all(arms == ["ternary", "float"] for arms in kept.values())
        left = {cell: arms for cell, arms in cells.items() if cell not in kept}
        assert bool(left) == (part < 1)
        if left:
            cheapest = min(left, key=lambda cell: PLANNER.cost({cell: left[cell]}, unit))
            grown = kept | {cheapest: left[cheapest]}
            assert PLANNER.cost(grown, unit) > part * everything


def test_a_budget_that_fits_no_run_is_an_error():
    group = Group(SIZES, (1, 2))
    wanted = (
        r"the budget of 9 s fits no run: the cheapest cell, 16x1 with 4,096 tokens "
        r"\(ternary, float, and their learning-rate sweeps\), takes 21 s"
    )
    budget = Budget(9, "seconds", "9 s")
    with pytest.raises(ValueError, match=wanted):
        PLANNER.within(cells_of(BASE, (group,)), budget)
    with pytest.raises(ValueError, match=wanted):
        PLANNER.isoflop_within(group, 3, budget)
    with pytest.raises(ValueError, match=r"the budget of 5 FLOPs fits .* takes 5\.\d+e\+08 FLOPs"):
        PLANNER.within(cells_of(BASE, (group,)), Budget(5, "flops", "5 FLOPs"))


def test_isoflop_spends_its_budget():
    group = Group(SIZES, (1, 64))
    for limit in (400.0, 2000.0):
        cells = PLANNER.isoflop_within(group, 2, Budget(limit, "seconds", ""))
        assert 0.8 * limit < PLANNER.cost(cells) <= limit


def test_plans_come_back_as_they_were(tmp_path):
    plan = plan_of(text_file(tmp_path), Group(("16x1",), (1, 2), ("ternary", "ptq_int8")))
    path = tmp_path / "plan.json"
    path.write_text(to_json(plan))
    read = read_plan(path)
    assert (read.recipe, read.study, read.corpus) == (plan.recipe, plan.study, plan.corpus)
    assert [r.run for r in read.runs] == [r.run for r in plan.runs]
    assert read.seconds == pytest.approx(plan.seconds, abs=0.1)
    assert to_json(read) == path.read_text()
    assert str(tmp_path) not in path.read_text()


def test_damaged_plans(tmp_path):
    plan = plan_of(text_file(tmp_path), Group(("16x1",), (1,), ("ptq_int8",)))
    path, held = tmp_path / "plan.json", json.loads(to_json(plan))

    def refused(message, change):
        broken = json.loads(json.dumps(held))
        change(broken)
        path.write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=message):
            read_plan(path)

    refused("is no plan of format 1", lambda p: p.update(format=2))
    refused("damaged plan: 'runs'", lambda p: p.pop("runs"))
    refused("a run is there twice", lambda p: p["runs"].append(p["runs"][0]))
    refused("which is not before it", lambda p: p["runs"].reverse())
    refused("has no sweep of 16x1, float", lambda p: p["sweeps"].clear())
    refused("has a name that is no file name", lambda p: p["runs"][0].update(run="../x"))
    refused("no arm 'x'", lambda p: p["runs"][0].update(arm="x"))
    refused("unknown setting recipe|unknown setting", lambda p: p["recipe"].update(x=1))
    refused("unexpected keyword", lambda p: p["runs"][0].update(x=1))
    refused("names no float run that it comes after", lambda p: p["runs"][1].update(after=""))
    refused("its corpus has no data", lambda p: p["corpus"].pop("data"))
    refused("rates=", lambda p: p["study"].update(rates=[2.0, 1.0]))
    path.write_text(to_json(plan)[:-30])
    with pytest.raises(ValueError, match=r"plan.json is no plan: "):
        read_plan(path)
    with pytest.raises(ValueError, match="cannot read the plan"):
        read_plan(tmp_path / "none.json")


def test_remarks_on_designs_that_cannot_be_fitted(tmp_path):
    data = text_file(tmp_path)
    few = remarks(plan_of(data, Group(SIZES[:1], (0.1,))))
    assert few == ["1 sizes: a law of N and D needs 4 or more"]
    sizes = (*SIZES, "64x2", "64x4")
    said = remarks(plan_of(data, Group(sizes, (0.5,))))
    assert "log N and log D are correlated by 1.00" in said[0]
    longest = 0.5 * n_of("64x4")
    assert said[1] == (
        f"the longest run has {longest:,.0f} tokens and the corpus 2,000: it sees text again"
    )


def test_settings_of_groups_and_studies_are_checked():
    for message, make in (
        ("size '16' is not HIDDENxLAYERS", lambda: Group(("16",))),
        ("-1 tokens per parameter", lambda: Group(ratios=(-1,))),
        ("0 seeds", lambda: Group(seeds=0)),
        ("a group without sizes", lambda: Group(arms=())),
        ("a study without groups", lambda: StudyConfig(())),
        ("not two or more learning rates", lambda: StudyConfig(rates=(1e-3,))),
        ("continual_fraction=1 is not between", lambda: StudyConfig(continual_fraction=1)),
        ("sweep_ratio=0 must be above 0", lambda: StudyConfig(sweep_ratio=0)),
        ("extensions=-1 is negative", lambda: StudyConfig(extensions=-1)),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_times_for_a_person():
    assert [hours(x) for x in (29.6, 90, 5400, 3.6e7)] == ["30 s", "1.5 min", "1.5 h", "10,000.0 h"]
