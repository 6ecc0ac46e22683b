"""What this device can do at most: the denominators of the floors.

Run with `pytest benchmarks/bench_machine.py --device cuda`, or in `make gpu PART=calibrate`.
"""

import pytest
import torch

from .conftest import Work
from .peers import plain_copy


@pytest.fixture(autouse=True)
def on_a_device(mode):
    if mode == "cpu":
        pytest.skip("ceilings of a GPU")


def test_copy(against, mode, device):
    """Bytes read and bytes written count."""
    size = 2**33 if mode == "cuda" else 2**16
    against(plain_copy(size, device), {}, work=Work(bytes=size))


@pytest.mark.parametrize("times", [1, 50])
def test_bf16_product(against, mode, device, times):
    """On random numbers: zeros take less power and run faster. The long one meets the power limit,
    as a stream does."""
    size = 8192 if mode == "cuda" else 64
    a, b = torch.randn(2, size, size, device=device).bfloat16()
    out = torch.empty_like(a)

    def run():
        for _ in range(times):
            torch.mm(a, b, out=out)

    against(run, {}, work=Work(flops=2 * times * size**3))
