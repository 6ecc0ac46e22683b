"""AAPT_CONV_SLABS=shifted, causal_conv3d without wgmma descriptors that start inside a swizzle
pattern: against float64, simulated and on a device."""

import pytest
import torch

from aapt_kernels import causal_conv3d
from aapt_kernels.causal_conv3d.cases import ACTIVE, Case

from .test_causal_conv3d_sm90 import LAST, NEXT_NORM, ROWS, SIZES, UPSAMPLED, check, make

CASES = {
    "one pixel tile": SIZES["one pixel tile"],
    "shared pixels": SIZES["shared pixels"],
    "odd channels": SIZES["odd channels"],
    "flat": SIZES["flat"],
    "in time only": SIZES["in time only"],
    "upsampled": UPSAMPLED["both"],
    "upsampled in space": UPSAMPLED["space start"],
    "taps in the rows": ROWS["wider than a tile"],
    "next norm": NEXT_NORM["a frame each"],
    "tap in x alone": Case((2, 5, 9), (16, 72), batch=1, kernel=(2, 1, 3), state=True),
    # The last column of pixels is the first of its tile: its right neighbour is not in the slab
    "replicated": Case((2, 33, 9), (16, 64), batch=1, padding="replicate"),
    "replicated in one column": Case((1, 3, 1), (16, 72), batch=2, padding="replicate"),
    "replicated, upsampled": Case((2, 3, 9), (16, 64), padding="replicate", upsample=(2, 2)),
}


@pytest.fixture(autouse=True)
def shifted(monkeypatch):
    monkeypatch.setenv("AAPT_CONV_SLABS", "shifted")


@pytest.mark.parametrize("name", CASES)
def test_shifted_slabs_give_the_convolution(kernel, schedule, name):
    schedule(multiprocessors=3, seed=len(name))
    check(CASES[name], kernel)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(("tma", "wgmma"), [(0, 2), (1, 1), (2, 0)])
def test_any_order_of_completion(kernel, schedule, wide, tma, wgmma):
    schedule(multiprocessors=2, seed=1 + tma, tma=tma, wgmma=wgmma)
    channels = (64, 136) if wide else (128, 64)
    padding = "replicate" if tma == 1 else "zeros"
    check(Case((3, 6, 10), channels, batch=1, residual=True, padding=padding, **ACTIVE), kernel)


def test_chunks_give_the_same_bits(kernel, schedule):
    (x, weight, bias), options = make(Case((3, 4, 9), (72, 64), batch=1, **ACTIVE), kernel)
    whole, last = causal_conv3d(x, weight, bias, **options)
    outs, state = [], None
    for chunk in x.split((1, 2), dim=2):
        chunk = chunk.contiguous(memory_format=LAST)
        out, state = causal_conv3d(chunk, weight, bias, state=state, **options)
        outs.append(out)
    assert torch.equal(torch.cat(outs, dim=2), whole) and torch.equal(state, last)


@pytest.mark.parametrize("name", ["one pixel tile", "shared pixels", "upsampled"])
def test_only_shifted_slabs_keep_out_of_the_patterns(kernel, schedule, monkeypatch, name):
    if kernel == "cuda":
        pytest.skip("a device takes both or computes wrong numbers")
    schedule(inside_patterns=False)
    check(CASES[name], kernel)
    monkeypatch.setenv("AAPT_CONV_SLABS", "whole")
    with pytest.raises(RuntimeError, match="a wgmma descriptor starts inside a swizzle pattern"):
        check(CASES[name], kernel)


def test_pointwise_convolutions_never_start_inside_a_pattern(kernel, schedule, monkeypatch):
    monkeypatch.delenv("AAPT_CONV_SLABS")
    schedule(inside_patterns=False)
    check(SIZES["pixel by pixel"], kernel)


def test_another_name_is_an_error(kernel, monkeypatch):
    monkeypatch.setenv("AAPT_CONV_SLABS", "halo")
    with pytest.raises(RuntimeError, match="AAPT_CONV_SLABS: expected whole or shifted, got halo"):
        check(SIZES["one pixel tile"], kernel)
