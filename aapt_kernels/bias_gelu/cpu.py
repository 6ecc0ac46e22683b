"""Fast CPU implementation: one sum, then PyTorch's own GELU in its memory."""

import torch

from ..precision import dense, widen


def forward(x, bias):
    z = torch.add(*widen(x, bias))
    return dense(torch.ops.aten.gelu_(z, approximate="tanh"), x.dtype)


def backward(dout, x, bias):
    dout, wide, wide_bias = widen(dout, x, bias)
    dx = torch.ops.aten.gelu_backward(dout, wide + wide_bias, approximate="tanh")
    dbias = dx.sum(tuple(range(dx.dim() - 1)))
    return dense(dx, x.dtype), dense(dbias, bias.dtype)
