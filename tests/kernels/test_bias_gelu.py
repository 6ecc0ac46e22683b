"""bias_gelu against F.gelu and autograd in float64."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from aapt_kernels import bias_gelu
from aapt_kernels.testing import assert_error_ratio


def oracle(x, bias):
    return F.gelu(x + bias, approximate="tanh")


def differentiate(function, x, bias, incoming):
    leaves = [y.detach().requires_grad_() for y in (x, bias)]
    out = function(*leaves)
    return out, *torch.autograd.grad(out, leaves, incoming.to(out.dtype))


@pytest.mark.parametrize("shape", [(1, 7), (2, 3, 5), (1, 9, 33), (0, 4), (2, 0)])
def test_value_and_gradients(backend, shape):
    x = torch.randn(*shape[:-1], 2, shape[-1], dtype=torch.float64)[..., 1, :]
    bias, incoming = torch.randn(shape[-1:]).double(), torch.randn(shape).double()
    actual = differentiate(bias_gelu, x, bias, incoming)
    torch.testing.assert_close(actual, differentiate(oracle, x, bias, incoming))
    assert actual[0].is_contiguous()


def test_gradcheck(backend):
    leaves = [torch.randn(shape).double().requires_grad_() for shape in ((3, 4), (4,))]
    assert torch.autograd.gradcheck(bias_gelu, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_plain_pytorch(backend, dtype):
    x, incoming = (3 * torch.randn(2, 30, 17)).to(dtype), torch.randn(2, 30, 17).to(dtype)
    bias = torch.randn(17)
    actual = differentiate(bias_gelu, x, bias, incoming)
    assert [y.dtype for y in actual] == [dtype, dtype, torch.float32]
    exact, plain = (
        differentiate(oracle, *(y.to(t) for y in (x, bias, incoming)))
        for t in (torch.float64, dtype)
    )
    for ours, oracle_, plain_ in zip(actual, exact, plain, strict=True):
        assert_error_ratio(ours, oracle_, plain_)


def test_far_values_nan_and_infinity(backend):
    x = torch.tensor([[-1e4, -60.0, 60.0, 1e4, float("inf"), float("nan"), 1.0]])
    out = bias_gelu(x, torch.zeros(7))
    assert torch.equal(out[0, :5], torch.tensor([0.0, 0.0, 60.0, 1e4, float("inf")]))
    assert out[0, 5].isnan() and out[0, 6].isfinite()


def test_autocast_casts_the_product_and_keeps_the_bias(backend):
    x, bias = torch.randn(2, 3, 8), torch.randn(8)
    with torch.autocast("cpu", torch.bfloat16):
        actual = bias_gelu(x, bias)
    assert torch.equal(actual, bias_gelu(x.bfloat16(), bias)) and actual.dtype == torch.bfloat16


def test_it_is_a_torch_op(backend):
    x, bias = torch.randn(2, 3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    opcheck(torch.ops.aapt.bias_gelu.default, (x, bias))
    arguments = (torch.randn(2, 3, 8), x.detach(), bias.detach())
    opcheck(torch.ops.aapt.bias_gelu_backward.default, arguments)


@pytest.mark.parametrize("dynamic", [None, True])
def test_two_graphs_serve_every_length(dynamic):
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(bias_gelu, fullgraph=True, backend=graphs, dynamic=dynamic)
    bias = torch.randn(8)
    for length in range(2, 9):
        x, incoming = torch.randn(2, 1, length, 8)
        torch.testing.assert_close(
            differentiate(compiled, x, bias, incoming), differentiate(bias_gelu, x, bias, incoming)
        )
    assert graphs.frame_count <= 2


@pytest.mark.parametrize(
    ("x", "bias", "error", "words"),
    [
        ((2, 5), (4,), ValueError, "bias: expected (5,) for this x, got (4,)"),
        ((5,), (5,), ValueError, "x: expected (..., rows, width), got (5,)"),
    ],
)
def test_errors_of_shape(x, bias, error, words):
    with pytest.raises(error, match=f"^{re.escape(words)}$"):
        bias_gelu(torch.zeros(x), torch.zeros(bias))


def test_errors_of_dtype_and_stride():
    x, bias = torch.zeros(3, 5), torch.zeros(5)
    words = "bias: expected torch.float32 or torch.bfloat16 or torch.float16, got torch.float64"
    with pytest.raises(TypeError, match=f"^{words}$"):
        bias_gelu(x, bias.double())
    words = r"x: expected a contiguous last dimension \(stride 1\), got strides \(1, 5\)"
    with pytest.raises(ValueError, match=f"^{words}$"):
        bias_gelu(torch.zeros(3, 5).t(), torch.zeros(3))
