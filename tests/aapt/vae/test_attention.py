"""Attention within a frame: products against float64, and which device and width take them."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from aapt.vae.attention import SCORE_BYTES, attend, attend_by_products
from aapt_kernels.testing import assert_error_ratio


def make(dtype, seed=0):
    """Rows of a fused projection, and their attention in float64."""
    generator = torch.Generator().manual_seed(seed)
    fused = torch.randn(2, 3, 20, 3 * 288, dtype=dtype, generator=generator)
    q, k, v = fused.chunk(3, dim=-1)
    exact = torch.softmax(q.double() @ k.double().mT / 288**0.5, -1) @ v.double()
    return (q, k, v), exact


@pytest.mark.parametrize("rows", [40, 20, 7, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_are_attention(dtype, rows):
    qkv, exact = make(dtype, seed=rows)
    out = attend_by_products(*qkv, rows)
    assert out.dtype == dtype and out.is_contiguous()
    assert_error_ratio(out, exact, F.scaled_dot_product_attention(*qkv))


def test_float64_keeps_its_precision():
    qkv, exact = make(torch.float64)
    torch.testing.assert_close(attend_by_products(*qkv, 7), exact, rtol=1e-12, atol=1e-12)


class Products(TorchDispatchMode):
    """Records the scores that products make in float32, by shape."""

    def __init__(self):
        super().__init__()
        self.scores = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op is torch.ops.aten.bmm.dtype:
            assert out.dtype == torch.float32
            self.scores.append(tuple(out.shape))
        return out


@pytest.fixture
def scores(monkeypatch):
    """scores(width, ...): what products make on a device. Fake tensors have shapes alone, and need
    no device."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: torch.empty_like(q))

    def run(width, pixels=100, device="cuda", requires_grad=False):
        options = dict(dtype=torch.bfloat16, device=device, requires_grad=requires_grad)
        with FakeTensorMode(), Products() as products:
            qkv = (torch.empty(1, 1, pixels, width, **options) for _ in range(3))
            assert attend(*qkv).shape == (1, 1, pixels, width)
        return products.scores

    return run


def test_heads_too_wide_for_fused_kernels_take_products(scores):
    assert scores(512) == [(1, 100, 100)]
    assert scores(384) == [(1, 100, 100)]
    assert scores(256) == []


def test_a_gradient_and_a_cpu_keep_the_fused_kernel(scores):
    assert scores(512, requires_grad=True) == []
    assert scores(512, device="cpu") == []


def test_scores_of_a_large_frame_are_made_in_equal_blocks(scores):
    assert scores(512, 90 * 160) == [(1, 3600, 14400)] * 4
    assert 4 * 3600 * 14400 <= SCORE_BYTES
