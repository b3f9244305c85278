"""The import rules of the architecture, read from the source: arrows point one way."""

import ast
from pathlib import Path

import pytest

import bitjax

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(bitjax.__file__).parent  # as it is installed

# Each room may import the rooms of earlier lines, and its own.
LAYERS = [
    {"allocator", "config", "quant", "packing", "tokenizer"}
    | {"printable", "replacing", "safetensors_writer"},
    {"ops", "presets", "text"},
    {"corpus"},
    {"model"},
    {"train", "infer", "evaluate"},
    {"engine"},
    {"interop"},
    {"api", "recipe"},
    {"plots", "terminal"},
    {"demo", "inspection", "conversion", "bench", "chat"},
    {"protocol", "generation"},
    {"batch", "language_model", "serve"},
    {"cli_batch", "cluster", "cli_corpus", "evaluation", "evaluation_text", "harness", "scaling"},
    {"cli_eval", "cli_scale_laws", "cli_scale_runs", "cli_serve"},
    {"cli_scale"},
    {"cli"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """Dotted names of every module imported anywhere in a file, with `from a import b` as a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


SOURCES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    room = room_of(path)
    for name in imports(path):
        parts = name.split(".")
        assert parts[0] not in ("configs", "experiments", "tests"), f"{path} imports {name}"
        assert "_src" not in parts, f"{path} uses the private {name}"
        if parts[0] != "bitjax" or room == "__init__" or parts[1] == "__version__":
            continue
        other = parts[1]
        if other == "_ffi":
            assert path == PACKAGE / "ops" / "ffi.py", f"{path} imports the extension"
            continue
        assert other in LEVEL, f"{path} imports {name}, which is in no layer"
        assert other == room or LEVEL[other] < LEVEL[room], f"{path} ({room}) imports {name}"


def test_every_room_has_a_layer():
    rooms = {room_of(path) for path in SOURCES} - {"__init__"}
    assert rooms == set(LEVEL)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.name)
def test_recipes_import_configuration_only(path):
    allowed = ("bitjax.config.", "bitjax.presets.")
    assert all(name.startswith(allowed) for name in imports(path) if name.startswith("bitjax"))


# Where tests run apart from the sources there are none.
@pytest.mark.parametrize("path", sorted((ROOT / "ffi").glob("*")), ids=lambda p: p.name)
def test_headers_stay_in_their_files(path):
    """XLA only in the handlers, nanobind only in the module, intrinsics only in kernels_* and in
    attention.cc, which is compiled for each instruction set as they are.

    ymm.h and neon.h, which kernels share, are a part of them: no other file includes them.
    """
    if path.suffix not in (".cc", ".h"):
        return
    included = [line for line in path.read_text().splitlines() if line.startswith("#include")]
    for line in included:
        assert "xla/" not in line or path.stem.startswith(("handler", "parallel", "module")), line
        assert "nanobind" not in line or path.name == "module.cc", line
        intrinsics = any(name in line for name in ("immintrin", "neon.h", "ymm.h"))
        of_a_kernel = path.stem.startswith("kernels_") or path.name in (
            "attention.cc", "neon.h", "ymm.h",
        )  # fmt: skip
        assert not intrinsics or of_a_kernel, f"{path.name}: {line}"


def test_import_is_light():
    """`import bitjax` needs neither JAX nor the extension."""
    import subprocess
    import sys

    code = "import sys, bitjax; sys.exit('jax' in sys.modules or 'bitjax._ffi' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
