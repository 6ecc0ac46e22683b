"""The device's own ceilings: the denominators of every floor and target.

Run with `pytest benchmarks/bench_machine.py --device cuda`, or in `make gpu PART=first`.
"""

import pytest
import torch

from .conftest import Work
from .peers import plain_copy

LAUNCHES = 1000  # of a graph
L2_COPIES = 50


@pytest.fixture(autouse=True)
def on_a_device(mode):
    if mode == "cpu":
        pytest.skip("ceilings of a GPU")


def test_copy(against, mode, device):
    """A copy through device memory; bytes read and bytes written count."""
    size = 2**33 if mode == "cuda" else 2**16
    against(plain_copy(size, device), {}, work=Work(bytes=size))


def test_copy_within_l2(against, mode, device):
    """Copies of a buffer that stays in the L2, with its target 32 MiB."""
    size = 2**25 if mode == "cuda" else 2**10
    copy = plain_copy(size, device)

    def run():
        for _ in range(L2_COPIES):
            copy()

    against(run, {}, work=Work(bytes=L2_COPIES * size))


def test_launches_of_a_graph(against, mode, device):
    """Kernels without work, one after another in a CUDA graph."""
    x = torch.zeros(1, device=device)

    def run():
        for _ in range(LAUNCHES):
            x.add_(1)

    run()
    if mode == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        run = graph.replay
    against(run, {})


@pytest.mark.parametrize("times", [1, 50])
def test_bf16_product(against, mode, device, times):
    """Multiplies random numbers, because zeros take less power and run faster. The long case meets
    the power limit, as a stream does."""
    size = 8192 if mode == "cuda" else 64
    a, b = torch.randn(2, size, size, device=device).bfloat16()
    out = torch.empty_like(a)

    def run():
        for _ in range(times):
            torch.mm(a, b, out=out)

    against(run, {}, work=Work(flops=2 * times * size**3))
