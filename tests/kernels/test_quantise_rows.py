"""quantise_rows against e4m3 written out number by number."""

import re

import pytest
import torch
from torch.library import opcheck

from aapt_kernels import quantise_rows

# By code, 0 to 126: three bits of mantissa, bias 7, no infinity
CODES = torch.tensor(
    [
        m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7)
        for e in range(16)
        for m in range(8)
    ][:127],
    dtype=torch.float64,
)


def nearest(x: torch.Tensor) -> torch.Tensor:
    """Round each number of x to the nearest of CODES with its sign, ties to an even code."""
    distance = (x.abs().double()[..., None] - CODES).abs()
    tied = distance == distance.min(-1, keepdim=True).values
    odd = torch.arange(len(CODES)) % 2
    return CODES[(tied * (2 - odd)).argmax(-1)].copysign(x.double())


def oracle(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values in float64 and scales (groups, rows), group by group."""
    values, scales = [], []
    for group in x.float().split(128, dim=1):
        largest = [max(map(abs, row)) for row in group.tolist()]
        scale = torch.tensor(largest) / torch.tensor(448.0)
        scale = scale.maximum(torch.tensor(2.0**-126))
        values.append(nearest(group * (1 / scale)[:, None]))
        scales.append(scale)
    return torch.cat(values, dim=1), torch.stack(scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 128), (5, 300), (40, 200)])
def test_values_and_scales(backend, shape, dtype):
    x = (torch.randn(shape) * torch.logspace(-3, 2, shape[0])[:, None]).to(dtype)
    values, scales = quantise_rows(x)
    assert values.dtype == torch.float8_e4m3fn and values.is_contiguous()
    assert scales.shape == (-(-shape[1] // 128), shape[0]) and scales.is_contiguous()
    expected = oracle(x)
    assert torch.equal(values.double(), expected[0])
    assert torch.equal(scales, expected[1])


def test_every_code_and_every_tie_is_exact(backend):
    """Beside 448 a scale is 1: codes are kept, and midpoints go to the even neighbour."""
    middles = (CODES[1:] + CODES[:-1]) / 2
    numbers = torch.cat([CODES, middles, -CODES, -middles]).float()
    rows = torch.cat([numbers, numbers.new_zeros(-len(numbers) % 127)]).view(-1, 127)
    x = torch.cat([rows, torch.full((len(rows), 1), 448.0)], dim=1)
    values, scales = quantise_rows(x)
    assert (scales == 1).all()
    assert torch.equal(values.double(), nearest(x))


def test_what_is_kept_is_near(backend):
    """A number is wrong by at most 1 / 16 of itself, or half a step of the smallest numbers."""
    x = torch.randn(64, 256) * torch.logspace(-2, 2, 256)
    values, scales = quantise_rows(x)
    scale = scales.t().repeat_interleave(128, dim=1)
    error = (values.float() * scale - x).abs()
    assert (error <= (x.abs() / 16).maximum(scale * 2.0**-10) * 1.0001).all()


def test_nan_infinity_and_zeros_stay_in_their_group(backend):
    x = torch.ones(4, 256)
    x[0, 3], x[1, 200], x[2, :128] = float("nan"), float("inf"), 0
    values, scales = quantise_rows(x)
    product = values.float() * scales.t().repeat_interleave(128, dim=1)
    assert product[0, :128].isnan().all() and product[1, 128:].isnan().all()
    assert torch.equal(product[2], x[2])
    torch.testing.assert_close(product[0, 128:], torch.ones(128))
    torch.testing.assert_close(product[1, :128], torch.ones(128))
    torch.testing.assert_close(product[3], torch.ones(256))


def test_rows_of_a_view(backend):
    x = torch.randn(6, 3, 256)[:, 1]
    assert all(torch.equal(a, b) for a, b in zip(quantise_rows(x), quantise_rows(x.contiguous())))


def test_it_is_a_torch_op(backend):
    checks = ("test_schema", "test_faketensor")
    for shape in ((3, 200), (0, 128)):
        opcheck(torch.ops.aapt.quantise_rows.default, (torch.randn(shape),), test_utils=checks)


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (torch.zeros(2, 3, 4), ValueError, "x: expected (rows, width), got (2, 3, 4)"),
        (torch.zeros(2, 3, dtype=torch.int32), TypeError, "x: expected torch.float32 or "),
        (torch.zeros(3, 5).t(), ValueError, "x: expected a contiguous last dimension (stride 1)"),
        (torch.zeros(2, 3, requires_grad=True), RuntimeError, "x: quantise_rows has no gradient"),
    ],
)
def test_errors(x, error, words):
    with pytest.raises(error, match=f"^{re.escape(words)}"):
        quantise_rows(x)
