"""The model of clusters: bytes counted by hand, and a gain only where L2 is the limit."""

from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUERY_BYTES, TILE_BYTES = 2 * 256 * 128, 4 * 128 * 128  # of 256 queries; of a tile of keys, values


@pytest.fixture
def model(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return import_module("benchmarks.cluster_model")


def test_a_cluster_reads_the_keys_of_two_tiles_once(model):
    """Two query tiles of one head and five key tiles, on as many CTAs."""
    alone = model.Deal(model.Shape(256, (5 * 128,), 1), 2)
    paired = model.Deal(model.Shape(256, (5 * 128,), 1, warpgroups=4), 1)
    assert alone.l2_bytes == QUERY_BYTES + 2 * 5 * TILE_BYTES
    assert paired.l2_bytes == QUERY_BYTES + 5 * TILE_BYTES
    assert alone.useful == paired.useful == 1


def test_a_narrow_tile_shares_nothing_in_a_cluster(model):
    paired = model.Deal(model.Shape(64, (8 * 128,), 1, warpgroups=4), 1)
    assert paired.l2_bytes == QUERY_BYTES // 4 + 8 * TILE_BYTES


@pytest.mark.parametrize(("queries", "useful"), [(256, 1.0), (3 * 128, 0.75)])
def test_clusters_gain_where_l2_limits_and_lose_what_they_leave_empty(model, queries, useful):
    """Three tiles make two pairs, the second of them half empty."""
    shape = model.Shape(queries, (512 * 128,), 132)
    alone, paired = model.deals(shape)
    assert paired.useful == pytest.approx(useful)
    loop, little = 600e12, 1e12
    assert paired.rate(loop, 1e15) / alone.rate(loop, 1e15) == pytest.approx(useful)
    assert paired.rate(loop, little) / alone.rate(loop, little) == pytest.approx(
        2 * useful, rel=5e-3
    )
    limit = model.below(alone, paired, loop)
    assert paired.rate(loop, limit) / alone.rate(loop, limit) == pytest.approx(model.WORTH)


def test_a_prediction_says_so(model):
    assert model.table().startswith("PREDICTION, nothing here was measured")
