"""causal_conv3d_e4m3 against float64 with every number rounded by a table of e4m3."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

from aapt_kernels import causal_conv3d_e4m3
from aapt_kernels.causal_conv3d.cases import CASES, make_inputs
from aapt_kernels.causal_conv3d.e4m3 import round_weight

from .test_quantise_rows import nearest

E4M3 = torch.float8_e4m3fn
ROUNDED = torch.ones(1, 3, 1, 2, 2).to(E4M3)
NAMES = [n for n, case in CASES.items() if max(case.stride) == 1 and not case.next_norm]


def make(case, dtype=torch.float32, device="cpu", memory_format=torch.contiguous_format):
    """Return ([x, weight, weight_scale, bias], options) of a case."""
    (x, weight, bias), options = make_inputs(case, dtype)
    x = (3 * x).to(device).contiguous(memory_format=memory_format)
    weight, scale = round_weight(weight * torch.logspace(-3, 1, len(weight)).view(-1, 1, 1, 1, 1))
    del options["stride"]
    if "state" in options:
        options["state"] = options["state"].to(E4M3)
    options = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in options.items()}
    bias = None if bias is None else bias.to(device)
    return [x, weight.to(device), scale.to(device), bias], options


def active_of(x, norm_weight, silu):
    """Return what is rounded, in float32."""
    y = x.float()
    if norm_weight is not None:
        y = y * torch.rsqrt(y.square().mean(1, keepdim=True) + 1e-6)
        y = y * norm_weight.float().view(1, -1, 1, 1, 1)
    return F.silu(y) if silu else y


def oracle(inputs, options):
    """Return out in float64, and state."""
    (x, weight, scale, bias), (repeats, copies) = inputs, options["upsample"]
    names = ("norm_weight", "silu", "state", "residual", "padding")
    norm_weight, silu, state, residual, padding = (options.get(name) for name in names)
    a = nearest(active_of(x, norm_weight, silu).clamp(-448, 448))
    kt, kh, kw = weight.shape[2:]
    past = -(-(kt - 1) // repeats)
    first = a[:, :, :1] if padding == "replicate" else torch.zeros_like(a[:, :, :1])
    before = first.repeat(1, 1, past, 1, 1) if state is None else state.double()
    frames = torch.cat([before, a], dim=2)
    new_state = frames[:, :, frames.shape[2] - past :]
    frames = frames.repeat_interleave(repeats, 2)
    frames = frames.repeat_interleave(copies, 3).repeat_interleave(copies, 4)
    frames = frames[:, :, past * repeats - (kt - 1) + (repeats - 1 if state is None else 0) :]
    mode = "replicate" if padding == "replicate" else "constant"
    frames = F.pad(frames, (kw // 2, kw // 2, kh // 2, kh // 2, 0, 0), mode=mode)
    out = F.conv3d(frames, weight.double() * scale.double().view(-1, 1, 1, 1, 1))
    out = out if bias is None else out + bias.double().view(1, -1, 1, 1, 1)
    return out if residual is None else out + residual.double(), new_state


def check(inputs, options, bound, ties=0.0):
    """Compare with the oracle. ties: share of the state that may be rounded the other way, because
    a kernel's norm or SiLU ends on the other side of the middle between two codes."""
    x, (out, state) = inputs[0], causal_conv3d_e4m3(*inputs, **options)
    expected, new_state = oracle(*to_cpu(inputs, options))
    assert out.dtype == x.dtype and state.dtype == E4M3
    size = expected.abs().amax((0, 2, 3, 4), keepdim=True)
    assert ((out.double().cpu() - expected).abs() <= bound * size).all()
    wrong = state.double().cpu() != new_state
    assert wrong.double().sum() <= ties * wrong.numel()


def to_cpu(inputs, options):
    inputs = [None if x is None else x.cpu() for x in inputs]
    return inputs, {n: v.cpu() if isinstance(v, Tensor) else v for n, v in options.items()}


@pytest.mark.parametrize("name", NAMES)
def test_every_option(backend, name):
    check(*make(CASES[name]), bound=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_round_once(backend, dtype):
    check(*make(CASES["chunk"], dtype), bound=2e-2)


def check_next(inputs, options, bound, ties):
    """Compare the normed output, and the convolution that reads it, with the oracle."""
    x, out_channels = inputs[0], len(inputs[1])
    numbers = torch.Generator().manual_seed(1)
    norm_weight = 1 + 0.3 * torch.randn(out_channels, generator=numbers).to(x)
    given = options | dict(next_norm_weight=norm_weight)
    out, state, active = causal_conv3d_e4m3(*inputs, **given)
    assert torch.equal(out, causal_conv3d_e4m3(*inputs, **options)[0])
    assert active.dtype == E4M3 and active.stride() == out.stride()
    exact, _ = oracle(*to_cpu(inputs, options))
    wanted = nearest(active_of(exact.float(), norm_weight.cpu(), True).clamp(-448, 448))
    wrong = active.double().cpu() != wanted
    assert wrong.double().sum() <= ties * wrong.numel()
    none, same, again = causal_conv3d_e4m3(*inputs, **given, keep_out=False)
    assert none is None and torch.equal(same.float(), state.float())
    assert torch.equal(again.float(), active.float())

    weight = torch.randn(3, out_channels, 2, 3, 3, generator=numbers).to(x.device)
    last = [active, *round_weight(weight), torch.ones(3).to(x)]
    out, state = causal_conv3d_e4m3(*last)
    expected, new_state = oracle(*to_cpu([active.float(), *last[1:]], {"upsample": (1, 1)}))
    size = expected.abs().amax((0, 2, 3, 4), keepdim=True)
    assert out.dtype == x.dtype and ((out.double().cpu() - expected).abs() <= bound * size).all()
    assert torch.equal(state.double().cpu(), new_state)


@pytest.mark.parametrize("name", ["chunk", "up-both", "flat-kernel"])
def test_the_next_norm_is_rounded(backend, name):
    check_next(*make(CASES[name]), bound=1e-4, ties=0.01)


def test_chunks_are_the_whole_clip(backend):
    inputs, options = make(CASES["long"])
    del options["state"], options["residual"]
    whole, last = causal_conv3d_e4m3(*inputs, **options)
    outs, state = [], None
    for x in inputs[0].split((1, 3, 3), dim=2):
        out, state = causal_conv3d_e4m3(x, *inputs[1:], **options, state=state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, dim=2), whole)
    assert torch.equal(state.float(), last.float())


def test_large_numbers_are_limited_and_nan_is_kept(backend):
    x = torch.tensor([1e4, -1e4, float("nan"), 1.0]).view(1, 1, 1, 1, 4)
    weight, scale = round_weight(torch.ones(1, 1, 1, 1, 1))
    out, _ = causal_conv3d_e4m3(x, weight, scale)
    torch.testing.assert_close(out.flatten()[[0, 1, 3]], torch.tensor([448.0, -448.0, 1.0]))
    assert out.flatten()[2].isnan()


def test_pixels(backend):
    inputs, options = make(CASES["flat-kernel"])
    del options["residual"]
    inputs[2] = inputs[2] / 10
    out, _ = causal_conv3d_e4m3(*inputs, **options, pixels=True)
    expected, _ = oracle(inputs, options)
    assert out.dtype == torch.uint8
    assert (out.double() - (expected * 127.5 + 127.5).clamp(0, 255)).abs().max() < 0.51


@pytest.mark.parametrize(
    "plant",
    [
        lambda inputs, options: inputs[2].copy_(inputs[2].flip(0)),
        lambda inputs, options: inputs[2][-1:].mul_(1.1),
        lambda inputs, options: options["state"].copy_(options["state"].float().flip(2)),
    ],
    ids=["scales of other channels", "one scale", "order of past frames"],
)
def test_a_planted_bug_is_seen(plant):
    inputs, options = make(CASES["chunk"])
    right, _ = oracle(inputs, options)
    plant(inputs, options)
    out, _ = causal_conv3d_e4m3(*inputs, **options)
    size = right.abs().amax((0, 2, 3, 4), keepdim=True)
    assert not ((out.double() - right).abs() <= 1e-2 * size).all()


def test_weights_have_a_scale_for_each_output_channel():
    weight = torch.randn(3, 2, 1, 3, 3) * torch.tensor([1e-6, 1.0, 1e3]).view(3, 1, 1, 1, 1)
    values, scales = round_weight(weight)
    assert torch.equal(scales, weight.abs().amax((1, 2, 3, 4)) / 448)
    assert torch.equal(values.double(), nearest(weight / scales.view(3, 1, 1, 1, 1)))
    weight[1, 1] = float("inf")
    with pytest.raises(ValueError, match="^weight: expected finite numbers, got NaN or infinity$"):
        round_weight(weight)


def test_it_is_a_torch_op(backend):
    (x, weight, scale, bias), options = make(CASES["up-both"])
    rest = options["state"], options["norm_weight"], 1e-6, True, None, [2, 2], False, False
    op = torch.ops.aapt.causal_conv3d_e4m3.default
    norm_weight = torch.ones(len(weight))
    # Not test_schema, which multiplies the arguments: PyTorch multiplies no float8
    for more in ((None, True), (norm_weight, True), (norm_weight, False)):
        arguments = (x, weight, scale, bias, *rest, *more)
        opcheck(op, arguments, test_utils="test_faketensor")
    rounded = (x.to(E4M3), *arguments[1:5], None, 1e-6, False, *rest[4:], norm_weight, False)
    opcheck(op, rounded, test_utils="test_faketensor")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(weight=torch.ones(4, 3, 1, 1, 1)), TypeError, "weight: expected torch.float8_e4m3fn"),
        (dict(weight_scale=torch.ones(3)), ValueError, "weight_scale: expected (4,)"),
        (
            dict(weight_scale=torch.ones(4).half()),
            TypeError,
            "weight_scale: expected torch.float32",
        ),
        (dict(x=torch.ones(1, 3, 1, 2, 2).double()), TypeError, "x: expected torch.float32 or "),
        (dict(x=torch.ones(1, 5, 1, 2, 2)), ValueError, "weight: expected (out_channels, 5"),
        (dict(state=torch.ones(1, 3, 0, 2, 2)), TypeError, "state: expected torch.float8_e4m3fn"),
        (
            dict(bias=torch.ones(4).requires_grad_()),
            RuntimeError,
            "bias: causal_conv3d_e4m3 has no",
        ),
        (dict(padding="reflect"), ValueError, "padding: expected one of zeros, replicate"),
        (dict(keep_out=False), ValueError, "keep_out: expected True without next_norm_weight"),
        (dict(next_norm_weight=torch.ones(3)), ValueError, "next_norm_weight: expected (4,)"),
        (dict(x=ROUNDED), ValueError, "bias: expected a tensor with x of torch.float8_e4m3fn"),
        (
            dict(x=ROUNDED, bias=torch.ones(4), norm_weight=torch.ones(3)),
            ValueError,
            "norm_weight: expected none with x of torch.float8_e4m3fn",
        ),
        (
            dict(x=ROUNDED, bias=torch.ones(4), silu=True),
            ValueError,
            "silu: expected False with x of torch.float8_e4m3fn",
        ),
    ],
)
def test_errors(change, error, words):
    weight, scale = round_weight(torch.ones(4, 3, 1, 1, 1))
    given = dict(x=torch.ones(1, 3, 1, 2, 2), weight=weight, weight_scale=scale) | change
    with pytest.raises(error, match=f"^{re.escape(words)}"):
        causal_conv3d_e4m3(**given)
