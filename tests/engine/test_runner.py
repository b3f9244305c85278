"""What a program was given does not change while it runs."""

import numpy as np
import pytest
from engines import CONTEXT, changed, model_of

from bitjax.engine import Sampling
from bitjax.engine.runner import Runner
from bitjax.engine.sampler import Draw, plain_settings
from bitjax.ops import ffi
from bitjax.ops.rows import PAGE

pytestmark = pytest.mark.skipif(not ffi.available(), reason="the extension is not built")


def aligned(array):
    """A copy that JAX may take without copying it again."""
    room = np.zeros(array.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    copied = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copied[:] = array
    return copied


def test_tables_may_change_behind_a_run():
    """Programs run on behind the call, and the next step's tables are made meanwhile."""
    runner = Runner(changed(model_of("int4"), impl="ffi"), None, 6, 2, CONTEXT)
    runner.tables_QxN = aligned(runner.tables_QxN)
    tokens, positions = np.arange(180, dtype=np.int32), np.arange(180, dtype=np.int32)
    sequences = np.zeros(180, np.int32)

    def hidden(change):
        runner.tables_QxN[0] = 0, 1, 2
        first = slice(0, PAGE)
        runner.run(tokens[first], positions[first], sequences[first]).block_until_ready()
        rest = slice(PAGE, None)
        result = runner.run(tokens[rest], positions[rest], sequences[rest])
        if change:
            runner.tables_QxN[0] = 3, 4, 5  # where nothing is yet
        return np.asarray(result)[: len(tokens) - PAGE]

    wanted = hidden(change=False)
    np.testing.assert_array_equal(hidden(change=True), wanted)


def test_loaded_programs_are_all_that_run_and_head_need():
    runner = Runner(changed(model_of("int4"), impl="ffi"), None, 6, 2, CONTEXT)
    runner.tables_QxN[0] = 0, 1, 2
    runner.load(rows=40, wanted=9)
    programs = runner._run, runner._head, runner._draw, runner._copy
    before = [len(program) for program in programs]
    assert before == [4, 3, 3, 1]  # 1, 8, 32 and 128 rows; heads of 1, 8 and 32
    for rows in (1, 2, 8, 33, 40):
        zeros = np.zeros(rows, np.int32)
        hidden = runner.run(zeros, np.arange(rows, dtype=np.int32), zeros)
        for wanted in {1, min(rows, 9)}:
            chosen = np.arange(wanted, dtype=np.int32)
            runner.logits(hidden, chosen, np.ones(wanted, np.int32))
        if rows <= 9:
            draws = [Draw(0, Sampling(), 0, row) for row in range(rows)]
            runner.draw(hidden, np.ones(rows, np.int32), *plain_settings(draws))
    runner.copy(0, 3)
    assert [len(program) for program in programs] == before
