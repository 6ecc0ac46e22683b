"""The model of the training kernels against the kernels' own mask and schedule, tile by tile, and
both against the dense mask."""

import subprocess
from importlib import import_module
from pathlib import Path

import pytest
import torch

from aapt_kernels import FrameLayout
from aapt_kernels.block_causal_attention.cases import LAYOUTS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return import_module("benchmarks.training_model")


@pytest.fixture
def shapes(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return import_module("benchmarks.shapes")


@pytest.fixture(scope="module")
def kernel_work(tmp_path_factory):
    """Compile what the kernels do for the host: lists of integers by kind."""
    program = tmp_path_factory.mktemp("schedule") / "schedule"
    source = ROOT / "tests" / "build" / "fixtures" / "training_schedule.cpp"
    command = ["g++", "-std=c++17", "-O1", f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True)

    def work(layout, pinned=False, rows=80, heads=1, ctas=3, text=None, query_rows=128):
        frames = layout.key_frames
        window = frames if layout.window_frames is None else min(layout.window_frames, frames)
        numbers = (
            *(layout.text_tokens, layout.tokens_per_frame, layout.frames),
            *(frames - layout.frames, window, min(layout.sink_frames, frames)),
            *(int(pinned), query_rows, rows, heads, ctas),
            *([] if text is None else [text]),
        )
        done = subprocess.run([program, *map(str, numbers)], check=True, capture_output=True)
        lines = {kind: [] for kind in "fFbB"}
        for line in done.stdout.decode().splitlines():
            kind, *values = line.split()
            lines[kind].append(tuple(map(int, values)))
        return lines

    return work


@pytest.mark.parametrize("text", [None, 0, 2])
@pytest.mark.parametrize(("query_rows", "rows"), [(128, 80), (192, 128)])
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_tiles_cover_the_mask_once(kernel_work, layout, pinned, query_rows, rows, text):
    """Each element that is seen is in exactly one tile; a clean tile shows nothing else."""
    text = None if text is None else min(text, layout.text_tokens)
    lines = kernel_work(layout, pinned, rows, text=text, query_rows=query_rows)
    mask = layout.dense_mask()
    if text is not None:
        mask[:, text : layout.text_tokens] = False
    for kind, height in (("F", query_rows), ("B", rows)):
        covered = torch.zeros_like(mask, dtype=torch.int32)
        for row, key, end, clean in lines[kind]:
            part = (slice(row, row + height), slice(key, end))
            covered[part] += 1
            if clean:
                assert mask[part].all() and end - key == 128
                # Rows beyond the end cost the forward nothing, but are keys of no weight in `B`
                assert kind == "F" or row + height <= len(mask)
        assert (covered[mask] == 1).all()


LARGE = [
    FrameLayout(512, 1196, 31, 30),
    FrameLayout(77, 880, 13, 4),
    FrameLayout(512, 3600, 5, 2, sink_frames=2, past_frames=3),
    FrameLayout(25, 40, 16, 8),
]


@pytest.mark.parametrize("heads", [1, 25])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("layout", LARGE, ids=str)
def test_the_kernel_follows_the_model(model, shapes, kernel_work, layout, pinned, head_dim, heads):
    shape, ctas = shapes.TrainingShape(layout, heads, head_dim), 132
    query_rows = model.rows_of_forward(shape)
    lines = kernel_work(
        layout, pinned, model.rows_of_backward(shape), heads, ctas, query_rows=query_rows
    )
    queries = model.query_tiles(shape, query_rows, pinned)[::-1]
    keys = model.key_tiles(shape, pinned)
    for kind, tiles in (("f", queries), ("b", keys)):
        expected = [
            (cta, pair, tile.row, tile.count, tile.clean)
            for cta, pair, tile in model.deal(tiles, heads, ctas)
        ]
        expected.sort(key=lambda work: work[0])
        assert lines[kind] == expected


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_visible_area_is_that_of_the_mask(shapes, layout):
    assert shapes.TrainingShape(layout, 1, 64).visible == int(layout.dense_mask().sum())


def test_the_target_shapes_waste_less_than_three_percent(model, shapes):
    for shape in shapes.TRAINING_CUDA.values():
        if shape.head_dim != 128:
            continue
        prediction = model.predict(shape)
        for direction in (prediction.forward, prediction.backward):
            assert 0 <= direction.waste < 0.03
            assert direction.edges < 0.03
            assert direction.balance > 0.99
        assert prediction.deterministic > prediction.backward_seconds


def test_a_prediction_says_so(model):
    assert model.tables().startswith("PREDICTION, nothing here was measured")
