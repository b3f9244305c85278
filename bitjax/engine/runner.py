"""The model at work: pages of the cache, and the compiled programs that read and extend them.

A step runs rows, tokens of many sequences, through the layers, then the head for those rows whose
next token is wanted. Programs are compiled for a few numbers of rows; how many of them count is a
number the custom calls read, so the rest costs next to nothing.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bitjax.config import CacheDType
from bitjax.infer.programs import Program
from bitjax.model import Cache, KVCache, Transformer
from bitjax.model.layers import rotary_angles, rotary_frequencies
from bitjax.ops import ffi
from bitjax.ops.rows import PAGE, Rows

BUCKETS = (1, 8, 32, 128, 512, 2048)  # rows of a program
TURNS = 256  # positions whose angles one program computes, always as many: so always the same


class Runner:
    """A model and its pages.

    Args:
        model: float or packed.
        cache_dtype: of the pages; the model's if None.
        pages: how many.
        tables: sequences that run together at most.
        context: tokens that a sequence may have.

    Attributes:
        tables_QxN: int32, the pages of each sequence that runs.
        draws: whether there is `draw`, a custom call on CPU.
    """

    def __init__(
        self, model: Transformer, cache_dtype: CacheDType | None, pages: int, tables: int,
        context: int,
    ) -> None:  # fmt: skip
        config = model.config
        self.leaves, tree = jax.tree.flatten(nnx.split(model))
        self.tables_QxN = np.zeros((tables, -(-context // PAGE)), np.int32)
        self._run = Program(functools.partial(_run, tree), donate=1)
        self._head = Program(functools.partial(_head, tree))
        self._draw = Program(functools.partial(_draw, tree))
        self._copy = Program(_copy, donate=0)
        self.draws = ffi.available() and jax.local_devices()[0].platform == "cpu"
        self._screened = model.screen is not None
        self._compiled: dict[Any, Callable[..., Any]] = {}
        make = Program(lambda: model.empty_cache(pages, PAGE, cache_dtype))
        self._cache: Cache = make()
        frequencies = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        angles = Program(functools.partial(rotary_angles, frequencies=frequencies))
        turns = [
            np.asarray(angles(np.arange(first, first + TURNS, dtype=np.int32)[None]))[0]
            for first in range(0, self.tables_QxN.shape[1] * PAGE, TURNS)
        ]
        self._turns_Sxh = jnp.asarray(np.concatenate(turns))

    def run(
        self, tokens: np.ndarray | jax.Array, positions: np.ndarray, sequences: np.ndarray
    ) -> jax.Array:
        """Run tokens of sequences, whose pages `tables_QxN` has; int32 `[rows]`.

        Args:
            tokens: numbers, or the result of `draw` for as many rows, which need not be there yet.
            positions: in their sequences.
            sequences: rows of `tables_QxN`.

        Returns:
            Final hidden states of at least so many rows.
        """
        count = len(positions)
        size = bucket(count)
        if isinstance(tokens, np.ndarray):
            tokens = padded(tokens, size)
        places_2xR = np.zeros((2, size), np.int32)
        places_2xR[0, :count], places_2xR[1, :count] = positions, sequences
        operands = self._operands(tokens, places_2xR, count)
        hidden_RxD, self._cache = self._extend(size)(*operands)
        return hidden_RxD

    def draw(
        self, hidden_RxD: jax.Array, ranks: np.ndarray, floats: np.ndarray, integers: np.ndarray
    ) -> jax.Array:
        """Tokens int32 that follow the first rows of hidden states, which need not be there yet.

        Args:
            hidden_RxD: of `run` for as many rows.
            ranks: int32, how many of the largest logits of each shall be exact.
            floats, integers: settings, see `ops.ffi.sample_rows`.
        """
        size, count = len(hidden_RxD), len(ranks)
        operands = (
            hidden_RxD, padded(ranks, size), np.array([count], np.int32), padded(floats, size),
            padded(integers, size),
        )  # fmt: skip
        return self._drawer(operands)(self.leaves, *operands)

    def logits(
        self,
        hidden_RxD: jax.Array,
        rows: np.ndarray,
        ranks: np.ndarray,
        masks: dict[int, np.ndarray] | None = None,
    ) -> np.ndarray:
        """Float32 logits `[at least rows, V]` of some rows of hidden states.

        Args:
            hidden_RxD: of `run`.
            rows: int32, which.
            ranks: int32, how many of the largest logits of each shall be exact.
            masks: uint32 bits of the only tokens that matter, by number in `rows`.
        """
        count = len(rows)
        size = bucket(count)
        hidden_SxD = np.zeros((size, hidden_RxD.shape[1]), hidden_RxD.dtype)
        hidden_SxD[:count] = np.asarray(hidden_RxD)[rows]
        ranks_S = padded(ranks, size)
        allowed_SxW = None
        if masks and self._screened:
            words = len(next(iter(masks.values())))
            allowed_SxW = np.full((size, words), 0xFFFFFFFF, np.uint32)
            for row, mask in masks.items():
                allowed_SxW[row] = mask
        operands = hidden_SxD, ranks_S, np.array([count], np.int32), allowed_SxW
        return np.asarray(self._choose(operands)(self.leaves, *operands))

    def load(self, rows: int, wanted: int) -> None:
        """Compile, or read from the disk, what runs up to so many rows and wanted rows.

        Else the first step of a size waits for that, half a second for 30 layers.
        """
        for size in buckets(rows):
            self._extend(size)
        one = self._operands(np.zeros(1, np.int32), np.zeros((2, 1), np.int32), 0)
        hidden_1xD = self._run.shapes(*one)[0]
        for size in buckets(wanted):
            hidden_SxD = np.zeros((size, hidden_1xD.shape[1]), hidden_1xD.dtype)
            head = hidden_SxD, np.zeros(size, np.int32), np.zeros(1, np.int32)
            self._choose((*head, None))
            if self.draws:
                self._drawer(
                    (*head, np.zeros((size, 3), np.float32), np.zeros((size, 8), np.uint32))
                )
        self._copy.compiled(self._cache, np.zeros(2, np.int32))

    def _operands(
        self, tokens_R: np.ndarray | jax.Array, places_2xR: np.ndarray, count: int
    ) -> tuple[Any, ...]:
        # JAX may read an array in place, after this call: the next step changes the tables.
        tables_QxN, count_1 = self.tables_QxN.copy(), np.array([count], np.int32)
        return (
            self.leaves, self._cache, tokens_R, places_2xR, tables_QxN, count_1, self._turns_Sxh,
        )  # fmt: skip

    def _extend(self, size: int) -> Callable[..., Any]:
        """The program that runs so many rows."""
        key = "run", size
        if key not in self._compiled:
            operands = self._operands(np.zeros(size, np.int32), np.zeros((2, size), np.int32), 0)
            self._compiled[key] = self._run.compiled(*operands)
        return self._compiled[key]

    def _choose(self, operands: tuple[Any, ...]) -> Callable[..., Any]:
        """The program of the head for such operands."""
        key = "head", len(operands[0]), operands[-1] is None
        if key not in self._compiled:
            self._compiled[key] = self._head.compiled(self.leaves, *operands)
        return self._compiled[key]

    def _drawer(self, operands: tuple[Any, ...]) -> Callable[..., Any]:
        """The program that draws for so many rows."""
        key = "draw", len(operands[0])
        if key not in self._compiled:
            self._compiled[key] = self._draw.compiled(self.leaves, *operands)
        return self._compiled[key]

    def copy(self, source: int, target: int) -> None:
        """Copy a page."""
        operands = self._cache, np.array([source, target], np.int32)
        if "copy" not in self._compiled:
            self._compiled["copy"] = self._copy.compiled(*operands)
        self._cache = self._compiled["copy"](*operands)


def buckets(rows: int) -> list[int]:
    """Sizes of the programs that run up to so many rows."""
    return [size for size in BUCKETS if size < rows] + [bucket(rows)]


def bucket(rows: int) -> int:
    """Rows of the program that runs so many."""
    index = bisect.bisect_left(BUCKETS, rows)
    return BUCKETS[index] if index < len(BUCKETS) else -(-rows // BUCKETS[-1]) * BUCKETS[-1]


def padded(x: np.ndarray, size: int) -> np.ndarray:
    """x with rows of zeros behind it, `size` in all."""
    result = np.zeros((size, *x.shape[1:]), x.dtype)
    result[: len(x)] = x
    return result


def page_bytes(model: Transformer, cache_dtype: CacheDType | None) -> int:
    """Of all layers."""
    shapes = jax.eval_shape(lambda: model.empty_cache(1, PAGE, cache_dtype))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def _run(
    tree: Any,
    leaves: list[Any],
    cache: Cache,
    tokens_R: jax.Array,
    places_2xR: jax.Array,
    tables_QxN: jax.Array,
    count_1: jax.Array,
    turns_Sxh: jax.Array,
) -> tuple[jax.Array, Cache]:
    model: Transformer = nnx.merge(*jax.tree.unflatten(tree, leaves))
    positions_R, sequences_R = places_2xR
    rows = Rows(positions_R, sequences_R, tables_QxN, turns_Sxh[positions_R], count_1)
    return model.extend_rows(tokens_R, rows, cache)


def _head(
    tree: Any,
    leaves: list[Any],
    hidden_SxD: jax.Array,
    ranks_S: jax.Array,
    count_1: jax.Array,
    allowed_SxW: jax.Array | None,
) -> jax.Array:
    model: Transformer = nnx.merge(*jax.tree.unflatten(tree, leaves))
    return model.logits_of_rows(hidden_SxD, ranks_S, count_1, allowed_SxW)


def _draw(
    tree: Any,
    leaves: list[Any],
    hidden_RxD: jax.Array,
    ranks_R: jax.Array,
    count_1: jax.Array,
    floats_Rx3: jax.Array,
    integers_Rx8: jax.Array,
) -> jax.Array:
    logits_RxV = _head(tree, leaves, hidden_RxD, ranks_R, count_1, None)
    return ffi.sample_rows(logits_RxV, floats_Rx3, integers_Rx8, count_1)


def _copy(cache: Cache, pages_2: jax.Array) -> Cache:
    def copied(x: jax.Array) -> jax.Array:
        page = jax.lax.dynamic_index_in_dim(x, pages_2[0], keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(x, page, pages_2[1], 0)

    return tuple(KVCache(*map(copied, layer.arrays)) for layer in cache)
