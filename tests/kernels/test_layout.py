"""FrameLayout: its two forms, intervals and mask, against the words of docs/method.md#3."""

import pytest
import torch

from aapt_kernels import FrameLayout
from aapt_kernels.block_causal_attention.cases import LAYOUTS

from .oracles import spec_mask

SMALL = {name: layout for name, layout in LAYOUTS.items() if layout.tokens_per_frame < 100}


@pytest.mark.parametrize("layout", SMALL.values(), ids=SMALL)
def test_mask_is_what_the_specification_says(layout):
    expected = spec_mask(layout)[0]
    assert expected.shape == (layout.query_length, layout.key_length)
    assert torch.equal(layout.dense_mask(), expected)


@pytest.mark.parametrize("layout", SMALL.values(), ids=SMALL)
def test_intervals_cover_the_mask_once(layout):
    expected = spec_mask(layout)[0]
    for frame in range(layout.frames):
        count = torch.zeros(layout.key_length, dtype=torch.int64)
        for start, end in layout.intervals(frame):
            assert start <= end
            count[start:end] += 1
        row = layout.text_tokens + frame * layout.tokens_per_frame
        assert torch.equal(count, expected[row].long())


def test_sink_and_prefix_lie_after_the_text():
    layout = FrameLayout(3, 7, 4, 2, sink_frames=2, past_frames=5)
    assert layout.sink == (3, 17)
    assert layout.prefix == (3, 52)
    assert FrameLayout(3, 7, 4, 2).prefix == (3, 3)
    assert FrameLayout(3, 7, 1, 2, sink_frames=2).sink == (3, 10)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("text_tokens", -1, "text_tokens: expected an integer >= 0, got -1"),
        ("tokens_per_frame", 0, "tokens_per_frame: expected an integer >= 1, got 0"),
        ("frames", -2, "frames: expected an integer >= 0, got -2"),
        ("window_frames", -1, "window_frames: expected an integer >= 0 or None, got -1"),
        ("sink_frames", -1, "sink_frames: expected an integer >= 0, got -1"),
        ("past_frames", -1, "past_frames: expected an integer >= 0 or None, got -1"),
    ],
)
def test_errors(field, value, words):
    fields = dict(text_tokens=1, tokens_per_frame=2, frames=3, window_frames=1) | {field: value}
    with pytest.raises(ValueError) as error:
        FrameLayout(**fields)
    assert str(error.value) == words
