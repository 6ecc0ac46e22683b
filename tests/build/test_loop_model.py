"""The models of the main loops and of the L2 cache, against cases that are known by arithmetic."""

from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def loop(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return import_module("benchmarks.loop_model")


@pytest.fixture
def l2(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return import_module("benchmarks.l2_model")


def test_a_short_softmax_never_stops_the_tensor_cores(loop):
    assert loop.tensor_busy(loop.Softmax(0, 0)) == pytest.approx(1.0, abs=1e-3)
    assert loop.tensor_busy(loop.SETTLED) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("after", [0, 500])
@pytest.mark.parametrize("before", [4000, 9000])
def test_a_long_softmax_sets_the_period(loop, before, after):
    """A warpgroup's own period: its scores, the softmax, a turn; its second product is hidden."""
    period = loop.TURN + loop.PRODUCT + loop.LATENCY + before + after
    busy = loop.tensor_busy(loop.Softmax(before, after), tiles=2000)
    assert busy == pytest.approx(4 * loop.PRODUCT / period, rel=2e-3)


def test_waiting_for_the_second_product_costs_time(loop):
    for factor in (1.15, 1.3):
        hoisted = loop.tensor_busy(loop.HOISTED.stretched(factor))
        assert hoisted < 0.95 < loop.tensor_busy(loop.SETTLED.stretched(factor))
    assert loop.HOISTED.cycles == pytest.approx(loop.SETTLED.cycles, rel=0.01)
    low, high = loop.forward_rates(loop.HOISTED)
    assert low < loop.FA3_FORWARD[0] and high < loop.FA3_FORWARD[1]


def test_a_third_warpgroup_helps_until_the_exponentials_are_all_there_is(loop):
    """head_dim 64: 66 exponentials of 8 cycles, beside products of 512."""
    for stretch in loop.STRETCHES:
        assert loop.narrow_busy(2, stretch) < 0.8 < loop.narrow_busy(3, stretch)
    assert loop.narrow_busy(8) == pytest.approx(512 / 528)


def test_fp8_is_faster_and_waits_for_its_softmax(loop):
    """A warpgroup's own period is 256 cycles of scores, the softmax, latency and a turn."""
    period = loop.FP8_PRODUCT + loop.LATENCY + loop.FP8.cycles + loop.TURN
    assert loop.fp8_busy() == pytest.approx(4 * loop.FP8_PRODUCT / period, rel=0.05)
    assert loop.fp8_busy(10.0) < loop.fp8_busy() < 512 / 528
    low, high = loop.fp8_rates()
    assert 1.2 * loop.FA3_FORWARD[0] < low < high < 2 * loop.FA3_FORWARD[1]


def test_wider_key_tiles_gain_nothing_where_the_tensor_cores_never_wait(loop):
    for stretch in loop.STRETCHES:
        narrow = loop.tensor_busy(loop.SETTLED.stretched(stretch))
        wide = loop.tensor_busy(loop.SETTLED_WIDE.stretched(stretch), loop.PRODUCT * 176 / 128)
        assert wide / narrow < 1.02


def test_a_backward_tile_of_64_rows_is_bound_by_shared_memory(loop):
    """Figures by hand: 2 KB per factor and step. S and dp read both factors in 8 steps, dq in 8, dv
    and dk one of 4 KB in 4 steps, all of them twice; then 32 KB arrive, 16 KB are exchanged, and
    64 KB added.
    """
    wgmma = 2 * (8 * 2 * (2 + 2) + 8 * (2 + 2) + 4 * 2 * 4) * 1024
    tile = loop.BackwardTile(64)
    assert tile.tensor == 5 * 512
    assert tile.shared == (wgmma + (32 + 16 + 64) * 1024) / 128 > tile.tensor
    assert loop.BackwardTile(80).per_row < tile.per_row


def test_the_cache_keeps_what_was_used_last(l2):
    tile = int(l2.L2_BYTES / 3)
    assert l2.count_misses([["a", "a", "b"], ["a", "b"]], tile) == 2
    assert l2.count_misses([["a"], ["b"], ["c"], ["a"], ["d"], ["a"], ["b"]], tile) == 5
    assert l2.count_misses([], tile) == 0


def test_a_window_of_l2_persistence_gains_nothing_worth_it(l2):
    """Bytes by hand: keys and values of 36 layers, 1708 rows of 3072, two bytes each."""
    large = l2.PINNED["aapt-8b, 736x416"]
    assert large.bytes == 2 * 36 * 1708 * 3072 * 2
    assert large.saved == pytest.approx(l2.PERSISTING_BYTES / l2.PEAK_BYTES / large.step_seconds)
    small = l2.PINNED["tiny-world, 128x80"]
    assert small.bytes < l2.L2_BYTES  # there without a window
    assert all(pinned.saved < 0.001 for pinned in l2.PINNED.values())
