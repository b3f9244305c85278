"""Weights by columns: the layout against its text, products and models against those by rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import packing_oracle as oracle
import pytest
from tiny import tiny_config, tiny_model

from bitjax.infer import Generator, SamplingParams
from bitjax.infer.convert import pack_model
from bitjax.infer.dummy import write_dummy
from bitjax.model import bit_linears
from bitjax.model.files import load_model, save_model
from bitjax.ops import ffi
from bitjax.packing import PackedWeights, pack, unpack, validate, with_columns

TERNARY = ("ternary2", "ternary1.6")


def make(layout, rows, cols, seed=0):
    w = np.random.default_rng(seed).integers(-1, 2, (rows, cols))
    return w, with_columns(pack(w, 0.5, layout))


def test_golden_bytes():
    """One column, rows 0, 1 and 64 (plane 1) of it set: codes 2, 0 and 2, the rest 1."""
    w = np.zeros((65, 1))
    w[0], w[1], w[64] = 1, -1, 1
    columns = np.asarray(with_columns(pack(w, 1.0, "ternary2")).columns)
    assert columns.shape == (1, 1, 64)
    assert columns[0, 0, :3].tolist() == [0b01011010, 0b01010100, 0b01010101]
    columns = np.asarray(with_columns(pack(w, 1.0, "ternary1.6")).columns)
    assert columns[0, 0, :3].tolist() == [2 + 2 * 3 + 9 + 27 + 81, 0 + 3 + 9 + 27 + 81, 121]


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (64, 3), (257, 20), (320, 5), (321, 33)])
@pytest.mark.parametrize("layout", TERNARY)
def test_layout(layout, rows, cols):
    w, packed = make(layout, rows, cols)
    base, planes = oracle.BASE[layout], oracle.PLANES[layout]
    codes = np.ones((-(-rows // (64 * planes)) * 64 * planes, cols), np.int64)
    codes[:rows] = w + 1
    wanted = np.zeros(packed.columns.shape, np.int64)
    for n in range(len(codes)):
        tile, plane, byte = n // (64 * planes), n // 64 % planes, n % 64
        wanted[tile, :, byte] += codes[n] * base**plane
    assert (np.asarray(packed.columns) == wanted).all()
    assert (unpack(packed) == w).all()
    validate("w", jax.tree.map(np.asarray, packed))


@pytest.fixture(params=ffi.kernels())
def kernel(request):
    ffi.force_kernel(request.param)
    yield request.param
    ffi.force_kernel(None)


@pytest.mark.parametrize("density", [0, 0.01, 0.2, 0.39, 0.41, 1])
@pytest.mark.parametrize("shape", [(1, 700), (320, 4096), (1000, 1601)])
@pytest.mark.parametrize("layout", TERNARY)
def test_products_equal_those_by_rows(kernel, layout, shape, density):
    w, packed = make(layout, *shape)
    rng = np.random.default_rng(1)
    q = rng.integers(-128, 128, (1, shape[1])) * (rng.random((1, shape[1])) < density)
    for _ in range(3):  # in between, by rows, by columns, and by what was faster
        assert (ffi.packed_matmul_i32(jnp.asarray(q, jnp.int8), packed) == q @ w.T).all()


def without(packed: PackedWeights) -> PackedWeights:
    return dataclasses.replace(packed, columns=None)


def test_wrong_columns_are_read_for_one_row_of_few_activations_alone():
    """Which form a call reads shows when the two differ."""
    if ffi.active_kernel() not in ("avx512vbmi", "avx512vnni", "scalar"):
        pytest.skip("this kernel never reads columns")
    _, packed = make("ternary2", 336, 4112)  # a shape that no other test times
    packed = dataclasses.replace(packed, columns=jnp.full_like(packed.columns, 0b10101010))
    rng = np.random.default_rng(2)

    def differs(rows, density):
        q = jnp.asarray((rng.random((rows, 4112)) < density).astype(np.int8))
        by_rows = ffi.packed_matmul_i32(q, without(packed))
        return bool((ffi.packed_matmul_i32(q, packed) != by_rows).any())

    assert differs(1, 0.08)
    assert not differs(2, 0.08)
    assert not differs(1, 0.5)
    # In between, each form once, and never one alone for long.
    assert [differs(1, 0.3) for _ in range(2)] == [False, True]
    assert {differs(1, 0.3) for _ in range(64)} == {False, True}


@pytest.mark.parametrize("gate", ["none", "relu2"])
def test_scaling_norm_and_residual(gate):
    rng = np.random.default_rng(3)
    w = rng.integers(-1, 2, (500, 700))
    packed = with_columns(pack(w, rng.random(500, np.float32), "ternary1.6"))
    x = rng.standard_normal((1, 1400 if gate == "relu2" else 700)).astype(np.float32)
    if gate == "none":
        x[:, 70:] = 0
    norm = jnp.asarray(rng.random(700, np.float32))
    residual = jnp.asarray(rng.standard_normal((1, 500)), jnp.float32)
    results = [
        ffi.packed_matmul(jnp.asarray(x), p, gate, norm, 1e-5, residual)
        for p in (packed, without(packed))
    ]
    assert (results[0] == results[1]).all()


def test_a_vectorised_product_goes_by_rows():
    w, packed = make("ternary2", 64, 256)
    q = jnp.asarray((np.random.default_rng(4).random((3, 1, 256)) < 0.1).astype(np.int8))
    y = jax.vmap(lambda x: ffi.packed_matmul_i32(x, packed))(q)
    assert (y[:, 0] == np.asarray(q)[:, 0].astype(np.int64) @ w.T).all()


def test_int4_has_no_columns():
    packed = pack(np.ones((3, 32)), 1.0, "int4", np.ones((3, 1)))
    with pytest.raises(ValueError, match="int4 weights are not stored by columns"):
        with_columns(packed)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            np.zeros((1, 5, 64), np.uint8),
            r"columns are uint8\[1, 5, 64\]; a 40 x 6 ternary2 matrix",
        ),
        (np.zeros((1, 6, 64), np.int32), "columns are int32"),
        (np.full((1, 6, 64), 255, np.uint8), "holds the code 3"),
    ],
)
def test_validate_refuses(columns, message):
    _, packed = make("ternary2", 40, 6)
    packed = dataclasses.replace(jax.tree.map(np.asarray, packed), columns=columns)
    with pytest.raises(ValueError, match=message):
        validate("w", packed)


def test_a_custom_call_refuses_columns_of_another_shape():
    _, packed = make("ternary2", 40, 64)
    packed = dataclasses.replace(packed, columns=packed.columns[:, :-1])
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"columns: wanted \[1, 64, 64\]"):
        ffi.packed_matmul_i32(jnp.zeros((1, 64), jnp.int8), packed).block_until_ready()


@pytest.mark.parametrize("layout", TERNARY)
def test_a_model_writes_the_same_text(tmp_path, layout):
    model = tiny_model(activation="relu2")
    packed = pack_model(model, layout, columns=True)
    held = {n: layer.weight.get_value().columns is not None for n, layer in bit_linears(packed)}
    assert {n for n, has in held.items() if has} == {n for n in held if n.endswith("ffn.down")}
    save_model(tmp_path / "m.safetensors", packed)
    loaded = load_model(tmp_path / "m.safetensors")
    for (_, a), (_, b) in zip(bit_linears(packed), bit_linears(loaded), strict=True):
        a, b = a.weight.get_value(), b.weight.get_value()
        assert all((x == y).all() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))
    greedy = SamplingParams(max_new_tokens=40, temperature=0)
    texts = [
        Generator(m).generate(["The "], greedy)[0].text for m in (loaded, pack_model(model, layout))
    ]
    assert texts[0] == texts[1]


def test_a_model_without_zeros_is_refused():
    with pytest.raises(ValueError, match="silu leaves few"):
        pack_model(tiny_model(activation="silu"), columns=True)


@pytest.mark.parametrize("layout", TERNARY)
def test_dummy_columns_are_the_rows(tmp_path, layout):
    path = tmp_path / "d.safetensors"
    write_dummy(path, tiny_config(activation="relu2"), layout, columns=True)
    downs = [
        layer.weight.get_value()
        for name, layer in bit_linears(load_model(path))
        if name.endswith("down")
    ]
    for packed in downs:
        assert (with_columns(without(packed)).columns == packed.columns).all()
    with pytest.raises(ValueError, match="silu leaves few"):
        write_dummy(path, tiny_config(activation="silu"), columns=True)
