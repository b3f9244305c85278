"""Recipe files: what they return, and every way they can fail."""

import os
import sys
from pathlib import Path

import pytest

from bitjax.config import ModelConfig, RunConfig
from bitjax.presets import b158_paper, shakespeare, widened
from bitjax.recipe import read_recipe

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "recipe.py"
        path.write_text(text)
        return path

    return write


def test_the_shakespeare_recipe():
    assert read_recipe(CONFIGS / "shakespeare.py") == shakespeare("ternary")


def test_every_recipe_in_configs_is_readable():
    paths = sorted(CONFIGS.glob("*.py"))
    assert paths
    for path in paths:
        assert isinstance(read_recipe(path), RunConfig), path


def test_a_recipe(recipe):
    path = recipe(
        "from bitjax.config import ModelConfig, RunConfig\n"
        "def get_config():\n"
        "    return RunConfig(model=ModelConfig(num_layers=SIZE))\n"
        "SIZE = 7\n"
    )
    modules = set(sys.modules)
    assert read_recipe(path) == RunConfig(model=ModelConfig(num_layers=7))
    assert set(sys.modules) == modules
    assert os.listdir(path.parent) == ["recipe.py"]  # no bytecode beside the user's file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no get_config"),
        ("get_config = 5", "has no get_config"),
        ("def get_config(): return None", "has no get_config"),
        ("def get_config(): return {'model': {}}", "has no get_config"),
        ("from bitjax.config import ModelConfig as get_config", "has no get_config"),
    ],
)
def test_no_configuration(recipe, text, message):
    path = recipe(text)
    with pytest.raises(ValueError, match=f"recipe.py {message}") as error:
        read_recipe(path)
    assert str(error.value) == (
        f"{path} has no get_config() that returns a bitjax.config.RunConfig"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def get_config(): raise KeyError('x')", "KeyError: 'x'"),
        ("def get_config(x): pass", r"TypeError: get_config\(\) missing 1 required positional"),
        ("def get_config(:", "SyntaxError: invalid syntax"),
        ("import no_such_module_anywhere", "ModuleNotFoundError: No module named 'no_such_mod"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        (
            "from bitjax.config import ModelConfig\n"
            "def get_config(): return ModelConfig(num_layers=0)",
            "ValueError: model.num_layers=0 must be above 0",
        ),
        ("\0", "(SyntaxError|ValueError): source code .* null bytes"),
    ],
)
def test_a_recipe_that_fails(recipe, text, message):
    path = recipe(text)
    with pytest.raises(ValueError, match=f"recipe.py failed: {message}") as error:
        read_recipe(path)
    assert str(error.value).startswith(f"{path} failed: ")
    assert error.value.__cause__ is not None  # the user's own traceback is kept


def test_missing(tmp_path):
    with pytest.raises(ValueError, match=r"none\.py does not exist; give a Python file with get_"):
        read_recipe(tmp_path / "none.py")
    with pytest.raises(ValueError, match="does not exist; give a Python file with get_config"):
        read_recipe(tmp_path)


def test_ctrl_c_is_no_failure_of_the_recipe(recipe):
    path = recipe("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        read_recipe(path)


def test_the_papers_runs_have_its_tokens_and_rates():
    for path in CONFIGS.glob("b158_*.py"):
        run = read_recipe(path)
        tokens = run.train.steps * run.train.batch_size * run.train.seq_len
        assert tokens == pytest.approx(100e9, rel=1e-5)
        assert run.optimizer.warmup_steps == 375
        assert (run.model.weights == "float") == path.stem.endswith("_float")
    rates = {path.stem: read_recipe(path).optimizer for path in CONFIGS.glob("b158_*.py")}
    assert len(rates) == 7
    assert (rates["b158_3b"].learning_rate, rates["b158_3b"].stage_two_learning_rate) == (
        1.2e-3, 8e-4,
    )  # fmt: skip
    assert rates["b158_700m_float"].learning_rate == 2.5e-4
    assert rates["b158_700m_float"].stage_two_weight_decay is None
    with pytest.raises(ValueError, match=r"no rate of a full-precision b1\.58-3\.9b"):
        b158_paper("b1.58-3.9b", "float")


@pytest.mark.parametrize("arm", ["ternary", "float"])
def test_a_wider_run_has_the_rates_that_transfer(arm):
    run = shakespeare(arm)
    wide = widened(run, 512)
    assert (wide.model.hidden_size, wide.model.intermediate_size) == (512, 1536)
    assert (wide.model.num_heads, wide.model.num_kv_heads, wide.model.head_dim) == (8, 8, 64)
    assert wide.model.init_std == pytest.approx(run.model.init_std / 2)
    assert wide.optimizer.learning_rate == pytest.approx(run.optimizer.learning_rate / 4)
    second = run.optimizer.stage_two_learning_rate
    if second is not None:
        second = pytest.approx(second / 4)
    assert wide.optimizer.stage_two_learning_rate == second
    assert (wide.train, wide.data) == (run.train, run.data)
    assert widened(run, 128) == run
    with pytest.raises(ValueError, match="width=96 is not a multiple of 64, which one key head"):
        widened(run, 96)


def test_the_narrow_recipe_is_the_demos_made_narrower():
    assert read_recipe(CONFIGS / "shakespeare_narrow.py") == widened(shakespeare("ternary"), 64)
