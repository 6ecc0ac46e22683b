"""`qk_norm_rope` of one frame, forward, and forward with backward.

Bound by memory on a GPU: the target is a plain copy's rate.
Run with `pytest benchmarks/bench_qk_norm_rope.py [--device cuda]`.
"""

import pytest
import torch

from aapt_kernels import qk_norm_rope

from .compositions import in_dtype, make_tables, norm_rope
from .conftest import Work
from .peers import Compiled, compiled, other_backends, plain_copy


def composition(q, k, weight, cos, sin):
    return norm_rope(q, weight, cos, sin), norm_rope(k, weight, cos, sin)


@pytest.mark.parametrize("direction", ["forward", "forward and backward"])
def test_qk_norm_rope(against, mode, device, shape, dtype, direction):
    training = direction != "forward"
    q, k = (shape.make_frame(dtype, device).requires_grad_(training) for _ in range(2))
    weight, cos, sin = tables = make_tables(shape, device)
    weight.requires_grad_(training)
    plain = in_dtype(dtype, *tables)
    gradients = (torch.randn_like(q), torch.randn_like(k))

    def timed(function, *arguments):
        def run():
            out = function(q, k, *arguments)
            if not training:
                return out
            return torch.autograd.grad(out, (q, k), gradients, retain_graph=False)

        return run

    ours = timed(lambda q, k: qk_norm_rope(q, k, weight, weight, cos, sin))
    frame_bytes = q.numel() * q.element_size()
    table_bytes = 2 * cos.numel() * cos.element_size()
    # Forward: q and k read and written. Backward: they and their gradients read, gradients written.
    moved = (10 if training else 4) * frame_bytes + (2 if training else 1) * table_bytes
    rivals = {"composition, eager": timed(composition, *plain)}
    if mode != "cpu":
        rivals["composition, compiled"] = Compiled(
            lambda: timed(compiled(composition, mode), *plain)
        )
        rivals |= other_backends("qk_norm_rope", q, ours)
    ceilings = {"a copy of as many bytes": plain_copy(moved, device)}
    work = Work(bytes=moved)
    against(ours, rivals, rounds=20, iterations=10, work=work, ceilings=ceilings)
