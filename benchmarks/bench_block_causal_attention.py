"""`block_causal_attention`, forward and backward, against its rivals under the same mask.

On a CPU: "video" at least 1.5 times as fast as SDPA with a dense mask and no slower than a loop of
SDPA over frames. On a GPU: 650 TFLOP/s forward and 520 backward, counting visible elements only;
the backward once more in its deterministic mode.
Run with `pytest benchmarks/bench_block_causal_attention.py [--device cuda]`.
"""

import pytest
import torch

from aapt_kernels import block_causal_attention

from .conftest import Work
from .peers import deterministic, masked_attentions, other_backends
from .shapes import dtypes_for, training_shapes_for

pytestmark = pytest.mark.patience(45)  # peers take ten times as long as ours


def pytest_generate_tests(metafunc):
    device = metafunc.config.getoption("device")
    shapes = training_shapes_for(device)
    metafunc.parametrize("training", shapes.values(), ids=shapes)
    metafunc.parametrize("dtype", dtypes_for(device), ids=str)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_block_causal_attention(against, mode, device, training, dtype, direction):
    layout, backward = training.layout, direction == "backward"
    q, k, v = training.make_inputs(dtype, device)
    dout = torch.randn_like(q)

    def timed(attend):
        """Make a function of one direction; the backward keeps the graph of its forward."""
        if not backward:
            return lambda: attend(q, k, v)
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attend(*leaves)
        return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)

    ours = timed(lambda q, k, v: block_causal_attention(q, k, v, layout))
    rivals = masked_attentions(layout, mode, timed)
    if mode != "cpu":
        op = "block_causal_attention_backward" if backward else "block_causal_attention"
        rivals = other_backends(op, q, ours) | rivals
        if backward:
            rivals["ours, deterministic"] = deterministic(ours)
    work = Work(training.flops(products=5 if backward else 2))
    against(ours, rivals, rounds=5, work=work)
