"""The model of the stream-K schedule: no step is lost, and the efficiencies are what they claim."""

import subprocess
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return import_module("benchmarks.schedule_model")


@pytest.mark.parametrize("multiprocessors", [1, 7, 132])
@pytest.mark.parametrize("heads", [1, 3, 24])
@pytest.mark.parametrize("intervals", [(1,), (512, 129), (7, 3 * 1196)])
@pytest.mark.parametrize(("queries", "warpgroups"), [(1, 2), (64, 2), (65, 2), (1196, 2), (193, 3)])
def test_every_step_is_done_once(model, queries, warpgroups, intervals, heads, multiprocessors):
    shape = model.Shape(queries, intervals, heads, warpgroups=warpgroups)
    shares = model.pieces(shape, multiprocessors)
    reads = sum(piece.key_tiles(shape) for share in shares for piece in share)
    assert reads == heads * shape.key_tiles * len(shape.tile_steps)
    done = {}
    for share in shares:
        for piece in share:
            assert piece.steps > 0
            done[piece.tile] = done.get(piece.tile, 0) + piece.steps
    expected = shape.tile_steps * heads
    assert done == dict(enumerate(expected))
    sizes = [sum(piece.steps for piece in share) for share in shares]
    assert max(sizes) - min(sizes) <= 1 and len(shares) == min(multiprocessors, sum(expected))


@pytest.mark.parametrize("queries", [1, 64, 65, 128, 1196, 3600])
def test_efficiencies_are_bounded(model, queries):
    prediction = model.predict(model.Shape(queries, (512, 1196), 3))
    assert 0 < prediction.naive <= 1 and 0 < prediction.stream_k <= 1


def test_a_tail_costs_half_up_to_64_rows(model):
    keys = (5 * 128 - 1,)
    assert model.Shape(128 + 64, keys, 1).tile_steps == [5, 3]
    assert model.Shape(128 + 65, keys, 1).tile_steps == [5, 5]
    assert model.Shape(64, keys, 1).tile_steps == [3]
    assert model.Shape(128, keys, 1).tile_steps == [5]


def test_a_tail_of_three_warpgroups_costs_a_third_up_to_64_rows(model):
    keys = (5 * 128 - 1,)
    for queries, steps in ((192 + 64, [5, 2]), (192 + 65, [5, 5]), (64, [2]), (192, [5])):
        assert model.Shape(queries, keys, 1, warpgroups=3).tile_steps == steps


def test_a_gap_after_the_text_costs_a_tile(model):
    assert model.Shape(1, (512 + 64,), 1).key_tiles == 5
    assert model.Shape(1, (500, 76), 1).key_tiles == 5
    assert model.Shape(1, (513, 63), 1).key_tiles == 6


def test_one_cta_meets_nobody(model):
    prediction = model.predict(model.Shape(200, (1000,), 2), multiprocessors=1)
    assert prediction.fixup_bytes == 0
    assert prediction.overhead == prediction.most_pieces * model.PIECE_SECONDS


def test_cut_tiles_leave_their_sums(model):
    """One tile of 128 queries and 4 steps on 4 multiprocessors: four parts of 128 x 128 floats."""
    prediction = model.predict(model.Shape(128, (512,), 1), multiprocessors=4)
    assert prediction.fixup_bytes == 4 * 128 * 128 * 4
    narrow = model.predict(model.Shape(64, (1024,), 1), multiprocessors=4)
    assert narrow.fixup_bytes == 4 * 64 * 128 * 4


def test_the_target_shapes_fill_the_device(model):
    for shape in model.shapes():
        prediction = model.predict(shape)
        assert prediction.stream_k >= 0.95 > 0.9 > prediction.naive
        assert prediction.at_target > prediction.flops_floor > prediction.bytes_floor


def test_aligned_ctas_share_what_they_read(model):
    """Three tiles of one head on three CTAs: each key tile is read from memory once; six halves of
    them: at most twice."""
    shape = model.Shape(384, (128 * 2000,), 1)
    tile_bytes = 4 * 128 * 128
    for ctas, most in ((3, 1), (6, 2)):
        read = model.predict(shape, ctas).device_bytes / tile_bytes
        assert 2000 <= read <= most * 2000


@pytest.fixture(scope="module")
def kernel_schedule(tmp_path_factory):
    """The schedule of the kernel itself, compiled for the host: a function to rows of integers."""
    program = tmp_path_factory.mktemp("schedule") / "schedule"
    source = ROOT / "tests" / "build" / "fixtures" / "schedule.cpp"
    command = ["g++", "-std=c++17", "-O1", f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True)

    def pieces(*arguments):
        done = subprocess.run([program, *map(str, arguments)], check=True, capture_output=True)
        return [tuple(map(int, line.split())) for line in done.stdout.decode().splitlines()]

    return pieces


@pytest.mark.parametrize("ctas", [1, 5, 132])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("warpgroups", [2, 3])
@pytest.mark.parametrize(("queries", "text", "frames"), [(1196, 512, 32), (44, 7, 9), (129, 0, 3)])
def test_the_kernel_follows_the_model(
    model, kernel_schedule, queries, text, frames, warpgroups, heads, ctas
):
    batch = 2
    keys = (text + frames * queries,)
    shape = model.Shape(queries, keys, heads, batch=batch, warpgroups=warpgroups)
    expected = [
        (cta, piece.tile, piece.steps, piece.whole, piece.narrow, piece.keys(shape, 0)[0][1])
        for cta, share in enumerate(model.pieces(shape, ctas))
        for piece in share
    ]
    rows = kernel_schedule(queries, text, frames, heads, batch, ctas, warpgroups)
    steps = [
        -(-count // warpgroups) if narrow else count for _, _, _, count, _, _, narrow, *_ in rows
    ]
    assert expected == [
        (cta, tile, count, bool(whole), bool(narrow), begins)
        for (cta, tile, _, _, _, whole, narrow, begins, *_), count in zip(rows, steps, strict=True)
    ]

    seen, sharers = {}, {}
    for cta, tile, first, count, starts, *_, begin, end in sorted(rows):
        assert starts == (first == 0)
        seen.setdefault(tile, []).extend(range(first, first + count))
        sharers.setdefault(tile, []).append((cta, begin, end))
    assert all(tiles == list(range(shape.key_tiles)) for tiles in seen.values())
    for parts in sharers.values():  # everyone knows everyone
        ctas_here = [cta for cta, *_ in parts]
        assert all((begin, end) == (ctas_here[0], ctas_here[-1]) for _, begin, end in parts)
