"""The Triton kernels between the products of a block, against float64: on a CUDA device, else under
Triton's interpreter (test_triton_interpreter.py starts that)."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from aapt_kernels import bias_gelu, modulated_norm, quantise_rows, use_backend
from aapt_kernels.backend import interpreted
from aapt_kernels.testing import assert_error_ratio

from .test_modulated_norm import CALLS, EPS, NAMES, make_inputs, oracle, run
from .test_quantise_rows import CODES, nearest
from .test_quantise_rows import oracle as quantise_oracle
from .test_rounded_results import check_gelu, check_norm

pytest.importorskip("triton")
if not (interpreted() or torch.cuda.is_available()):
    pytest.skip("test_triton_interpreter.py runs these", allow_module_level=True)

pytestmark = pytest.mark.patience(45)  # Triton compiles
DEVICE = "cpu" if interpreted() else "cuda"
CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")


@pytest.fixture(autouse=True)
def triton_backend():
    with use_backend("triton"):
        yield


def differentiate(function, inputs, incoming, dtype=None):
    """Return results and gradients in `dtype`, or if it is None in that of the inputs."""
    leaves = {
        name: (x if dtype is None else x.to(dtype)).detach().requires_grad_()
        for name, x in inputs.items()
    }
    results = function(**leaves)
    outgoing = [x.to(y.dtype) for x, y in zip(incoming, results, strict=False)]
    return *results, *torch.autograd.grad(results, leaves.values(), outgoing)


def compare(function, expected, inputs, incoming):
    actual = differentiate(function, inputs, incoming)
    exact, plain = (
        differentiate(expected, inputs, incoming, dtype)
        for dtype in (torch.float64, actual[0].dtype)
    )
    for ours, oracle_, plain_ in zip(actual, exact, plain, strict=True):
        assert_error_ratio(ours, oracle_, plain_)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("dtype", "batch", "length", "width", "groups"),
    [
        (torch.bfloat16, 2, 6, 192, 2),
        (torch.float32, 1, 41, 100, 1),
        (torch.float16, 3, 4, 7, 4),
        pytest.param(torch.bfloat16, 1, 3, 3072, 1, marks=pytest.mark.slow),
    ],
)
def test_modulated_norm(dtype, batch, length, width, groups, call):
    inputs = make_inputs(CALLS[call], dtype, batch, length, width, groups)
    inputs = {name: x.to(DEVICE) for name, x in inputs.items()}
    # Gradients arrive in any layout
    incoming = torch.randn(2, batch, width, length, device=DEVICE).transpose(2, 3).to(dtype)
    compare(run, oracle, inputs, incoming.unbind())


def test_gradients_of_modulated_norm_are_deterministic():
    inputs = make_inputs(NAMES[1:], torch.bfloat16, 1, 90, 64)
    inputs = {name: x.to(DEVICE) for name, x in inputs.items()}
    incoming = torch.randn(2, 1, 90, 64, device=DEVICE).unbind()
    first, second = (differentiate(run, inputs, incoming) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (torch.bfloat16, (2, 9, 768)),
        (torch.float32, (1, 70, 33)),
        (torch.float16, (5, 1500)),
        (torch.float32, (0, 8)),
    ],
)
def test_bias_gelu(dtype, shape):
    x = (3 * torch.randn(*shape[:-1], 2, shape[-1], device=DEVICE)).to(dtype)[..., 1, :]
    inputs = {"x": x, "bias": torch.randn(shape[-1], device=DEVICE)}

    def plain(x, bias):
        return (F.gelu(x + bias, approximate="tanh"),)

    compare(lambda **y: (bias_gelu(**y),), plain, inputs, [torch.randn_like(x)])


def test_far_values_of_gelu():
    x = torch.tensor([[-1e4, -60.0, 60.0, 1e4, float("inf"), float("nan")]], device=DEVICE)
    out = bias_gelu(x, torch.zeros(6, device=DEVICE))[0].cpu()
    assert torch.equal(out[:5], torch.tensor([0.0, 0.0, 60.0, 1e4, float("inf")]))
    assert out[5].isnan()


def test_no_rows():
    leaves = make_inputs(NAMES[1:], torch.float32, 2, 0, 5)
    leaves = {name: x.to(DEVICE).requires_grad_() for name, x in leaves.items()}
    residual, normed = run(**leaves)
    (residual.sum() + normed.sum()).backward()
    assert residual.shape == normed.shape == (2, 0, 5)
    assert not any(leaves[name].grad.any() for name in NAMES[2:])


def test_nan_stays_in_its_row():
    x = torch.randn(1, 70, 12, device=DEVICE)
    x[0, 3, 5] = float("nan")
    out = modulated_norm(x, None, None, eps=0.0)
    assert not out[0, 3].isfinite().any()
    out[0, 3] = 0
    assert out.isfinite().all()


def test_they_are_torch_ops():
    inputs = make_inputs(NAMES[1:], torch.float32, 1, 4, 8, 2)
    tensors = [x.to(DEVICE).requires_grad_() for x in inputs.values()]
    arguments = (*tensors, EPS, torch.float32)
    opcheck(torch.ops.aapt.modulated_norm.default, arguments, test_utils=CHECKS)
    opcheck(torch.ops.aapt.bias_gelu.default, (tensors[0], tensors[-1]), test_utils=CHECKS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(33, 300), (1, 7), (0, 128)])
def test_quantise_rows_is_bit_equal(dtype, shape):
    x = (torch.randn(shape) * torch.logspace(-4, 3, shape[0])[:, None]).to(dtype)
    expected, scales = quantise_oracle(x)
    found = quantise_rows(x.to(DEVICE))
    assert torch.equal(found[0].double().cpu(), expected) and torch.equal(found[1].cpu(), scales)


def test_quantise_rows_keeps_nan_infinity_and_every_tie():
    middles = (CODES[1:] + CODES[:-1]) / 2
    x = torch.cat([CODES[:-1], middles, -CODES[:-1], -middles]).float().view(-1, 126)
    x = torch.cat([x, torch.full((len(x), 2), 448.0)], dim=1).repeat(1, 2)
    x[0, 0], x[1, 130] = float("nan"), float("-inf")
    values, scales = (each.cpu() for each in quantise_rows(x.to(DEVICE)))
    assert scales[0, 0].isnan() and values[0, :128].float().isnan().all()
    assert scales[1, 1].isinf() and values[1, 130].float().isnan()
    assert torch.equal(values[2:].double(), nearest(x[2:]))
    opcheck(torch.ops.aapt.quantise_rows.default, (x[2:].to(DEVICE),), test_utils=CHECKS[:2])


@pytest.mark.parametrize(
    ("call", "dtype", "width", "length"),
    [
        *((call, torch.bfloat16, 300, 6) for call in CALLS),
        ("gated update", torch.float32, 100, 41),
        ("first norm", torch.float16, 7, 4),
        ("plain norm", torch.float64, 128, 3),
        pytest.param("gated update", torch.bfloat16, 3072, 3, marks=pytest.mark.slow),
    ],
)
def test_modulated_norm_rounds_in_its_launch(call, dtype, width, length):
    check_norm(call, dtype, width, device=DEVICE, length=length)


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (torch.bfloat16, (2, 9, 768)),
        (torch.float32, (1, 70, 33)),
        (torch.float16, (5, 1500)),
    ],
)
def test_bias_gelu_rounds_in_its_launch(dtype, shape):
    check_gelu(dtype, shape, device=DEVICE)
