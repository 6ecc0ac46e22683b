"""The Triton kernels of causal_conv3d against float64: on a CUDA device, else under Triton's
interpreter (test_triton_interpreter.py starts that)."""

import pytest
import torch

from aapt_kernels import causal_conv3d, causal_conv3d_e4m3, use_backend
from aapt_kernels.backend import BackendError, interpreted
from aapt_kernels.causal_conv3d import ref
from aapt_kernels.causal_conv3d.cases import ABSENT, ACTIVE, CASES, Case, make_inputs
from aapt_kernels.causal_conv3d.e4m3 import round_weight
from aapt_kernels.testing import assert_error_ratio

from .test_causal_conv3d_e4m3 import check as check_e4m3
from .test_causal_conv3d_e4m3 import check_next as check_next_e4m3
from .test_causal_conv3d_e4m3 import make as make_e4m3

pytest.importorskip("triton")
if not (interpreted() or torch.cuda.is_available()):
    pytest.skip("test_triton_interpreter.py runs these", allow_module_level=True)

pytestmark = pytest.mark.patience(45)  # Triton compiles
DEVICE = "cpu" if interpreted() else "cuda"
LAST = torch.channels_last_3d
# Between them, every option of the kernel; the interpreter is slow
QUICK = ("chunk", "one-frame-start", "odd-kernel", "down-both", "replicate-chunk", "up-both-start")
QUICK += ("next-norm",)


@pytest.fixture(autouse=True)
def triton_backend():
    with use_backend("triton"):
        yield


def make(case, dtype, memory_format=torch.contiguous_format):
    inputs, options = make_inputs(case, dtype)

    def move(value):
        if not isinstance(value, torch.Tensor):
            return value
        value = value.to(DEVICE)
        return value.contiguous(memory_format=memory_format) if value.dim() == 5 else value

    return [move(t) for t in inputs], {name: move(value) for name, value in options.items()}


def plain(inputs, options, dtype):
    def cast(value):
        return value.to(dtype) if isinstance(value, torch.Tensor) else value

    rest = ABSENT | options
    rest["replicate"] = rest.pop("padding") == "replicate"
    return ref.causal_conv3d(*map(cast, inputs), **{name: cast(v) for name, v in rest.items()})


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16,
        *(pytest.param(t, marks=pytest.mark.slow) for t in (torch.float32, torch.float16)),
    ],
)
@pytest.mark.parametrize(
    "memory_format",
    [
        pytest.param(torch.contiguous_format, marks=pytest.mark.slow, id="channels first"),
        pytest.param(LAST, id="channels last"),
    ],
)
@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES],
)
def test_error_is_at_most_twice_plain_pytorch(name, memory_format, dtype):
    inputs, options = make(CASES[name], dtype, memory_format)
    outputs = causal_conv3d(*inputs, **options)
    exact, baseline = (plain(inputs, options, t) for t in (torch.float64, dtype))
    for ours, wanted, same in zip(outputs, exact, baseline):  # two without a next norm
        assert ours.dtype == dtype and ours.stride() == same.stride()
        assert_error_ratio(ours, wanted, same)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST])
def test_more_than_one_tile_everywhere(memory_format):
    case = Case((2, 11, 13), (70, 140), batch=1, state=True, residual=True, **ACTIVE)
    inputs, options = make(case, torch.bfloat16, memory_format)
    out, _ = causal_conv3d(*inputs, **options)
    exact, baseline = (plain(inputs, options, t)[0] for t in (torch.float64, torch.bfloat16))
    assert_error_ratio(out, exact, baseline)


@pytest.mark.parametrize("upsample", [(1, 1), (2, 2)])
def test_chunks_of_any_length_give_the_same_bits(upsample):
    case = Case((4, 4, 5), (16, 8), batch=1, upsample=upsample, **ACTIVE)
    (x, weight, bias), options = make(case, torch.bfloat16, LAST)
    whole, last = causal_conv3d(x, weight, bias, **options)
    for plan in [(1, 1, 1, 1), (1, 3), (1, 2, 1)]:
        outs, state = [], None
        for chunk in x.split(plan, dim=2):
            chunk = chunk.contiguous(memory_format=LAST)
            out, state = causal_conv3d(chunk, weight, bias, state=state, **options)
            outs.append(out)
        assert torch.equal(torch.cat(outs, dim=2), whole) and torch.equal(state, last)


def test_pixels():
    case = Case((2, 4, 5), (16, 3), batch=1, state=True, **ACTIVE)
    inputs, options = make(case, torch.bfloat16)
    out, _ = causal_conv3d(*inputs, **options, pixels=True)
    exact, *_ = plain(inputs, options, torch.float64)
    levels = (exact * 127.5 + 127.5).clamp(0, 255)
    assert out.dtype == torch.uint8 and (out.double() - levels).abs().max() < 1


def test_a_limit_names_itself():
    words = "it takes float16, bfloat16, float32 or torch.float8_e4m3fn, got torch.float64"
    with pytest.raises(BackendError, match=words):
        causal_conv3d(torch.zeros(1, 2, 1, 1, 1).double(), torch.zeros(1, 2, 1, 1, 1).double())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST])
@pytest.mark.parametrize("name", ["up-space", "replicate-chunk"])
def test_e4m3(name, memory_format):
    """Without norm and SiLU every number is rounded as the table says, the state bit for bit."""
    check_e4m3(*make_e4m3(CASES[name], torch.float32, DEVICE, memory_format), bound=1e-4)


@pytest.mark.parametrize("name", ["chunk", "up-both-start", "flat-kernel"])
def test_e4m3_after_norm_and_silu(name):
    inputs, options = make_e4m3(CASES[name], torch.bfloat16, DEVICE, LAST)
    check_e4m3(inputs, options, bound=2e-2, ties=0.01)


@pytest.mark.parametrize("name", ["chunk", "up-both-start", "flat-kernel"])
def test_e4m3_of_the_next_norm(name):
    inputs, options = make_e4m3(CASES[name], torch.float32, DEVICE, LAST)
    check_next_e4m3(inputs, options, bound=1e-2, ties=0.02)


def test_e4m3_in_more_than_one_tile():
    case = Case((2, 11, 13), (70, 140), batch=1, state=True, residual=True, **ACTIVE)
    check_e4m3(*make_e4m3(case, torch.float32, DEVICE, LAST), bound=1e-2, ties=0.01)


def test_e4m3_limits_large_numbers_and_keeps_nan():
    """In the state, because the interpreter reads the code of NaN as 480."""
    x = torch.tensor([1e4, -1e4, float("nan"), 1.0], device=DEVICE).view(1, 1, 1, 1, 4)
    weight, scale = (y.to(DEVICE) for y in round_weight(torch.ones(1, 1, 2, 1, 1)))
    state = causal_conv3d_e4m3(x, weight, scale)[1].float().flatten().cpu()
    assert torch.equal(state[[0, 1, 3]], torch.tensor([448.0, -448.0, 1.0])) and state[2].isnan()
