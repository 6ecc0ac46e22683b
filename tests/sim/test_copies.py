"""Bulk copies and additions, blocks that meet at a counter, matrix moves; and their bugs."""

import numpy as np
import pytest

from .simulator import EAGER, LATE, RANDOM, nan_filled, read_bugs

BUGS = read_bugs("copies.cuh")
ROW, THREADS = 256, 128


def floats(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def double_rows(simulator, bug="NO_BUG", **options):
    rows = 7
    source, out = floats(rows, ROW), nan_filled(rows, ROW)
    report = simulator.launch("run_double_rows", source, out, rows, 3, BUGS[bug], **options)
    return report or np.testing.assert_array_equal(out, 2 * source)


def sum_rows(simulator, bug="NO_BUG", **options):
    source, out = floats(5, ROW), np.ones(ROW, np.float32)
    report = simulator.launch("run_sum_rows", source, out, 5, BUGS[bug], **options)
    return report or np.testing.assert_allclose(out, 1 + source.sum(0), atol=1e-5)


def sum_tiles(simulator, bug="NO_BUG", **options):
    tiles, rows = 3, 7  # the eighth row of a tile is outside: zeros are read, nothing is written
    source, out = floats(tiles, rows, 32), np.ones((rows, 32), np.float32)
    report = simulator.launch("run_sum_tiles", source, out, tiles, rows, BUGS[bug], **options)
    return report or np.testing.assert_allclose(out, 1 + source.sum(0), atol=1e-5)


def meet(simulator, bug="NO_BUG", **options):
    blocks = 4
    source, out = floats(blocks, THREADS), nan_filled(THREADS)
    partials, counter = nan_filled(blocks, THREADS), np.zeros(1, np.uint32)
    arguments = (source, partials, counter, out, blocks, BUGS[bug])
    report = simulator.launch("run_meet", *arguments, **options)
    return report or np.testing.assert_allclose(out, source.sum(0), atol=1e-5)


@pytest.mark.parametrize("run", [double_rows, sum_rows, sum_tiles, meet])
@pytest.mark.parametrize("completion", [EAGER, RANDOM, LATE])
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_right(machine, run, completion, seed):
    assert run(machine, seed=seed, tma=completion) is None


PLANTED = [
    (double_rows, "TOO_FEW_BYTES", "bytes to come -16"),
    (double_rows, "TOO_MANY_BYTES", "bytes to come 16"),
    (double_rows, "MISALIGNED", "bulk load: misaligned"),
    (double_rows, "TOO_LONG", "outside shared memory"),
    (double_rows, "NO_WAIT", "race at smem"),
    (double_rows, "NO_FENCE", "without fence_proxy_async"),
    (double_rows, "NO_BARRIER", "race at smem"),
    (double_rows, "NO_STORE_WAIT", "is not ordered after the read by bulk store"),
    (sum_rows, "NO_FENCE", "without fence_proxy_async"),
    (sum_rows, "NO_BARRIER", "race at smem"),
    (sum_rows, "NO_STORE_WAIT", "may still read shared memory"),
    (sum_tiles, "FAR_ROWS", "TMA load of 128 bytes"),
    (sum_tiles, "FAR_BASE", "out of bounds"),
    (sum_tiles, "BOX_OUTSIDE_SHARED", "outside shared memory"),
    (sum_tiles, "BYTE_MAP_ADD", "expected a float32 tensor map"),
    (meet, "NO_SYNC_BEFORE_ATOMIC", "race in global memory"),
    (meet, "NO_SYNC_AFTER_ATOMIC", "race in global memory"),
    (meet, "NO_ATOMIC", "race in global memory"),
    (meet, "PLAIN_COUNTER", "race in global memory"),
    (meet, "READONLY_PARTIALS", "load_readonly"),
    (meet, "BULK_LOAD_OF_PLAIN", "the proxies are not ordered"),
    (meet, "ONLY_READ_WAIT", "race in global memory"),
]


@pytest.mark.parametrize("run, bug, words", PLANTED)
@pytest.mark.parametrize("seed", [0, 1])
def test_planted_bug(simulator, run, bug, words, seed):
    report = run(simulator, bug, seed=seed)
    assert report is not None and words in report, report


def test_every_bug_is_planted():
    assert {bug for _, bug, _ in PLANTED} == set(BUGS) - {"NO_BUG"}


@pytest.mark.parametrize("transpose_store", [0, 1])
def test_matrix_moves(machine, transpose_store):
    source = np.arange(256, dtype=np.uint16).reshape(16, 16)
    out = np.zeros_like(source)
    assert machine.launch("run_transpose_matrices", source, out, transpose_store) is None
    np.testing.assert_array_equal(out, source.T)
