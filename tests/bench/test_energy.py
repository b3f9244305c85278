"""Energy: counters in a directory of the test's, and a model held against published figures."""

import pytest
from tiny import tiny_config, tiny_model

from bitjax.bench.energy import PackageMeter, modelled_joules
from bitjax.infer import pack_model
from bitjax.model import abstract_model
from bitjax.model.files import save_model
from bitjax.presets import MODELS


def zone(root, path, name, energy, most=1000):
    folder = root / path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{energy}\n")
    (folder / "max_energy_range_uj").write_text(f"{most}\n")


def test_packages_are_summed_and_nothing_is_counted_twice(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000, 9_000_000)
    zone(tmp_path, "intel-rapl:1", "package-1", 100, 9_000_000)
    others = {
        "intel-rapl:0:0": "core", "intel-rapl:0:1": "dram", "intel-rapl:2": "psys",
        "intel-rapl-mmio:0": "package-0",
    }  # fmt: skip
    for path, name in others.items():
        zone(tmp_path, path, name, 0)
    (tmp_path / "dtpm").mkdir()
    meter = PackageMeter(tmp_path)
    assert meter.readable
    zone(tmp_path, "intel-rapl:0", "package-0", 5_600_000, 9_000_000)
    zone(tmp_path, "intel-rapl:1", "package-1", 2_000_100, 9_000_000)
    for path, name in others.items():
        zone(tmp_path, path, name, 77_000_000)
    assert meter.joules() == pytest.approx(2.6)
    assert meter.joules() == 0


def test_a_counter_wraps_around(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", 9_500_000, 10_000_000)
    zone(tmp_path, "intel-rapl:1", "package-1", 1_000_000, 20_000_000)
    meter = PackageMeter(tmp_path)
    zone(tmp_path, "intel-rapl:0", "package-0", 250_000, 10_000_000)
    zone(tmp_path, "intel-rapl:1", "package-1", 1_000_001, 20_000_000)
    assert meter.joules() == pytest.approx(0.750001)


def test_no_counters(tmp_path):
    assert not PackageMeter(tmp_path / "none").readable
    zone(tmp_path, "intel-rapl:0", "psys", 1)
    assert not PackageMeter(tmp_path).readable


def test_counters_that_may_not_be_read(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", 1)
    (tmp_path / "intel-rapl:0/energy_uj").unlink()
    (tmp_path / "intel-rapl:0/energy_uj").mkdir()  # reading it raises OSError, for root too
    assert not PackageMeter(tmp_path).readable


# Joules of 512 tokens, arXiv 2504.12285, table 1 (section 4: layers and attention of 512 tokens on
# 512 positions each, without embedding and head).
LLAMA = {"weights": "float", "activations": "float", "vocab_size": 256}
PUBLISHED = {
    "BitNet b1.58 2B4T": (MODELS["b1.58-2b4t"], 0.028),
    "Llama 3.2 1B": (tiny_config(hidden_size=2048, intermediate_size=8192, num_layers=16,
        num_heads=32, num_kv_heads=8, head_dim=64, **LLAMA), 0.258),
    "Qwen2.5 1.5B": (tiny_config(hidden_size=1536, intermediate_size=8960, num_layers=28,
        num_heads=12, num_kv_heads=2, head_dim=128, **LLAMA), 0.347),
    "SmolLM2 1.7B": (tiny_config(hidden_size=2048, intermediate_size=8192, num_layers=24,
        num_heads=32, num_kv_heads=32, head_dim=64, **LLAMA), 0.425),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_figures(name):
    config, joules = PUBLISHED[name]
    parts = modelled_joules(abstract_model(config), context=512)
    assert round(512 * (parts["layers"] + parts["attention"]), 3) == joules


def test_float16_twin_and_the_formats_of_a_head():
    model = tiny_model(num_layers=1)
    V, D = 256, 32
    full = V * D * 0.5 - V * 0.16
    packed = V * D * 0.077 - V * 0.007
    for tables, head in (("bfloat16", full), ("int8", packed), ("int4", packed),
                         ("screened", packed)):  # fmt: skip
        parts = modelled_joules(pack_model(model, tables=tables), context=7)
        assert parts["head"] == pytest.approx(head * 1e-12)
    # qkv, o, gate_up and down as outputs x inputs; queries are 4 heads of 6.
    shapes = [(48, 32), (32, 24), (48, 32), (32, 24)]
    assert parts["layers"] == pytest.approx(
        1e-12 * sum(n * k * 0.007 - n * 0.007 + (n + k) * 0.34 for n, k in shapes)
    )
    assert parts["attention"] == pytest.approx(2 * 7 * 24 * 0.5e-12)
    twin = modelled_joules(pack_model(model, tables="int8"), context=7, quantized=False)
    assert twin == pytest.approx({
        "layers": 1e-12 * sum(n * k * 0.5 - n * 0.16 for n, k in shapes),
        "attention": parts["attention"],
        "head": full * 1e-12,
    })  # fmt: skip


@pytest.mark.parametrize("measured", [True, False])
def test_the_benchmark_says_which_it_is(measured, tmp_path, capsys, monkeypatch):
    class Meter:
        readable = measured
        uses = iter([50.0, 12.0] * 3)  # what was used since: before the decode, then by it

        def joules(self):
            return next(self.uses)

    from bitjax.bench import ceilings, model

    monkeypatch.setattr(ceilings, "READ_BYTES", 2**16)
    monkeypatch.setattr(ceilings, "DOT_ROUNDS", 1000)
    monkeypatch.setattr(model, "DECODED", 4)
    monkeypatch.setattr(model, "PackageMeter", Meter)
    path = tmp_path / "model.safetensors"
    packed = pack_model(tiny_model(num_layers=1))
    save_model(path, packed)
    document = model.bench_model(path, (), (), (), (), rounds=3)
    energy, printed = document["energy"], capsys.readouterr().out.splitlines()
    (row,) = (line for line in printed[:-1] if "energy" in line)
    if measured:
        assert (energy["source"], energy["rounds"]) == ("measured", [3.0] * 3)
        assert energy["joules_per_token"] == 3.0
        assert "measured" in row
        assert "3 J a token" in row
    else:
        joules = sum(modelled_joules(packed, 16 + 2).values())
        assert (energy["source"], energy["joules_per_token"]) == ("modelled", joules)
        assert energy["rounds"] == []
        assert "modelled" in row
