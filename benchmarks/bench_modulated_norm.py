"""`modulated_norm` and `bias_gelu` of one frame, forward, and forward with backward.

Bound by memory on a GPU: the target is a plain copy's rate.
Run with `pytest benchmarks/bench_modulated_norm.py [--device cuda]`.
"""

import pytest
import torch
import torch.nn.functional as F

from aapt_kernels import bias_gelu, modulated_norm

from .conftest import Work
from .peers import Compiled, compiled, other_backends, plain_copy


def gated_norm(x, update, gate, shift, scale):
    x = x + gate * update
    return x, F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def gelu(x, bias):
    return F.gelu(x + bias, approximate="tanh")


def timed(function, *leaves, training):
    """Return a call of the function; in training with the gradients of all leaves."""
    out = function(*leaves)
    gradients = torch.ones_like(out) if torch.is_tensor(out) else [*map(torch.ones_like, out)]

    def run():
        out = function(*leaves)
        return torch.autograd.grad(out, leaves, gradients) if training else out

    return run


@pytest.mark.parametrize("direction", ["forward", "forward and backward"])
@pytest.mark.parametrize("name", ["modulated_norm", "bias_gelu"])
def test_between_products(against, mode, device, shape, dtype, name, direction):
    training = direction != "forward"
    width = shape.heads * shape.head_dim * (4 if name == "bias_gelu" else 1)
    x, update = torch.randn(2, 1, shape.tokens, width, dtype=dtype, device=device)
    rows = torch.randn(3, 1, 1, width, dtype=dtype, device=device)
    if name == "bias_gelu":
        leaves, plain, function = (x, rows[0, 0, 0]), gelu, bias_gelu
        passes = 5 if training else 2  # backward: x and its gradient read, one gradient written
    else:
        leaves, plain = (x, update, *rows.unbind()), gated_norm
        passes = 10 if training else 4  # backward: two gradients, sum and update; two written

        def function(x, update, gate, shift, scale):
            return modulated_norm(x, shift, scale, update=update, gate=gate)

    leaves = [leaf.detach().requires_grad_(training) for leaf in leaves]
    ours = timed(function, *leaves, training=training)
    moved = passes * x.numel() * x.element_size()
    rivals = {"composition, eager": timed(plain, *leaves, training=training)}
    if mode != "cpu":
        rivals["composition, compiled"] = Compiled(
            lambda: timed(compiled(plain, mode), *leaves, training=training)
        )
        rivals |= other_backends(name, x, ours)
    ceilings = {"a copy of as many bytes": plain_copy(moved, device)}
    work = Work(bytes=moved)
    against(ours, rivals, rounds=20, iterations=10, work=work, ceilings=ceilings)
