"""Memory figures read from a file system of the test's, and what is said about them."""

import pytest
from tiny import tiny_model

from bitjax import cli
from bitjax.api import load
from bitjax.infer import Generator, SamplingParams, generator, pack_model
from bitjax.infer.memory import available_memory, mapping_warning, require_memory
from bitjax.model.files import save_model

G = 10**9


def system(root, kib, groups="", **files):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable:  {kib} kB\nCached: 1 kB\n")
    if groups:
        (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def v2(most, used, cached=(0, 0), at=""):
    stat = f"anon 5\nactive_file {cached[0]}\ninactive_file {cached[1]}\nslab 1\n"
    values = {"memory.max": f"{most}\n", "memory.current": f"{used}\n", "memory.stat": stat}
    return {f"{at}{name}": text for name, text in values.items()}


def test_without_groups(tmp_path):
    assert available_memory(system(tmp_path, 1000)) == 1024000


def test_not_linux(tmp_path):
    assert available_memory(tmp_path) is None


@pytest.mark.parametrize(
    ("most", "used", "cached", "left"),
    [
        ("max", 0, (0, 0), 1024000),
        (500_000, 100_000, (0, 0), 400_000),
        (500_000, 400_000, (30_000, 70_000), 200_000),  # the page cache gives way
        (500_000, 600_000, (0, 0), 0),
        (5_000_000, 0, (0, 0), 1024000),
    ],
)
def test_a_group(tmp_path, most, used, cached, left):
    files = v2(most, used, cached, "a__b__")
    assert available_memory(system(tmp_path, 1000, "0::/a/b\n", **files)) == left


@pytest.mark.parametrize("at", ["", "a__"])
def test_the_limit_of_a_group_above(tmp_path, at):
    files = {**v2(300_000, 0, at=at), **v2(900_000, 0, at="a__b__")}
    assert available_memory(system(tmp_path, 1000, "0::/a/b\n", **files)) == 300_000


def test_version_1(tmp_path):
    files = {
        "memory__x__memory.limit_in_bytes": "700000",
        "memory__x__memory.usage_in_bytes": "100000",
        "memory__x__memory.stat": "inactive_file 50000\n",
        "cpu__x__memory.limit_in_bytes": "1",
    }
    root = system(tmp_path, 1000, "3:cpu:/y\n2:blkio,memory:/x\n", **files)
    assert available_memory(root) == 650_000


def test_a_group_that_is_not_there(tmp_path):
    assert available_memory(system(tmp_path, 1000, "0::/gone\n")) == 1024000


def test_what_fits_and_what_does_not():
    require_memory("it", 5 * G, 5 * G)
    require_memory("it", 5 * G, None)
    with pytest.raises(ValueError, match=r"^it needs 5\.00 GB of memory; 3\.25 GB are available$"):
        require_memory("it", 5 * G, 3250 * 10**6)


def test_a_mapped_file_beyond_memory():
    assert mapping_warning(5 * G, 5 * G) == mapping_warning(5 * G, None) == ""
    said = mapping_warning(20 * G, 14 * G)
    assert "the weights take 20.00 GB and 14.00 GB of memory are available" in said
    assert "every token reads at least 6.00 GB from the disk again, about 3.0 s" in said


def test_generation_says_what_it_needs_before_it_allocates(monkeypatch):
    gen = Generator(pack_model(tiny_model()))
    monkeypatch.setattr(generator, "available_memory", lambda: 10_000)
    with pytest.raises(ValueError, match=r"^generation of 3 sequences of up to 11 tokens needs "):
        gen.generate(["a", "b", "c"], SamplingParams(max_new_tokens=10))
    # Keys and values of 2 layers, 2 heads of 6, 64 slots, in float32; the rest is smaller.
    cache = 2 * 2 * 2 * 6 * 64 * 4
    monkeypatch.setattr(generator, "available_memory", lambda: cache - 1)
    with pytest.raises(ValueError, match=r"memory; 0\.00 GB are available"):
        gen.generate(["a"], SamplingParams(max_new_tokens=10))
    monkeypatch.setattr(generator, "available_memory", lambda: 30 * cache)
    assert gen.generate(["a"], SamplingParams(max_new_tokens=10))[0].tokens == 10


def test_seen_tokens_are_counted():
    one, wide = (Generator(pack_model(tiny_model(vocab_size=v))) for v in (256, 1256))
    assert wide.memory(5, 2, 16, 16) - one.memory(5, 2, 16, 16) == 5 * 1000


def test_loading_warns(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_model(path, pack_model(tiny_model()))
    load(path)  # a warning is an error here
    monkeypatch.setattr("bitjax.infer.memory.available_memory", lambda: 1000)
    with pytest.warns(UserWarning, match=r"^the weights take 0\.00 GB"):
        load(path)


@pytest.mark.filterwarnings("default")
def test_at_the_command_line(tmp_path, capsys, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_model(path, pack_model(tiny_model()))
    assert cli.main(["generate", str(path), "--max-new-tokens", "2"]) == 0
    assert "weights take" not in capsys.readouterr().err
    monkeypatch.setattr("bitjax.infer.memory.available_memory", lambda: 1000)
    assert cli.main(["generate", str(path), "--max-new-tokens", "2"]) == 0
    assert "bitjax: warning: the weights take 0.00 GB" in capsys.readouterr().err
    assert cli.main(["bench", str(path), "--prompt", "60"]) == 1
    assert "bitjax: warning: the weights take 0.00 GB" in capsys.readouterr().err
    assert cli.main(["bench", str(tmp_path)]) == 1
    assert f"bitjax: {tmp_path} is not a model file" in capsys.readouterr().err
    monkeypatch.setattr(generator, "available_memory", lambda: 1000)
    assert cli.main(["generate", str(path), "--max-new-tokens", "2"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("bitjax: generation of 1 sequences of up to ")
