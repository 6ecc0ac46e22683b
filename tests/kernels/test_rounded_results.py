"""Operators that round their result to e4m3, against the operator without rounding and e4m3 written
out number by number."""

import re

import pytest
import torch
from torch.library import opcheck

from aapt_kernels import bias_gelu, bias_gelu_e4m3, modulated_norm, modulated_norm_e4m3

from .test_modulated_norm import CALLS, EPS, make_inputs
from .test_quantise_rows import oracle

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def assert_rounded(values, scales, exact):
    """Assert that values and scales are those of `exact` (..., width), rounded."""
    assert values.dtype == torch.float8_e4m3fn and values.is_contiguous()
    assert values.shape == exact.shape and scales.is_contiguous()
    expected, by_group = oracle(exact.flatten(0, -2).cpu())
    assert torch.equal(values.flatten(0, -2).double().cpu(), expected)
    assert torch.equal(scales.cpu(), by_group)


def check_norm(call, dtype, width, groups=1, device="cpu", length=6):
    inputs = make_inputs(CALLS[call], dtype, 2, length, width, groups)
    inputs = {"shift": None, "scale": None} | {n: x.to(device) for n, x in inputs.items()}
    plain, rounded = (op(**inputs, eps=EPS) for op in (modulated_norm, modulated_norm_e4m3))
    if "update" in CALLS[call]:
        (residual, plain), (sums, *rounded) = plain, rounded
        assert torch.equal(sums, residual)
    assert_rounded(*rounded, plain)


def check_gelu(dtype, shape, device="cpu"):
    x = (3 * torch.randn(*shape[:-1], 2, shape[-1])).to(device, dtype)[..., 1, :]
    bias = torch.randn(shape[-1]).to(device, dtype)
    assert_rounded(*bias_gelu_e4m3(x, bias), bias_gelu(x, bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [5, 128, 300])
@pytest.mark.parametrize("call", CALLS)
def test_modulated_norm(backend, call, width, dtype):
    check_norm(call, dtype, width, groups=3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 7), (2, 3, 128), (5, 1300)])
def test_bias_gelu(backend, shape, dtype):
    check_gelu(dtype, shape)


def test_autocast_rounds_what_it_casts(backend):
    inputs = {name: x.float() for name, x in make_inputs(CALLS["gated update"], width=200).items()}
    inputs["update"] = inputs["update"].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        residual, plain = modulated_norm(**inputs)
        sums, *rounded = modulated_norm_e4m3(**inputs)
        hidden = bias_gelu(inputs["x"], inputs["shift"][0, 0])
        rounded_hidden = bias_gelu_e4m3(inputs["x"], inputs["shift"][0, 0])
    assert plain.dtype == hidden.dtype == torch.bfloat16
    assert sums.dtype == torch.float32 and torch.equal(sums, residual)
    assert_rounded(*rounded, plain)
    assert_rounded(*rounded_hidden, hidden)


def test_nan_stays_in_its_row(backend):
    x = torch.randn(1, 4, 256)
    x[0, 2, 5] = float("nan")
    values, scales = modulated_norm_e4m3(x, None, None)
    assert scales[:, 2].isnan().all() and scales[:, [0, 1, 3]].isfinite().all()
    assert values[0, 2].float().isnan().all() and values[0, [0, 1, 3]].float().isfinite().all()
    values, scales = bias_gelu_e4m3(x[0], torch.zeros(256))
    assert scales[0, 2].isnan() and scales.isnan().sum() == 1  # the other group is whole
    assert values.float().isnan().sum() == 128


def test_no_rows(backend):
    values, scales = modulated_norm_e4m3(torch.ones(2, 0, 200), None, None)
    assert values.shape == (2, 0, 200) and scales.shape == (2, 0)
    values, scales = bias_gelu_e4m3(torch.ones(0, 200), torch.ones(200))
    assert values.shape == (0, 200) and scales.shape == (2, 0)


def test_they_are_torch_ops(backend):
    inputs = [*make_inputs(("update", "gate", "shift", "scale"), torch.float32, width=130).values()]
    checks = ("test_schema", "test_faketensor")
    arguments = (*inputs, None, None, EPS, torch.bfloat16)
    opcheck(torch.ops.aapt.modulated_norm_e4m3.default, arguments, test_utils=checks)
    arguments = (inputs[0], None, None, *inputs[3:], None, None, EPS, torch.float32)
    opcheck(torch.ops.aapt.modulated_norm_e4m3.default, arguments, test_utils=checks)
    arguments = (inputs[0], torch.randn(130))
    opcheck(torch.ops.aapt.bias_gelu_e4m3.default, arguments, test_utils=checks)


@pytest.mark.parametrize(
    ("function", "error", "words"),
    [
        (
            lambda x: modulated_norm_e4m3(x, None, x),
            ValueError,
            "shift, scale: expected both or neither, got scale only",
        ),
        (
            lambda x: modulated_norm_e4m3(x, None, None, update=x.requires_grad_()),
            RuntimeError,
            "x: modulated_norm_e4m3 has no gradient; expected a tensor that does not require grad",
        ),
        (
            lambda x: modulated_norm_e4m3(x, None, None, weight=torch.ones(4).requires_grad_()),
            RuntimeError,
            "weight: modulated_norm_e4m3 has no gradient",
        ),
        (
            lambda x: bias_gelu_e4m3(x, torch.ones(3)),
            ValueError,
            "bias: expected (4,) for this x, got (3,)",
        ),
        (
            lambda x: bias_gelu_e4m3(x, torch.ones(4).requires_grad_()),
            RuntimeError,
            "bias: bias_gelu_e4m3 has no gradient",
        ),
    ],
)
def test_errors(function, error, words):
    with pytest.raises(error, match=f"^{re.escape(words)}"):
        function(torch.ones(1, 2, 4))
